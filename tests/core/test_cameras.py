"""Projection, moving the camera instead of the head, camera paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cap4d_core.geometry.cameras import (
    head_to_origin,
    intrinsics_matrix,
    invert_rigid,
    look_at,
    orbit_angles,
    orbit_extrinsics,
    pivot_camera,
    project,
    static_extrinsics,
    yaw_pitch_matrix,
)
from cap4d_core.geometry.rotations import rodrigues

FLIP = np.diag([1.0, -1.0, -1.0])


def _camera(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    extr = np.eye(4)
    extr[:3, :3] = Rotation.from_rotvec(generator.normal(size=3) * 0.2).as_matrix()
    extr[:3, 3] = [0.05, -0.02, 1.3]
    return extr


def test_projection_agrees_with_the_camera_matrix() -> None:
    generator = np.random.default_rng(0)
    vertices = generator.normal(size=(3, 50, 3)) * 0.1
    extr = np.stack([_camera(1), _camera(2)])
    fx, fy, cx, cy = (np.array([[a], [b]]) for a, b in ((900, 700), (880, 710), (99, 5), (70, 9)))
    result = project(
        *(torch.from_numpy(np.asarray(a, np.float64)) for a in (vertices, fx, fy, cx, cy, extr))
    ).numpy()
    assert result.shape == (2, 3, 50, 3)
    for camera in range(2):
        k = np.array(
            [[fx[camera, 0], 0, cx[camera, 0]], [0, fy[camera, 0], cy[camera, 0]], [0, 0, 1]]
        )
        for frame in range(3):
            points = (extr[camera, :3, :3] @ FLIP @ vertices[frame].T).T + extr[camera, :3, 3]
            pixels = (k @ points.T).T
            assert np.allclose(
                result[camera, frame, :, :2], pixels[:, :2] / pixels[:, 2:], atol=1e-9
            )
            depth = points[:, 2] / points[:, 2].mean() * (k[0, 0] + k[1, 1]) / 2
            assert np.allclose(result[camera, frame, :, 2], depth)


def test_intrinsics_matrix() -> None:
    k = intrinsics_matrix(*torch.tensor([2.0, 3.0, 4.0, 5.0]))
    assert k.tolist() == [[2, 0, 4], [0, 3, 5], [0, 0, 1]]


def test_moving_the_camera_equals_moving_the_head() -> None:
    torch.manual_seed(0)
    vertices = torch.randn(40, 3, dtype=torch.float64) * 0.1
    rot = torch.tensor([0.2, -0.7, 0.1], dtype=torch.float64)
    tra = torch.tensor([0.1, 0.05, -0.2], dtype=torch.float64)
    extr = torch.from_numpy(_camera(3))
    one = torch.ones(1, 1, dtype=torch.float64)
    posed = vertices @ rodrigues(rot).T + tra
    expected = project(posed[None], 900 * one, 900 * one, one, one, extr[None])
    moved = head_to_origin(extr, rot, tra)
    result = project(vertices[None], 900 * one, 900 * one, one, one, moved[None])
    assert torch.allclose(result, expected, atol=1e-8)
    many = head_to_origin(extr.expand(5, 4, 4), rot.expand(5, 3), tra.expand(5, 3))
    assert torch.allclose(many[4], moved, atol=1e-14)


def test_pivot_keeps_the_target_in_place_and_the_distance() -> None:
    extr, target = _camera(4), np.array([0.1, 0.2, 0.3])
    turned = pivot_camera(np.repeat(extr[None], 7, 0), target, np.linspace(-50, 50, 7), 12.0)
    before = extr[:3, :3] @ target + extr[:3, 3]
    after = turned[:, :3, :3] @ target + turned[:, :3, 3]
    assert np.allclose(after, before, atol=1e-12)
    assert np.allclose(pivot_camera(extr, target, 0.0, 0.0), extr, atol=1e-12)
    # D is applied in the camera's own axes.
    delta = extr[:3, :3] @ np.linalg.inv(turned[0])[:3, :3]
    assert np.allclose(delta, yaw_pitch_matrix(-50.0, 12.0), atol=1e-12)


def test_yaw_pitch_matrix_is_intrinsic_yx() -> None:
    expected = Rotation.from_euler("YX", [33.0, -12.0], degrees=True).as_matrix()
    assert np.allclose(yaw_pitch_matrix(33.0, -12.0), expected)


def test_invert_rigid() -> None:
    extr = np.stack([_camera(5), _camera(6)])
    assert np.allclose(invert_rigid(extr) @ extr, np.eye(4), atol=1e-12)


def test_look_at_centres_the_target_with_up_upwards() -> None:
    extr = look_at([0.3, -0.1, -2.0], [0.1, 0.0, 0.5])
    target = extr[:3, :3] @ [0.1, 0.0, 0.5] + extr[:3, 3]
    assert np.allclose(target[:2], 0.0) and target[2] > 0
    assert np.linalg.det(extr[:3, :3]) == pytest.approx(1.0)
    assert (extr[:3, :3] @ [0, -1, 0])[1] < 0  # world up points up in the picture
    with pytest.raises(ValueError, match="no unique camera"):
        look_at([0, 0, 0], [0, 1, 0])


def test_orbit_closes_and_stays_in_its_ellipse() -> None:
    angles = orbit_angles(241, 30.0)
    assert np.allclose(angles[240], angles[0])
    assert np.allclose((angles[:, 0] / 55) ** 2 + (angles[:, 1] / 20) ** 2, 1.0)
    extr, tra = _camera(7), np.array([0.02, 0.01, -0.1])
    path = orbit_extrinsics(extr, tra, 10, 24.0)
    seen = path[:, :3, :3] @ (FLIP @ tra) + path[:, :3, 3]
    assert np.allclose(seen, seen[0])
    assert np.array_equal(static_extrinsics(extr, 3)[2], extr)
