"""Stability over time: known trembling, known flicker, films among views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cap4d_core.evaluation.rendering import camera_runs, choose_views
from cap4d_core.evaluation.stability import films_stability
from cap4d_core.evaluation.surface import SurfaceColors
from cap4d_core.evaluation.temporal import (
    acceleration_error,
    color_flicker,
    landmark_jitter,
    warping_error,
)
from cap4d_core.files.image_set import ImageSetItem
from tests.core.sampling_fixtures import head
from tests.core.test_consistency import SIZE, _painted, _view


def _moving(frames: int) -> list[np.ndarray]:
    """Landmarks that move steadily."""
    start = np.random.default_rng(0).uniform(0, 100, (478, 2))
    return [start + np.array([2.0 * t, -1.0 * t]) for t in range(frames)]


def test_steady_motion_does_not_tremble() -> None:
    steady = _moving(9)
    assert landmark_jitter(list(steady)) == pytest.approx(0, abs=1e-9)
    # One pixel to and fro: second differences of 4 pixels.
    trembling = [points + np.array([(-1) ** t, 0.0]) for t, points in enumerate(steady)]
    assert landmark_jitter(list(trembling)) == pytest.approx(4)
    assert acceleration_error(list(trembling), list(steady)) == pytest.approx(4)
    assert acceleration_error(list(trembling), list(trembling)) == 0
    # A true acceleration is no error, though it counts as jitter.
    falling = [points + np.array([0.0, 0.5 * t * t]) for t, points in enumerate(steady)]
    assert landmark_jitter(list(falling)) == pytest.approx(1)
    assert acceleration_error(list(falling), list(falling)) == 0


def test_missing_frames_leave_out_their_neighbours_only() -> None:
    steady = _moving(9)
    trembling = [points + np.array([(-1) ** t, 0.0]) for t, points in enumerate(steady)]
    assert landmark_jitter([*trembling[:4], None, *trembling[5:]]) == pytest.approx(4)
    assert landmark_jitter([steady[0], None, steady[2], None]) is None
    assert acceleration_error(list(steady), [None] * 9) is None


def test_flicker_of_surface_colours() -> None:
    colors = torch.full((6, 50, 3), 0.5) + torch.linspace(0, 0.1, 6)[:, None, None]
    visible = torch.ones(6, 50, dtype=torch.bool)
    steady = SurfaceColors(colors, visible)
    assert color_flicker(steady) == pytest.approx(0, abs=1e-4)
    assert warping_error(steady) == pytest.approx(0.02**2, rel=1e-4)
    flicker = torch.tensor([0.01, -0.01]).repeat(3)[:, None, None]
    assert color_flicker(SurfaceColors(colors + flicker, visible)) == pytest.approx(255 * 0.04)
    hidden = visible.clone()
    hidden[::2] = False
    assert color_flicker(SurfaceColors(colors, hidden)) is None
    assert warping_error(SurfaceColors(colors, hidden)) is None


def test_films_are_found_among_views() -> None:
    def positions(all_items: list[ImageSetItem], some: list[ImageSetItem]) -> list[int]:
        return [next(i for i, item in enumerate(all_items) if item is one) for one in some]

    other = np.eye(4, dtype=np.float32)
    other[0, 3] = 0.1
    numbers = [3, 4, 5, 9, 10, 7]
    views = [replace(_view(0), timestep_id=n) for n in numbers]
    views += [replace(_view(0), extr=other, timestep_id=n) for n in (4, 5, 6, 7)]
    views += [_view(0)]
    assert camera_runs(views) == [[0, 1, 2], [6, 7, 8, 9]]
    items = [ImageSetItem(None, view) for view in views]  # type: ignore[arg-type]
    chosen = choose_views(items, 6)
    assert positions(items, chosen) == [0, 1, 2, 6, 7, 8]
    scattered = [ImageSetItem(None, replace(_view(i), timestep_id=2 * i)) for i in range(9)]  # type: ignore[arg-type]
    assert positions(scattered, choose_views(scattered, 3)) == [0, 4, 8]
    assert positions(scattered, choose_views(scattered, 9)) == list(range(9))


def test_stability_of_a_film_does_not_see_the_crops_move() -> None:
    views = [replace(_view(3.0 * t), timestep_id=t) for t in range(5)]
    # The same film, cropped one pixel further to the right in every second frame.
    moved = [
        replace(view, crop_box=(10 + t % 2, 0, 110 + t % 2, 100)) for t, view in enumerate(views)
    ]
    assert SIZE == 64
    scale = SIZE / 100
    start = np.random.default_rng(1).uniform(20, 40, (478, 2))
    places = [start + np.array([t, 0]) for t in range(5)]
    shifted = [points - np.array([scale * (t % 2), 0]) for t, points in enumerate(places)]
    truth, film = list(_painted(views)), list(_painted(moved))
    figures = films_stability(head(), moved, film, truth, list(shifted), list(places))
    assert figures["num_films"] == 1 and figures["num_frames"] == 5
    avatar = figures["avatar"]
    assert avatar["landmark_jitter"] == pytest.approx(0, abs=1e-9)
    assert avatar["color_flicker"] < 1.5
    noisy = [picture + 0.1 * torch.rand_like(picture) for picture in film]
    worse = films_stability(head(), moved, noisy, None, list(shifted))["avatar"]
    assert worse["color_flicker"] > 5 * avatar["color_flicker"]
    assert "acceleration_error" not in worse
