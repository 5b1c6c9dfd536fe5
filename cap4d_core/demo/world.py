"""Writes the demo: head model, a subject's photos and fit, held-out truth, a driving sequence.

Conventions: see `cap4d_core.files.tracking`. One still camera looks at a head that turns. The light
turns with the head (see `subject`), so a head turned by R before a still camera is the same picture
as a camera that goes round a still head, and the renderings of all directions agree on one head-
fixed appearance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.demo import expressions
from cap4d_core.demo.capture import (
    DISTANCE,
    PIVOT,
    focal_length,
    head_poses,
    held_out_fit,
    make_fit,
    reference_fit,
    view_directions,
)
from cap4d_core.demo.family import render_fit, views_of
from cap4d_core.demo.head import write_demo_head
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import make_subject
from cap4d_core.files.image_set import write_view_parameters
from cap4d_core.files.images import to_uint8, write_image
from cap4d_core.files.tracking import (
    Tracking,
    Trajectory,
    write_fit,
    write_reference_list,
    write_trajectory,
)
from cap4d_core.geometry.cameras import pivot_camera, static_extrinsics
from cap4d_core.geometry.rotations import rodrigues
from cap4d_core.progress import Progress, ProgressCallback

__all__ = [
    "contact_sheet",
    "held_out_fit",
    "reference_fit",
    "view_directions",
    "write_demo_crops",
    "write_demo_driving",
    "write_demo_head",
    "write_demo_held_out",
    "write_demo_subject",
]

Array = NDArray[np.float64]


def write_demo_subject(
    folder: str | Path,
    seed: int,
    *,
    num_references: int = 64,
    resolution: int = 160,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> Tracking:
    """Write a demo subject's tracked photos.

    `images/cam0/%08d.png`, mattes `bg/cam0/%04d.png` (255 = foreground), `fit.npz` (exact), and
    `reference_images.json` naming every frame. Edge pixels of the photos hold the subject's own
    colour (not mixed with the white background), so compositing with the matte is exact.

    Args:
        folder: where to; created.
        seed: subject number.
        num_references: photos.
        resolution: side of the square photos in pixels; the head's crop is about 0.8 of it.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in photos.

    Returns:
        The fit.
    """
    root = Path(folder)
    fit = reference_fit(seed, num_references, resolution)
    renderer = SubjectRenderer(make_subject(seed), device)
    out = renderer.render(views_of(fit), (resolution, resolution), supersample=supersample)
    rgb, matte = out.rgb.cpu().numpy(), out.matte.cpu().numpy()
    for i in range(num_references):
        write_image(root / "images" / "cam0" / f"{i:08d}.png", to_uint8(rgb[i]))
        write_image(root / "bg" / "cam0" / f"{i:04d}.png", to_uint8(matte[i]))
        if callback is not None:
            callback(Progress(i + 1, num_references, "photo"))
    write_fit(root / "fit.npz", fit)
    write_reference_list(
        root / "reference_images.json", [("cam0", i) for i in range(num_references)]
    )
    return fit


def write_demo_held_out(
    folder: str | Path,
    seed: int,
    *,
    num_views: int = 16,
    resolution: int = 160,
    crop_size: int = 128,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> Tracking:
    """Write unseen views of a demo subject as an image set with mattes.

    `images/%05d.png` (square crops over white), `mattes/%05d.png`, `flame/%05d.npz`. Directions are
    at least 10 degrees away from every reference of `write_demo_subject`, expressions are others.

    Args:
        folder: where to; created.
        seed: subject number.
        num_views: pictures.
        resolution: side of the uncropped photo the parameters refer to.
        crop_size: side of the pictures.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in pictures.

    Returns:
        The fit of all views.
    """
    fit = held_out_fit(seed, num_views, resolution)
    write_demo_crops(
        folder,
        seed,
        fit,
        crop_size=crop_size,
        supersample=supersample,
        device=device,
        callback=callback,
    )
    return fit


def write_demo_crops(
    folder: str | Path,
    seed: int,
    fit: Tracking,
    *,
    crop_size: int = 128,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Write head crops of a demo subject in the poses of a fit, as an image set with mattes.

    `images/%05d.png` (over white), `mattes/%05d.png`, `flame/%05d.npz`. Crops are rendered with the
    crop's own camera, not resampled.

    Args:
        folder: where to; created.
        seed: subject number.
        fit: poses, expressions and one still camera, as `reference_fit` and `held_out_fit` make.
        crop_size: side of the pictures.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in pictures.
    """
    root = Path(folder)
    renderer = SubjectRenderer(make_subject(seed), device)
    views = render_fit(renderer, fit, size=crop_size, supersample=supersample, batch=16).to("cpu")
    for i, parameters in enumerate(views.parameters()):
        write_image(root / "images" / f"{i:05d}.png", views.rgb[i].numpy())
        write_image(root / "mattes" / f"{i:05d}.png", views.matte[i].numpy())
        write_view_parameters(root / "flame" / f"{i:05d}.npz", parameters)
        if callback is not None:
            callback(Progress(i + 1, fit.num_frames, "picture"))


