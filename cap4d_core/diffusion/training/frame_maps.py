"""Conditioning of many frames at once, on a device, for training.

The same numbers as `ConditioningRenderer` makes view by view, in batches and without copies to the
host. Conventions: see `frames`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning import RendererTables, conditioning_maps
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import flip_head_opencv
from cap4d_core.geometry.rotations import rodrigues

# Reference, crop and ray channels come last and are filled in per batch.
NUM_BATCH_CHANNELS = 5


@dataclass(frozen=True)
class ViewBatch:
    """Parameters of n views on one device, as in `ViewParameters` with a leading axis.

    shape (n, 150); expr (n, 65); rot, tra, eye_rot (n, 3); fx, fy, cx, cy (n,); extr (n, 4, 4);
    resolution (n, 2) height, width; crop_box (n, 4).
    """

    shape: Tensor
    expr: Tensor
    rot: Tensor
    tra: Tensor
    eye_rot: Tensor
    fx: Tensor
    fy: Tensor
    cx: Tensor
    cy: Tensor
    extr: Tensor
    resolution: Tensor
    crop_box: Tensor

    @classmethod
    def of(cls, views: Sequence[ViewParameters], device: torch.device | str) -> ViewBatch:
        """Stacks views."""

        def stacked(name: str) -> Tensor:
            values = np.stack([np.asarray(getattr(view, name), np.float32) for view in views])
            return torch.from_numpy(values).to(device)

        return cls(**{name: stacked(name) for name in cls.__dataclass_fields__})


def frames_of(
    views: ViewBatch,
    images: Tensor | None,
    starts: Tensor,
    head: HeadModel,
    tables: RendererTables,
    config: MMDMConfig,
) -> FrameTable:
    """The table of these views.

    Args:
        views: n views, those of a subject together.
        images: (n, 3, H, W) uint8 crops.
        starts: (S + 1,) first view of every subject, and n.
        head: head model with the mouth, on the device of `views`.
        tables: constant tables, there too.
        config: sizes.
    """
    size = config.latent_size
    with torch.no_grad():
        output = head(views.shape, views.expr, views.rot, views.tra, eye_rot=views.eye_rot)
        corners = _in_crops(output.vertices, views)
        n = len(corners)
        blank = corners.new_zeros(n, size, size)
        maps = conditioning_maps(
            corners,
            output.offsets,
            corners.new_zeros(n, 3, size, size),
            blank,
            blank,
            tables,
            config.conditioning,
        )
    box = views.crop_box.double()
    scale = size / (box[:, 2] - box[:, 0])
    intrinsics = torch.stack(
        [
            views.fx.double() * scale,
            views.fy.double() * scale,
            (views.cx.double() - box[:, 0]) * scale,
            (views.cy.double() - box[:, 1]) * scale,
        ],
        dim=-1,
    )
    flip = torch.diag(views.rot.new_tensor([1.0, -1.0, -1.0]))
    return FrameTable(
        surface=maps[..., :-NUM_BATCH_CHANNELS].to(torch.float16),
        crop_masks=crop_masks(views, size),
        intrinsics=intrinsics.float(),
        cameras=views.extr[:, :3, :3].float(),
        heads=(flip @ rodrigues(views.rot) @ flip).float(),
        starts=starts.cpu(),
        images=images,
    )


def crop_masks(views: ViewBatch, size: int) -> Tensor:
    """(n, size, size) uint8, 1 where a crop shows the image: `frames.crop_mask`, batched.

    Crops are averaged down, so a pixel counts from half its area on. For crops smaller than `size`,
    where the original interpolates instead, edges may differ by a pixel.
    """
    low, high = views.crop_box[:, :2].double(), views.crop_box[:, 2:].double()
    limits = views.resolution.flip(-1).double()
    edges = torch.arange(size + 1, device=low.device, dtype=torch.float64) / size
    at = low[..., None] + (high - low)[..., None] * edges  # (n, xy, size + 1)
    inside = torch.minimum(at.clamp(min=0.0), limits[..., None]).diff(dim=-1).clamp(min=0.0)
    share = inside / ((high - low)[..., None] / size)
    return (share[:, 1, :, None] * share[:, 0, None, :]).round().to(torch.uint8)


def _in_crops(vertices: Tensor, views: ViewBatch) -> Tensor:
    """(n, V, 3) rasterizer coordinates of each view's crop."""
    extr = views.extr
    camera = flip_head_opencv(vertices) @ extr[:, :3, :3].transpose(1, 2) + extr[:, None, :3, 3]
    x, y, z = camera.unbind(-1)
    fx, fy, cx, cy = (v[:, None] for v in (views.fx, views.fy, views.cx, views.cy))
    x0, y0, x1, y1 = (v[:, None].to(x) for v in views.crop_box.unbind(-1))
    depth = z / z.mean(1, keepdim=True) * ((fx + fy) / 2)
    left = -((x / z * fx + cx - x0) / (x1 - x0) * 2 - 1)
    up = -((y / z * fy + cy - y0) / (y1 - y0) * 2 - 1)
    return torch.stack([left, up, depth], -1)
