"""The denoiser as training calls it: tensors in, tensor out, which compiles without breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.training.batches import TrainingBatch
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.training.trainer import LossFunction, LossTerms


class DenoiserPass(nn.Module):
    """Calls a denoiser with plain tensors."""

    def __init__(self, denoiser: MMDMDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, latents: Tensor, timesteps: Tensor, pos_enc: Tensor, z_input: Tensor, mask: Tensor
    ) -> Tensor:
        """Predicted noise, see `MMDMDenoiser.forward`."""
        conditioning = {"pos_enc": pos_enc, "z_input": z_input, "ref_mask": mask}
        predicted: Tensor = self.denoiser(latents, timesteps, conditioning)
        return predicted


class Draws(Protocol):
    """What gives batches by number: `BatchSource` or `Prefetcher`."""

    def draw(self, number: int, batch_size: int) -> TrainingBatch:
        """The batch."""


def denoiser_loss(
    source: Draws, objective: DenoisingLoss, batch_size: int, device: torch.device
) -> LossFunction:
    """Loss on the batches of a source, moved to the device of training."""

    def loss(network: Callable[..., Any], number: int) -> LossTerms:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            batch = source.draw(number, batch_size).to(device)

        def denoise(latents: Tensor, times: Tensor, c: FrameConditioning) -> Tensor:
            predicted: Tensor = network(latents, times, c.pos_enc, c.z_input, c.ref_mask)
            return predicted

        return {"loss": objective(denoise, batch)}

    return loss


def initialise(denoiser: MMDMDenoiser) -> None:
    """Start from scratch: branches and the output begin at zero, as in Stable Diffusion.

    The conditioning starts at zero too only where weights are taken over (`start_weights`); here it
    keeps its random start.
    """
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            is_last = any(part in name for part in (".conv2.", "conv_out.", ".proj_out."))
            if is_last:
                parameter.zero_()
