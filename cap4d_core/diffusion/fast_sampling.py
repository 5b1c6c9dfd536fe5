"""Steps of stochastic I/O sampling through the fast denoiser.

What all calls of a step share is computed once per step, and while the device is still busy with
the step before; indices are uploaded once per step, and conditioning maps stay on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.fast_denoiser import FastDenoiser, ReferenceFeatures
from cap4d_core.diffusion.sampler import ConditioningSource, PlainStep, StepNoise, StepPlan

logger = logging.getLogger(__name__)

# Maps in bfloat16 at the released size: 0.4 MB per view.
MAP_BYTES = 2**30
_MAPS_AT_A_TIME = 16

Call = Callable[[Tensor, Tensor, Tensor, ReferenceFeatures | None, int, bool], Tensor]


class FastSamplingDenoiser:
    """A denoiser that `sample_stochastic_io` asks for whole steps.

    Args:
        denoiser: fast denoiser.
        call: what to call instead of it for a network call, e.g. its compiled form.
        same_shapes: fill the last call of a step up, so that all calls have one shape.
        map_bytes: conditioning maps are kept on the device up to this size; beyond, views are asked
            for at every call.
    """

    def __init__(
        self,
        denoiser: FastDenoiser,
        call: Call | None = None,
        same_shapes: bool = False,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        self.denoiser = denoiser
        self.call: Call = call or denoiser
        self.same_shapes = same_shapes
        self.map_bytes = map_bytes

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """The plain denoiser."""
        return self.denoiser.denoiser(latents, timesteps, conditioning)

    def prepare(
        self,
        references: ConditioningSource,
        generated: ConditioningSource,
        guidance_scale: float,
        batches_per_call: int,
    ) -> StepNoise:
        """Steps with this conditioning; the plain ones where masks are not all or nothing."""
        step = _FastStep(self, references, generated, guidance_scale, batches_per_call)
        if step.is_exact:
            return step
        logger.warning("Reference masks vary within frames: sampling without the fast path.")
        return PlainStep(self, references, generated, guidance_scale, batches_per_call)


@dataclass(frozen=True)
class _Shared:
    """What all calls of a step share, on the device.

    Attributes:
        plan: the step's.
        reference_ids: (n_its, R) rows of `features`, filled up to whole calls.
        view_ids, view_batches: (n_its, G) views, likewise; on the device and on the host.
        biases, features: see `FastDenoiser`.
        guided: whether both branches are computed.
    """

    plan: StepPlan
    reference_ids: Tensor
    view_ids: Tensor
    view_batches: NDArray[np.int64]
    biases: Tensor
    features: ReferenceFeatures | None
    guided: bool


class _FastStep:
    def __init__(
        self,
        owner: FastSamplingDenoiser,
        references: ConditioningSource,
        generated: ConditioningSource,
        guidance_scale: float,
        batches_per_call: int,
    ) -> None:
        network = owner.denoiser.denoiser
        self.owner = owner
        self.generated = generated
        self.guidance_scale = guidance_scale
        self.batches_per_call = batches_per_call
        self.announced: _Shared | None = None
        self.device, self.dtype = network.device, network.dtype
        config = network.config
        frames = references.index(torch.arange(len(references))).to(self.device)
        self.reference_latents, self.reference_maps = frames.z_input, frames.pos_enc.to(self.dtype)
        masks = [(frames.ref_mask == 1).all()]
        per_view = config.latent_size**2 * config.condition_channels * self.dtype.itemsize
        self.maps: Tensor | None = None
        if len(generated) * per_view <= owner.map_bytes:
            parts = []
            for first in range(0, len(generated), _MAPS_AT_A_TIME):
                ids = torch.arange(first, min(first + _MAPS_AT_A_TIME, len(generated)))
                part = generated.index(ids)
                parts.append(part.pos_enc.to(self.device, self.dtype))
                masks.append((part.ref_mask == 0).all().to(self.device))
            self.maps = torch.cat(parts)
        else:
            first_view = generated.index(torch.arange(1))
            masks.append((first_view.ref_mask == 0).all().to(self.device))
        self.is_exact = bool(torch.stack(masks).all())

    def __call__(self, plan: StepPlan, latents: Tensor) -> Tensor:
        """As StepNoise."""
        shared, self.announced = self.announced, None
        if shared is None or shared.plan is not plan:
            shared = self._shared(plan)
        size, batches = self.batches_per_call, len(plan.view_batches)
        current = latents.to(self.device)
        prediction = torch.empty_like(current)
        for first in range(0, batches, size):
            views = shared.view_ids[first : first + size]
            refs = shared.reference_ids[first : first + size]
            flat = views.flatten()
            features = shared.features
            noise = self.owner.call(
                current.index_select(0, flat).unflatten(0, views.shape),
                self._maps_of(flat, shared.view_batches[first : first + size]).unflatten(
                    0, views.shape
                ),
                shared.biases,
                None if features is None else features.gather(refs.flatten(), len(views)),
                refs.shape[1],
                shared.guided,
            )
            if shared.guided:
                without, with_conditions = noise[0].float(), noise[1].float()
                noise = without + self.guidance_scale * (with_conditions - without)
            real = min(size, batches - first)
            prediction[views[:real].flatten()] = noise[:real].flatten(0, 1).to(prediction)
        return prediction.to(latents.device)

    def announce(self, plan: StepPlan) -> None:
        """As StepNoise."""
        self.announced = self._shared(plan)

    def _shared(self, plan: StepPlan) -> _Shared:
        fast, device = self.owner.denoiser, self.device
        guided = plan.guided and self.guidance_scale != 1
        used, local = np.unique(plan.reference_batches, return_inverse=True)
        local = local.reshape(plan.reference_batches.shape)
        view_batches = plan.view_batches
        if self.owner.same_shapes:
            fill = -len(view_batches) % self.batches_per_call
            local = np.concatenate([local, np.repeat(local[-1:], fill, 0)])
            view_batches = np.concatenate([view_batches, np.repeat(view_batches[-1:], fill, 0)])
        rows, reference_ids, view_ids = (
            _uploaded(ids, device) for ids in (used, local, view_batches)
        )
        biases = fast.time_biases(torch.full((1,), plan.timestep, device=device))
        features = fast.reference_features(
            self.reference_latents.index_select(0, rows),
            self.reference_maps.index_select(0, rows),
            biases,
            guided,
        )
        return _Shared(plan, reference_ids, view_ids, view_batches, biases, features, guided)

    def _maps_of(self, on_device: Tensor, on_host: NDArray[np.int64]) -> Tensor:
        if self.maps is not None:
            return self.maps.index_select(0, on_device)
        return self.generated.index(on_host.ravel()).pos_enc.to(self.device, self.dtype)


def _uploaded(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """On a GPU without waiting for what it still has to do."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
