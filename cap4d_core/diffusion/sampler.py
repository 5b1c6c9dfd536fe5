"""Stochastic I/O sampling: many views from a network that sees few at a time.

CAP4D (Taubner et al., CVPR 2025), section 3.2. At every DDIM step the N views are partitioned at
random into batches of G; each batch is denoised together with R random references in one network
call of V = R + G views. Predictions of a step all come from the latents of the step before; then
all views are updated at once, so information spreads between views over the steps.

Steps are numbered as executed: 0 is the noisiest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.grouping import Grouping
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.solvers import (
    needs_previous,
    predicted_clean,
    solver_grid,
    step_latents,
)
from cap4d_core.errors import DivergedError
from cap4d_core.progress import Progress, ProgressCallback


class ConditioningSource(Protocol):
    """Conditioning of N frames, stored or rendered when asked for."""

    def __len__(self) -> int: ...

    def index(self, ids: Any) -> FrameConditioning:
        """The frames `ids`, in that order, on the device of the network."""
        ...


Denoiser = Callable[[Tensor, Tensor, FrameConditioning], Tensor]


@dataclass(frozen=True)
class StepPlan:
    """What a step does, whatever the latents are.

    Attributes:
        timestep: of the schedule.
        reference_batches: (n_its, R) references of every batch.
        view_batches: (n_its, G) views of every batch.
        guided: False = the conditional prediction alone.
    """

    timestep: int
    reference_batches: NDArray[np.int64]
    view_batches: NDArray[np.int64]
    guided: bool = True


class StepNoise(Protocol):
    """Predicts the noise of all views in one step."""

    def __call__(self, plan: StepPlan, latents: Tensor) -> Tensor:
        """Noise of `latents` (N, 4, h, w)."""
        ...

    def announce(self, plan: StepPlan) -> None:
        """The step after the one just called: a device may start with what needs no latents."""
        ...


@dataclass(frozen=True)
class SamplingProgress(Progress):
    """State after a step.

    Attributes:
        step: number of the step just finished.
        latents: (N, 4, h, w) after that step; must not be changed.
        predicted_clean: (N, 4, h, w) estimate of the noise-free latents made in that step.
    """

    step: int = 0
    latents: Tensor | None = None
    predicted_clean: Tensor | None = None


@torch.no_grad()
def sample_stochastic_io(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    references: ConditioningSource,
    generated: ConditioningSource,
    num_steps: int,
    guidance_scale: float,
    num_views_per_call: int,
    max_references: int,
    noise: Tensor,
    grouping: Grouping,
    start_step: int = 0,
    end_step: int | None = None,
    callback: ProgressCallback | None = None,
    *,
    batches_per_call: int = 1,
    solver: str = "ddim",
    clean_before: Tensor | None = None,
    guidance_interval: Sequence[float] = (0.0, 1.0),
) -> Tensor:
    """Runs steps `start_step` to `end_step - 1` of stochastic I/O sampling.

    Running a range of steps in pieces gives the same bits as running it at once, as long as
    `grouping` answers each step the same.

    Args:
        denoiser: MMDMDenoiser or anything called like it; one with a method `prepare`, which takes
            the last arguments of `PlainStep` and returns a StepNoise, is asked for whole steps.
        schedule: noise schedule of the model.
        references: conditioning of the N_ref references.
        generated: conditioning of the N views; `z_input` of these is not used.
        num_steps: requested DDIM steps; `schedule.num_steps_run(num_steps)` are run in all.
        guidance_scale: classifier-free guidance eps_u + scale (eps_c - eps_u); with 1 the
            unconditional half is left out.
        num_views_per_call: V.
        max_references: R is the smaller of this and N_ref.
        noise: (N, 4, h, w) float32 latents at `start_step` (standard normal at step 0); the result
            stays on their device. Not changed.
        grouping: batches of every step.
        start_step: first step to run.
        end_step: step after the last; None = all.
        callback: called after every step with a SamplingProgress.
        batches_per_call: batches put into one network call; memory against launches.
        solver: "ddim" or "dpm-solver++", see `solvers`.
        clean_before: (N, 4, h, w) `predicted_clean` of the step before `start_step`, which a solver
            of second order needs to go on as if there had been no break.
        guidance_interval: part of all steps, as fractions, that is guided (Kynkäänniemi et al.,
            NeurIPS 2024); the others predict with conditions only, in half the time.

    Returns:
        (N, 4, h, w) float32 scaled latents after the last step run.

    Raises:
        ValueError: sizes that do not fit.
        DivergedError: the network returned NaN or infinity.
    """
    grid = solver_grid(schedule, num_steps, solver)
    total = len(grid)
    stop = total if end_step is None else end_step
    if not 0 <= start_step <= stop <= total:
        raise ValueError(f"steps {start_step} to {stop} of {total}")
    num_references = min(len(references), max_references)
    num_generated = num_views_per_call - num_references
    if num_generated < 1 or num_references < 1:
        raise ValueError(f"{num_references} references in calls of {num_views_per_call} views")
    if len(noise) != len(generated) or len(noise) % num_generated:
        raise ValueError(
            f"{len(noise)} latents for {len(generated)} views in batches of {num_generated}"
        )

    # Denoisers that know how to share work between the calls of a step do so; others are called.
    prepare = getattr(denoiser, "prepare", functools.partial(PlainStep, denoiser))
    noise_of_step: StepNoise = prepare(references, generated, guidance_scale, batches_per_call)
    latents = noise.to(torch.float32)
    second_order = needs_previous(solver)
    previous = None if clean_before is None else clean_before.to(latents)

    def plan_of(step: int) -> StepPlan:
        return StepPlan(
            int(grid.timesteps[total - 1 - step]),
            *_checked_batches(grouping, step, len(noise), num_references, num_generated),
            guided=is_guided(step, total, guidance_interval),
        )

    upcoming: StepPlan | None = None
    for step in range(start_step, stop):
        at = total - 1 - step
        prediction = noise_of_step(upcoming or plan_of(step), latents)
        if step + 1 < stop:
            upcoming = plan_of(step + 1)
            noise_of_step.announce(upcoming)
        # Here the host waits for the device.
        if not bool(torch.isfinite(prediction).all()):
            raise DivergedError(
                f"The denoiser returned NaN or infinity in step {step} of {total}. With "
                "sampling.precision 'fp16' this is an overflow: use 'bf16' or 'fp32'. Otherwise "
                "the weights or the tracking are damaged."
            )
        clean = None
        if callback is not None or second_order:
            clean = predicted_clean(grid, at, latents, prediction)
        before = previous if second_order else None
        updated = step_latents(grid, at, latents, prediction, clean, before)
        if callback is not None:
            callback(
                SamplingProgress(
                    done=step + 1,
                    total=total,
                    unit="step",
                    step=step,
                    latents=updated,
                    predicted_clean=clean,
                )
            )
        latents, previous = updated, clean
    return latents if latents is not noise else noise.clone()


def is_guided(step: int, total: int, interval: Sequence[float]) -> bool:
    """Whether a step lies in an interval of fractions of all `total` steps, ends rounded."""
    first, end = (round(fraction * total) for fraction in interval)
    return first <= step < end


def _checked_batches(
    grouping: Grouping, step: int, num_views: int, num_references: int, num_generated: int
) -> tuple[np.ndarray, np.ndarray]:
    references, views = grouping.step(step)
    fits = (
        views.shape == (num_views // num_generated, num_generated)
        and references.shape == (len(views), num_references)
        and np.array_equal(np.sort(views, axis=None), np.arange(num_views))
    )
    if not fits:
        raise ValueError(
            f"grouping of step {step}: references {references.shape}, views {views.shape}; "
            f"expected ({num_views // num_generated}, {num_references}) and every one of the "
            f"{num_views} views once"
        )
    return references, views


class PlainStep:
    """Calls the denoiser batch after batch (a StepNoise).

    Args:
        denoiser: MMDMDenoiser or anything called like it.
        references: conditioning of the references.
        generated: conditioning of the views.
        guidance_scale: classifier-free guidance.
        batches_per_call: batches put into one network call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        references: ConditioningSource,
        generated: ConditioningSource,
        guidance_scale: float,
        batches_per_call: int,
    ) -> None:
        self.denoiser = denoiser
        self.references = references
        self.generated = generated
        self.guidance_scale = guidance_scale
        self.batches_per_call = batches_per_call

    def __call__(self, plan: StepPlan, latents: Tensor) -> Tensor:
        """As StepNoise."""
        prediction = torch.empty_like(latents)
        for first in range(0, len(plan.view_batches), self.batches_per_call):
            views = torch.from_numpy(plan.view_batches[first : first + self.batches_per_call])
            eps = _predict(
                self.denoiser,
                self.references,
                self.generated,
                torch.from_numpy(plan.reference_batches[first : first + self.batches_per_call]),
                views,
                latents,
                plan.timestep,
                self.guidance_scale if plan.guided else 1.0,
            )
            prediction[views.flatten().to(latents.device)] = eps.to(latents)
        return prediction

    def announce(self, plan: StepPlan) -> None:
        """As StepNoise: nothing is shared by the calls of a step."""


