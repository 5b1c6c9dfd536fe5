"""True pictures of a demo person who performs a driving sequence (rule make_demo_performance)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from cap4d_core.demo.family import render_fit
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import make_subject
from cap4d_core.files.image_set import write_view_parameters
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import Tracking
from cap4d_core.progress import Progress, ProgressCallback


def write_demo_performance(
    folder: str | Path,
    seed: int,
    driving: Tracking,
    *,
    max_frames: int = 100,
    crop_size: int = 128,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Renders the first frames as an image set with mattes; `timestep_id` is the frame.

    Args:
        folder: where to; emptied first.
        seed: subject number.
        driving: poses, expressions and gaze, seen by the first camera; the identity is the
            subject's own.
        max_frames: so many frames from the beginning.
        crop_size: side of the pictures.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in pictures.
    """
    root = Path(folder)
    shutil.rmtree(root, ignore_errors=True)
    subject = make_subject(seed)
    fit = replace(
        driving.frames(0, max_frames),
        shape=subject.shape.astype(np.float32),
        fx=driving.fx[:1], fy=driving.fy[:1], cx=driving.cx[:1], cy=driving.cy[:1],
        extr=driving.extr[:1], resolutions=driving.resolutions[:1],
        camera_order=driving.camera_order[:1],
    )  # fmt: skip
    views = render_fit(
        SubjectRenderer(subject, device), fit, size=crop_size, supersample=supersample
    )
    rgb, mattes = views.rgb.cpu().numpy(), views.matte.cpu().numpy()
    for i, view in enumerate(views.parameters()):
        write_image(root / "images" / f"{i:05d}.png", rgb[i])
        write_image(root / "mattes" / f"{i:05d}.png", mattes[i])
        write_view_parameters(root / "flame" / f"{i:05d}.npz", replace(view, timestep_id=i))
        if callback is not None:
            callback(Progress(i + 1, len(views), "picture"))
