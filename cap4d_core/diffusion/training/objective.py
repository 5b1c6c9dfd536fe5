"""Loss of the multi-view denoiser: squared error of the noise found in generated views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training.batches import TrainingBatch

Denoise = Callable[[Tensor, Tensor, FrameConditioning], Tensor]


# Nearly pure noise says nothing about its picture: without a bound its errors would drown the rest.
LARGEST_WEIGHT = 100.0


class DenoisingLoss(nn.Module):
    """Noises a batch and measures how well the noise is found.

    Args:
        schedule: noise schedule.
        weighting: 'none', or 'min_snr': weights min(snr, gamma) / snr, which level the errors that
            the same error of the clean latents causes (Hang et al. 2023, for noise prediction).
        gamma: see above.
        floor: min_snr: the ratio in the weights is at least this, weights stay below
            `LARGEST_WEIGHT`.
    """

    signal: Tensor
    noise: Tensor
    weights: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        weighting: Literal["none", "min_snr"] = "none",
        gamma: float = 5.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("signal", torch.from_numpy(schedule.sqrt_alphas_cumprod))
        self.register_buffer("noise", torch.from_numpy(schedule.sqrt_one_minus_alphas_cumprod))
        snr = torch.from_numpy(schedule.alphas_cumprod_f64 / (1.0 - schedule.alphas_cumprod_f64))
        weights = torch.ones_like(snr)
        if weighting == "min_snr":
            weights = (snr.clamp(floor, gamma) / snr).clamp(max=LARGEST_WEIGHT)
        self.register_buffer("weights", weights.float())

    def noised(self, batch: TrainingBatch) -> Tensor:
        """(b, V, C, h, w) latents at the batch's timesteps."""
        index = batch.timesteps[..., None, None, None]
        return self.signal[index] * batch.clean + self.noise[index] * batch.noise

    def forward(self, denoise: Denoise, batch: TrainingBatch) -> Tensor:
        """Mean over generated views of the weighted squared error; a scalar."""
        predicted = denoise(self.noised(batch), batch.timesteps, batch.conditioning)
        errors = (predicted.float() - batch.noise).square()
        generated = 1.0 - batch.conditioning.ref_mask
        per_view = (errors * generated).mean((2, 3, 4)) * self.weights[batch.timesteps]
        return per_view.sum() / generated[..., 0, 0, 0].sum()