def _predict(
    denoiser: Denoiser,
    references: ConditioningSource,
    generated: ConditioningSource,
    reference_ids: Tensor,
    view_ids: Tensor,
    latents: Tensor,
    timestep: int,
    guidance_scale: float,
) -> Tensor:
    """Guided noise (n * G, 4, h, w) of n batches."""
    batches, num_references = reference_ids.shape
    ref = references.index(reference_ids.flatten())
    gen = generated.index(view_ids.flatten())
    device = gen.pos_enc.device

    def joined(of_references: Tensor, of_views: Tensor) -> Tensor:
        """Puts references before views in every batch."""
        parts = [of_references.to(of_views), of_views]
        return torch.cat([part.unflatten(0, (batches, -1)) for part in parts], dim=1)

    conditioning = FrameConditioning(
        joined(ref.pos_enc, gen.pos_enc),
        joined(ref.z_input, gen.z_input),
        joined(ref.ref_mask, gen.ref_mask),
    )
    current = latents[view_ids.flatten().to(latents.device)].to(device)
    frames = joined(ref.z_input.to(current), current)
    if guidance_scale == 1:
        times = torch.full(frames.shape[:2], timestep, dtype=torch.int64, device=device)
        return denoiser(frames, times, conditioning)[:, num_references:].flatten(0, 1)
    pair = FrameConditioning.cat([conditioning.unconditional(), conditioning])
    frames = torch.cat([frames, frames])
    times = torch.full(frames.shape[:2], timestep, dtype=torch.int64, device=device)
    eps = denoiser(frames, times, pair)[:, num_references:]
    without, with_conditions = eps[:batches].float(), eps[batches:].float()
    return (without + guidance_scale * (with_conditions - without)).flatten(0, 1)
