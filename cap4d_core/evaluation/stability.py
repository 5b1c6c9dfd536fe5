"""Stability over time of the renders of films, and of their truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.evaluation.rendering import camera_runs
from cap4d_core.evaluation.surface import SurfaceColors, SurfacePoints, sample_surface
from cap4d_core.evaluation.surface import surface_colors as read_surface_colors
from cap4d_core.evaluation.temporal import measure_stability
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.template import load_flame_template

if TYPE_CHECKING:
    from cap4d_core.flame.model import HeadModel

Array = NDArray[np.float64]
NUM_POINTS = 4000


def films_stability(
    head_model: HeadModel,
    views: Sequence[ViewParameters],
    renders: Sequence[Tensor],
    truths: Sequence[Tensor] | None,
    landmarks: Sequence[Array | None],
    true_landmarks: Sequence[Array | None] | None = None,
) -> dict[str, Any]:
    """Stability of all films among the views: means over the films, weighted by their length.

    Args:
        head_model: loaded from a folder, on the device to compute on.
        views: with frame numbers.
        renders: (H, H, 3) in 0..1 each.
        truths: true pictures, None = none.
        landmarks: of the renders, pixels of the crop.
        true_landmarks: of the true pictures.

    Returns:
        `avatar` and, with truths, `truth`: see `Stability`; pixels are those of the whole picture
        at the scale of the crops. num_frames, num_films.
    """
    assert head_model.folder is not None  # models of the workflow come from a folder
    points = sample_surface(load_flame_template(head_model.folder), num_points=NUM_POINTS)
    films = camera_runs(views)
    found: dict[str, list[tuple[int, dict[str, float]]]] = {"avatar": [], "truth": []}
    for film in films:
        of_film = [views[i] for i in film]
        placed = _steady(of_film, [landmarks[i] for i in film], len(renders[film[0]]))
        true = None
        if truths is not None and true_landmarks is not None:
            true = _steady(of_film, [true_landmarks[i] for i in film], len(renders[film[0]]))
            surface = _surface(head_model, of_film, [truths[i] for i in film], points)
            found["truth"].append((len(film), measure_stability(true, surface).to_dict()))
        surface = _surface(head_model, of_film, [renders[i] for i in film], points)
        found["avatar"].append((len(film), measure_stability(placed, surface, true).to_dict()))
    return {
        "num_films": len(films),
        "num_frames": sum(len(film) for film in films),
        **{name: _weighted(entries) for name, entries in found.items() if entries},
    }


def _surface(
    head_model: HeadModel,
    views: Sequence[ViewParameters],
    images: Sequence[Tensor],
    points: SurfacePoints,
) -> SurfaceColors:
    return read_surface_colors(head_model, views, torch.stack(list(images)), points)


def _steady(
    views: Sequence[ViewParameters], landmarks: Sequence[Array | None], size: int
) -> list[Array | None]:
    """Landmarks in one frame for all views: crops move with the head, and in whole pixels.

    Pixels keep about the size of those of the crops: the scale is that of the film's first crop.
    """
    unit = (views[0].crop_box[2] - views[0].crop_box[0]) / size
    placed: list[Array | None] = []
    for view, points in zip(views, landmarks, strict=True):
        if points is None:
            placed.append(None)
            continue
        x0, y0, x1, _ = view.crop_box
        placed.append((points * ((x1 - x0) / size) + [x0, y0]) / unit)
    return placed


def _weighted(entries: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    names = dict.fromkeys(name for _, figures in entries for name in figures)
    result = {}
    for name in names:
        pairs = [(weight, figures[name]) for weight, figures in entries if name in figures]
        total = sum(weight for weight, _ in pairs)
        result[name] = sum(weight * value for weight, value in pairs) / total
    return result
