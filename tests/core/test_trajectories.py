"""Pairing driving frames with cameras."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from cap4d_core.animation.trajectories import (
    drive,
    drive_with,
    resize_cameras,
    with_even_size,
)
from cap4d_core.files.tracking import Tracking, Trajectory
from cap4d_core.geometry.rotations import rodrigues
from cap4d_core.settings import AnimationSettings

FLIP = np.diag([1.0, -1.0, -1.0])


def _poses(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    extr = np.tile(np.eye(4), (count, 1, 1))
    extr[:, :3, :3] = rodrigues(torch.from_numpy(rng.normal(size=(count, 3)) * 0.3)).numpy()
    extr[:, :3, 3] = rng.normal(size=(count, 3)) * 0.1 + [0, 0, 1.0]
    return extr.astype(np.float32)


def _tracking(frames: int = 5, fps: float | None = 25.0) -> Tracking:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    return Tracking(
        shape=normal(150), expr=normal(frames, 65), rot=normal(frames, 3), tra=normal(frames, 3),
        eye_rot=normal(frames, 3), neck_rot=normal(frames, 3),
        fx=np.array([[300.0], [1.0]], np.float32), fy=np.array([[310.0], [1.0]], np.float32),
        cx=np.array([[50.0], [1.0]], np.float32), cy=np.array([[60.0], [1.0]], np.float32),
        extr=_poses(2, 7), resolutions=np.array([[121, 99], [1, 1]]), camera_order=("a", "b"),
        fps=fps,
    )  # fmt: skip


def _trajectory(cameras: int, fps: float | None = 30.0) -> Trajectory:
    steps = np.arange(cameras, dtype=np.float32)
    return Trajectory(
        extr=_poses(cameras, 3), fx=400 + steps, fy=410 + steps, cx=60 + steps, cy=70 + steps,
        resolution=(140, 120), fps=fps,
    )  # fmt: skip


def _project(points: np.ndarray, extr: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    camera = points @ extr[:3, :3].T + extr[:3, 3]
    pixels = camera @ intrinsics.T
    return pixels[:, :2] / pixels[:, 2:]


@pytest.mark.parametrize("with_trajectory", [False, True])
def test_moving_the_camera_shows_what_moving_the_head_shows(with_trajectory: bool) -> None:
    tracking = _tracking()
    trajectory = _trajectory(5) if with_trajectory else None
    sequence = drive(tracking, trajectory)
    head = np.random.default_rng(1).normal(size=(20, 3)) * 0.1
    for t in range(5):
        rotation = rodrigues(torch.from_numpy(tracking.rot[t].astype(float))).numpy()
        world = (head @ rotation.T + tracking.tra[t]) @ FLIP
        source = trajectory.extr[t] if trajectory else tracking.extr[0]
        expected = _project(world, source.astype(float), sequence.intrinsics[t])
        fixed = _project(head @ FLIP, sequence.extr[t], sequence.intrinsics[t])
        # Points may lie near the camera plane: relative to their size.
        np.testing.assert_allclose(fixed, expected, rtol=1e-4, atol=1e-3)


def test_without_trajectory_camera_0_is_repeated() -> None:
    sequence = drive(_tracking())
    assert (sequence.height, sequence.width) == (121, 99)
    np.testing.assert_array_equal(
        sequence.intrinsics, np.tile([[300, 0, 50], [0, 310, 60], [0, 0, 1]], (5, 1, 1))
    )


def test_trajectory_gives_cameras_and_size() -> None:
    trajectory = _trajectory(9)
    sequence = drive(_tracking(), trajectory)
    assert (sequence.num_frames, sequence.height, sequence.width) == (5, 140, 120)
    np.testing.assert_array_equal(sequence.intrinsics[:, 0, 0], trajectory.fx[:5])
    static = drive(_tracking(), trajectory, camera="static")
    np.testing.assert_array_equal(static.extr, drive(_tracking()).extr)


def test_fps_comes_from_setting_then_trajectory_then_fit_then_24() -> None:
    assert drive(_tracking(fps=25), _trajectory(5, 30), fps=12).fps == 12
    assert drive(_tracking(fps=25), _trajectory(5, 30)).fps == 30
    assert drive(_tracking(fps=25), _trajectory(5, None)).fps == 25
    assert drive(_tracking(fps=25)).fps == 25
    assert drive(_tracking(fps=None)).fps == 24
    assert drive(_tracking(fps=25), fps=12).num_frames == 5  # never resampled


def test_short_trajectories_hold_or_loop(caplog: pytest.LogCaptureFixture) -> None:
    trajectory = _trajectory(2)
    with caplog.at_level(logging.WARNING):
        held = drive(_tracking(), trajectory)
    assert "2 cameras for 5 driving frames: holding" in caplog.text
    np.testing.assert_array_equal(held.intrinsics[:, 0, 0], [400, 401, 401, 401, 401])
    looped = drive(_tracking(), trajectory, short_trajectory="loop")
    np.testing.assert_array_equal(looped.intrinsics[:, 0, 0], [400, 401, 400, 401, 400])


def test_orbit_keeps_the_first_head_position_in_place() -> None:
    tracking = _tracking(40)
    still = replace(tracking, rot=np.zeros((40, 3)), tra=np.tile(tracking.tra[:1], (40, 1)))
    sequence = drive(still, camera="orbit", fps=10)
    origin = np.zeros((1, 3))
    places = [_project(origin, e, sequence.intrinsics[0])[0] for e in sequence.extr]
    np.testing.assert_allclose(places, np.tile(places[0], (40, 1)), atol=0.01)
    centres = -np.einsum("tji,tj->ti", sequence.extr[:, :3, :3], sequence.extr[:, :3, 3])
    distances = np.linalg.norm(centres, axis=1)
    np.testing.assert_allclose(distances, distances[0], rtol=1e-5)
    # Half a period apart the yaw is +55 and -55 degrees, the pitch 0.
    cosine = centres[0] @ centres[-1] / distances[0] ** 2
    assert np.degrees(np.arccos(cosine)) > 105


def test_resizing_scales_pixels_of_every_point() -> None:
    sequence = drive(_tracking(), _trajectory(5))
    small = resize_cameras(sequence, 70)
    assert (small.height, small.width) == (70, 60)
    points = np.random.default_rng(5).normal(size=(9, 3)) * 0.1
    full = _project(points, sequence.extr[2], sequence.intrinsics[2])
    half = _project(points, small.extr[2], small.intrinsics[2])
    np.testing.assert_allclose(half, full / 2, rtol=1e-5)
    assert resize_cameras(sequence, None) is sequence


def test_even_sizes_only_add_pixels() -> None:
    sequence = drive(_tracking())
    even = with_even_size(sequence)
    assert (even.height, even.width) == (122, 100)
    np.testing.assert_array_equal(even.intrinsics, sequence.intrinsics)


@pytest.mark.parametrize("resolution", [None, 57, 64])
def test_settings_give_even_videos(resolution: int | None) -> None:
    settings = AnimationSettings(resolution=resolution, fps=10)
    sequence = drive_with(_tracking(), None, settings)
    assert sequence.height % 2 == 0 and sequence.width % 2 == 0
    assert sequence.fps == 10
