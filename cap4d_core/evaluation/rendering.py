"""What is compared: renders of an avatar, true pictures with their mattes, directions of views.

Frames: head-fixed OpenCV axes, see `cap4d_core.files.tracking`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.avatar.renderer import Backend, render_gaussians
from cap4d_core.errors import InputFileError
from cap4d_core.evaluation.metrics import dilated_mask
from cap4d_core.files.image_set import ImageSetItem, ViewParameters
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.geometry.cameras import head_to_origin, intrinsics_matrix
from cap4d_core.geometry.crops import crop_intrinsics

if TYPE_CHECKING:
    from cap4d_core.avatar.gaussians import GaussianAvatar

logger = logging.getLogger(__name__)


def viewing_direction(view: ViewParameters) -> NDArray[np.float64]:
    """Unit vector (3,) from the head to the camera, head-fixed OpenCV axes."""
    camera = head_fixed_camera(view).numpy()
    centre = -camera[:3, :3].T @ camera[:3, 3]
    return centre / np.linalg.norm(centre)


def head_fixed_camera(view: ViewParameters) -> Tensor:
    """(4, 4) float64 world-to-camera of a view, for a head at the origin."""
    extr, rot, tra = (
        torch.as_tensor(value, dtype=torch.float64) for value in (view.extr, view.rot, view.tra)
    )
    return head_to_origin(extr, rot, tra)


def render_view(
    avatar: GaussianAvatar,
    view: ViewParameters,
    size: int,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    renderer: Backend = "auto",
) -> Tensor:
    """Renders the avatar as (size, size, 3) in 0..1 with the camera and expression of a view."""
    device = next(avatar.parameters()).device
    focal_center = crop_intrinsics(view.fx, view.fy, view.cx, view.cy, view.crop_box, size)
    intrinsics = intrinsics_matrix(*(torch.tensor([value]) for value in focal_center))

    def row(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)[None]

    with torch.no_grad():
        posed = avatar.pose(row(view.expr), row(view.eye_rot))
        rendered = render_gaussians(
            posed.means,
            posed.quats,
            posed.scales,
            posed.opacities,
            posed.sh,
            row(head_fixed_camera(view)),
            intrinsics.float().to(device),
            size,
            size,
            sh_degree=int(avatar.active_sh_degree),
            background=background,
            backend=renderer,
        )
    return rendered.image[0].clamp(0, 1)


def read_truth(
    item: ImageSetItem, dilation: int, background: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """True picture (H, H, 3) in 0..1 over the background, and the mask (H, H) to compare in.

    Raises:
        InputFileError: no square picture, or a matte of another size or without foreground.
    """
    image = read_rgb(item.image)
    if image.shape[0] != image.shape[1]:
        raise InputFileError(item.image, f"{image.shape[1]} x {image.shape[0]} pixels", "a square")
    truth = torch.from_numpy(image.astype(np.float32) / 255)
    if item.matte is None:
        logger.warning("%s has no matte: the whole image is compared.", item.image)
        return truth, torch.ones(truth.shape[:2], dtype=torch.bool)
    matte = read_grey(item.matte)
    if matte.shape != image.shape[:2]:
        raise InputFileError(
            item.matte, f"{matte.shape[1]} x {matte.shape[0]} pixels", "the size of its image"
        )
    if not matte.any():
        raise InputFileError(item.matte, "no foreground", "255 where the head is")
    # Soft edges already hold the background of the picture; only pure background is replaced.
    foreground = torch.from_numpy(matte > 0)[..., None]
    truth = torch.where(foreground, truth, torch.tensor(background))
    return truth, torch.from_numpy(dilated_mask(matte, dilation))


def camera_runs(views: Sequence[ViewParameters]) -> list[list[int]]:
    """Positions of views that are consecutive frames of one camera, runs of at least 3.

    Views without frame number belong to no run.
    """
    cameras: dict[tuple[bytes, tuple[float, ...]], list[int]] = {}
    for i, view in enumerate(views):
        if view.timestep_id is not None:
            key = (np.asarray(view.extr).tobytes(), (view.fx, view.fy, view.cx, view.cy))
            cameras.setdefault(key, []).append(i)
    found = []
    for positions in cameras.values():
        ordered = sorted(positions, key=lambda i: views[i].timestep_id or 0)
        numbers = np.array([views[i].timestep_id for i in ordered], np.int64)
        for part in np.split(np.array(ordered), np.flatnonzero(np.diff(numbers) != 1) + 1):
            if len(part) >= 3:
                found.append([int(i) for i in part])
    return found


def choose_views(items: Sequence[ImageSetItem], limit: int) -> list[ImageSetItem]:
    """At most `limit` views: the first ones of every film in it, else evenly spread ones."""
    if len(items) <= limit:
        return list(items)
    films = camera_runs([item.parameters for item in items])
    if films:
        share = max(3, limit // len(films))
        chosen = [i for film in films for i in film[:share]][:limit]
    else:
        chosen = np.linspace(0, len(items) - 1, limit).round().astype(int).tolist()
    logger.info("%d of %d views are compared.", len(chosen), len(items))
    return [items[i] for i in sorted(chosen)]
