"""Drawing of training samples: V views of a subject, the first R of them references.

Draws come from generators seeded by (seed, rank, number of the batch), so a resumed run sees what
the interrupted one would have seen, without saved random states. Everything runs on the device of
the table; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.seeding import derived_seed
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.errors import UserError


@dataclass(frozen=True)
class TrainingBatch:
    """b samples of V views, references first.

    clean (b, V, C, h, w) scaled latents to be predicted; conditioning with axes (b, V);
    timesteps (b, V) int64, one per sample; noise like `clean`.
    """

    clean: Tensor
    conditioning: FrameConditioning
    timesteps: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Same batch on a device."""
        return TrainingBatch(
            self.clean.to(device, non_blocking=True),
            self.conditioning.to(device),
            self.timesteps.to(device, non_blocking=True),
            self.noise.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class DrawSettings:
    """How samples are drawn.

    Attributes:
        reference_weights: relative frequency of 1, 2, ... references.
        dropout: share of samples in the unconditional form of classifier-free guidance.
        frontal_first: share of samples whose first reference is the most frontal view drawn.
        turned_cameras: share of frames that count as seen by a camera that went round the head
            instead of a head that turned; 0 unless the light is fixed to the head.
    """

    reference_weights: Sequence[float]
    dropout: float = 0.1
    frontal_first: float = 0.0
    turned_cameras: float = 0.0


class BatchSource:
    """Draws batches from a table with latents.

    Args:
        table: frames with `means` and `stds`.
        config: the model's.
        settings: how to draw.
        seed: of all draws.
        rank: of this process among several.

    Raises:
        UserError: a subject with a single frame, or more references than views allow.
    """

    def __init__(
        self,
        table: FrameTable,
        config: MMDMConfig,
        settings: DrawSettings,
        seed: int,
        rank: int = 0,
    ) -> None:
        if table.means is None or table.stds is None:
            raise ValueError("the table holds no latents; encode it first")
        counts = table.counts()
        if not len(counts) or int(counts.min()) < 2:
            raise UserError("Training needs at least one subject, and two frames of every subject.")
        if not 1 <= len(settings.reference_weights) < config.views_per_call:
            raise UserError(
                f"{len(settings.reference_weights)} reference weights for calls of "
                f"{config.views_per_call} views: at least one view must be generated."
            )
        self.table, self.config, self.settings = table, config, settings
        self.seed, self.rank = seed, rank
        self.device = table.surface.device
        self.starts = table.starts[:-1].to(self.device)
        self.counts = counts.to(self.device)
        self.longest = int(counts.max())
        weights = torch.tensor(list(settings.reference_weights), dtype=torch.float64)
        self.cumulative = (weights.cumsum(0) / weights.sum()).float().to(self.device)
        self.latent_shape = (config.in_channels, config.latent_size, config.latent_size)

    def draw(self, number: int, batch_size: int) -> TrainingBatch:
        """Batch `number` of this rank."""
        device, views = self.device, self.config.views_per_call
        key = derived_seed("batch", self.seed, self.rank, number) % 2**63
        generator = torch.Generator(device).manual_seed(key)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        subject = (uniform(batch_size) * len(self.counts)).long().clamp(max=len(self.counts) - 1)
        counts = self.counts[subject][:, None]
        # Random order of a subject's frames; too few frames start over.
        width = max(self.longest, views)
        keys = uniform(batch_size, width)
        column = torch.arange(width, device=device)
        keys = keys + torch.div(column, counts, rounding_mode="floor")
        chosen = keys.argsort(1)[:, :views] % counts
        frames = self.starts[subject][:, None] + chosen
        frames = self._most_frontal_first(frames, uniform(batch_size))

        references = 1 + torch.bucketize(uniform(batch_size), self.cumulative[:-1], right=True)
        is_reference = torch.arange(views, device=device) < references[:, None]
        is_dropped = uniform(batch_size) < self.settings.dropout
        steps = self.config.schedule.num_train_timesteps
        times = (uniform(batch_size) * steps).long().clamp(max=steps - 1)
        turned = uniform(batch_size, views) < self.settings.turned_cameras
        shape = (batch_size, views, *self.latent_shape)
        posterior = torch.randn(shape, generator=generator, device=device)
        noise = torch.randn(shape, generator=generator, device=device)

        assert self.table.means is not None and self.table.stds is not None
        scale = self.config.autoencoder.scaling_factor
        clean = self.table.means[frames].float() * scale
        # References are samples of the posterior, as when sampling; targets are its mean.
        sampled = clean + self.table.stds[frames].float() * posterior * scale
        mask = is_reference.float()[..., None, None, None]
        mask = mask.expand(-1, -1, 1, *self.latent_shape[1:])
        kept = (~is_dropped).float()[:, None, None, None, None]
        conditioning = FrameConditioning(
            batch_maps(self.table, frames, is_reference, turned) * kept, sampled * mask * kept, mask
        )
        return TrainingBatch(clean, conditioning, times[:, None].expand(-1, views), noise)

    def _most_frontal_first(self, frames: Tensor, draws: Tensor) -> Tensor:
        if self.settings.frontal_first <= 0:
            return frames
        best = self._facing(frames).argmax(1, keepdim=True)
        swapped = frames.clone()
        swapped[:, :1] = frames.gather(1, best)
        swapped.scatter_(1, best, frames[:, :1])
        return torch.where((draws < self.settings.frontal_first)[:, None], swapped, frames)

    def _facing(self, frames: Tensor) -> Tensor:
        """Cosine between the front of the head and the direction to its camera."""
        cameras, heads = self.table.cameras[frames], self.table.heads[frames]
        return (cameras[..., 2, :] * heads[..., :, 2]).sum(-1)


def batch_maps(
    table: FrameTable, frames: Tensor, is_reference: Tensor, is_turned: Tensor
) -> Tensor:
    """Conditioning maps of samples, rays in the axes of each sample's first frame.

    Args:
        table: frames.
        frames: (b, V) into the table.
        is_reference: (b, V) bool.
        is_turned: (b, V) bool: described as if the camera had gone round a head that stayed as in
            the first frame.

    Returns:
        (b, V, h, w, C) float32.
    """
    surface = table.surface[frames].float()
    index = torch.arange(surface.shape[-2], device=surface.device, dtype=torch.float32)
    fx, fy, cx, cy = table.intrinsics[frames][..., None, None].unbind(2)
    x, y = torch.broadcast_tensors((index - cx) / fx, (index[:, None] - cy) / fy)
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    rays = rays / (rays.norm(dim=-1, keepdim=True) + 1e-8)
    cameras, heads = table.cameras[frames], table.heads[frames]
    around = cameras @ heads @ heads[:, :1].transpose(-1, -2)
    turned = torch.where(is_turned[..., None, None], around, cameras)
    rotation = cameras[:, :1] @ turned.transpose(-1, -2)
    rays = (rays.flatten(2, 3) @ rotation.transpose(-1, -2)).unflatten(2, x.shape[-2:])
    reference = is_reference[..., None, None].expand(surface.shape[:-1])
    # Generated crops are complete wherever they lie.
    shown = torch.where(reference, table.crop_masks[frames], 1)
    both = torch.stack([reference.float(), shown.float()], -1)
    return torch.cat([surface, rays, both], -1)
