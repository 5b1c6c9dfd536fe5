"""Views sampled from a model in training, and how close they come to the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.grouping import SeededGrouping
from cap4d_core.diffusion.sampler import Denoiser, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.seeding import derived_normal
from cap4d_core.diffusion.training.batches import batch_maps
from cap4d_core.diffusion.training.frame_table import FrameTable

# Pixels around the matte that still count.
DILATION = 5


@dataclass(frozen=True)
class ViewTask:
    """Frames of one table: given references and views to make.

    Attributes:
        table: with images and latents.
        mattes: (N, H, W) uint8.
        references: frames that are given; the first is the base.
        generated: frames to make, a multiple of V minus the number of references.
    """

    table: FrameTable
    mattes: Tensor
    references: Sequence[int]
    generated: Sequence[int]


def conditioning_of(
    task: ViewTask, scale: float, turned: bool = True
) -> tuple[FrameConditioning, FrameConditioning]:
    """Conditioning of the references and of the views.

    Args:
        task: frames.
        scale: of the latents.
        turned: views are described as if the camera had gone round the head, as when sampling;
            false = as they were taken, where the light does not turn with the head.
    """
    table, count = task.table, len(task.references)
    device = table.surface.device
    frames = torch.tensor([[*task.references, *task.generated]], device=device)
    is_reference = (torch.arange(frames.shape[1], device=device) < count)[None]
    is_turned = ~is_reference if turned else torch.zeros_like(is_reference)
    maps = batch_maps(table, frames, is_reference, is_turned)[0]
    assert table.means is not None
    clean = table.means[frames[0]].float() * scale
    mask = is_reference[0].float()[:, None, None, None].expand_as(clean[:, :1])
    both = FrameConditioning(maps, clean * mask, mask)
    return both.index(slice(0, count)), both.index(slice(count, None))


@torch.no_grad()
def sample_task(
    task: ViewTask,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    schedule: NoiseSchedule,
    views_per_call: int,
    num_steps: int,
    guidance_scale: float,
    batches_per_call: int = 4,
    turned: bool = True,
) -> Tensor:
    """The views of a task from noise, (n, 3, H, W) in 0..1."""
    references, generated = conditioning_of(task, autoencoder.config.scaling_factor, turned)
    count = len(task.references)
    shape = tuple(generated.z_input.shape)
    latents = sample_stochastic_io(
        denoiser,
        schedule,
        references,
        generated,
        num_steps,
        guidance_scale,
        views_per_call,
        count,
        derived_normal(shape, "training samples").to(generated.z_input.device),
        SeededGrouping(count, len(generated), count, views_per_call - count, ("samples",)),
        batches_per_call=batches_per_call,
    )
    return (autoencoder.decode(latents, 32) / 2 + 0.5).clamp(0, 1)


def truth_of(task: ViewTask, frames: Sequence[int]) -> Tensor:
    """(n, 3, H, W) pictures of frames in 0..1."""
    assert task.table.images is not None
    return task.table.images[list(frames)].float() / 255.0


def matte_psnr(made: Tensor, truth: Tensor, mattes: Tensor) -> Tensor:
    """(n,) PSNR in dB inside the mattes, dilated by `DILATION` pixels.

    Args:
        made: (n, 3, H, W) in 0..1.
        truth: likewise.
        mattes: (n, H, W) uint8; from 1 on counts as subject.
    """
    inside = (mattes > 0).float()[:, None]
    inside = F.max_pool2d(inside, 2 * DILATION + 1, 1, DILATION)
    squared = ((made - truth).square() * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
    return -10.0 * squared.clamp(min=1e-12).log10()


def nearest_reference(task: ViewTask) -> list[int]:
    """For every view of a task the reference whose direction is closest."""
    table = task.table
    facing = table.cameras @ table.heads
    # Direction to the camera in the axes of the head: third row of the relative rotation.
    directions = facing[:, 2]
    gen, ref = directions[list(task.generated)], directions[list(task.references)]
    return [int(task.references[int(i)]) for i in (gen @ ref.T).argmax(1)]


def angles_to_references(table: FrameTable, references: Sequence[int]) -> Tensor:
    """(N,) degrees between every frame's viewing direction and the closest reference's."""
    directions = (table.cameras @ table.heads)[:, 2]
    cosine = (directions @ directions[list(references)].T).amax(1)
    return cosine.clamp(-1, 1).acos().rad2deg()