def write_demo_driving(
    folder: str | Path,
    *,
    num_frames: int = 48,
    fps: float = 24.0,
    resolution: int = 160,
    seed: int = 3,
) -> Tracking:
    """Write a driving sequence: somebody talks, blinks, looks around and turns the head.

    `fit.npz` (another person's coefficients: shape zero) and `orbit.npz`, a camera path around the
    head.

    Args:
        folder: where to; created.
        num_frames: length.
        fps: frames per second.
        resolution: side of the square picture.
        seed: of the performance.

    Returns:
        The fit.
    """
    root = Path(folder)
    expr, eye, rot = expressions.talking(num_frames, fps, seed)
    turn = rodrigues(torch.as_tensor(rot)).numpy()
    tra = np.array([0.0, 0.0, -DISTANCE]) - np.einsum("tij,j->ti", turn, PIVOT)
    fit = make_fit(np.zeros(150), expr, eye, rot, tra, resolution, fps)
    write_fit(root / "fit.npz", fit)
    phase = 2 * np.pi * np.arange(num_frames) / num_frames
    target = np.array([0.0, 0.0, DISTANCE])
    yaw, pitch = 38.0 * np.sin(phase), 11.0 * (1 - np.cos(phase)) / 2 * np.sin(phase + 0.6)
    extr = pivot_camera(static_extrinsics(fit.extr[0], num_frames), target, yaw, pitch)
    f = np.full(num_frames, focal_length(resolution))
    c = np.full(num_frames, resolution / 2)
    write_trajectory(
        root / "orbit.npz",
        Trajectory(extr=extr, fx=f, fy=f, cx=c, cy=c, resolution=(resolution, resolution), fps=fps),
    )
    return fit


def contact_sheet(
    seeds: Sequence[int], size: int = 160, columns: int = 8, device: str = "cpu"
) -> NDArray[np.uint8]:
    """One picture of each subject, with a direction and an expression of their own, in rows."""
    tiles = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 13])
        expr, eye = expressions.sample_expressions(1, rng)
        expr[:, expressions.BLINK] = 0.0
        yaw, pitch = rng.uniform(-32, 32, 1), rng.uniform(-7, 7, 1)
        rot, tra = head_poses(yaw, pitch, np.zeros(1), np.zeros((1, 3)))
        fit = make_fit(make_subject(seed).shape, 0.6 * expr, 0.5 * eye, rot, tra, size, None)
        renderer = SubjectRenderer(make_subject(seed), device)
        out = renderer.render(views_of(fit), (size, size), supersample=3)
        tiles.append(
            to_uint8((out.rgb * out.matte[..., None] + 1 - out.matte[..., None])[0].cpu().numpy())
        )
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)
