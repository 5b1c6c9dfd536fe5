"""Pinhole cameras and camera paths.

Conventions:
    head space: +x to the viewer's right when the face looks at the viewer, +y up, +z out of the
        face.
    OpenCV space: y and z negated (F = diag(1, -1, -1)).
    extr: (4, 4) world-to-camera, both in OpenCV axes; the camera looks along +z, y points down.
    Intrinsics fx, fy, cx, cy in pixels; lengths in metres; yaw and pitch in degrees.
Tensors keep dtype and device. Camera paths are computed in float64 with numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cap4d_core.geometry.rotations import rodrigues

Float64Array = NDArray[np.float64]

# Camera path of video input: swing of the view around the head, and seconds per period.
ORBIT_YAW_DEG = 55.0
ORBIT_PITCH_DEG = 20.0
ORBIT_PERIOD_S = 8.0


def flip_head_opencv(points: Tensor) -> Tensor:
    """Head space to OpenCV space and back: (..., 3) with y and z negated."""
    return points * points.new_tensor([1.0, -1.0, -1.0])


def project(
    vertices: Tensor, fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor, extr: Tensor
) -> Tensor:
    """Projects head-space points of T frames into C cameras.

    Args:
        vertices: (T, V, 3) posed points in head-space axes.
        fx: (C, 1) or (C,) focal length in pixels, horizontal.
        fy: likewise, vertical.
        cx: likewise, principal point.
        cy: likewise.
        extr: (C, 4, 4) world-to-camera.

    Returns:
        (C, T, V, 3): u, v in pixels; third the depth divided by the mean depth over all V points of
        its camera and frame, times (fx + fy) / 2 - only its order matters.
    """
    rotation, translation = extr[:, None, :3, :3], extr[:, None, None, :3, 3]
    fx, fy, cx, cy = (value.reshape(-1, 1, 1) for value in (fx, fy, cx, cy))
    return _projected(vertices[None], fx, fy, cx, cy, rotation, translation)


def project_each(
    vertices: Tensor, fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor, extr: Tensor
) -> Tensor:
    """As `project`, frame i into camera i: (n, V, 3) points, n cameras, (n, V, 3) result."""
    rotation, translation = extr[:, :3, :3], extr[:, None, :3, 3]
    fx, fy, cx, cy = (value.reshape(-1, 1) for value in (fx, fy, cx, cy))
    return _projected(vertices, fx, fy, cx, cy, rotation, translation)


def _projected(
    vertices: Tensor,
    fx: Tensor,
    fy: Tensor,
    cx: Tensor,
    cy: Tensor,
    rotation: Tensor,
    translation: Tensor,
) -> Tensor:
    camera = flip_head_opencv(vertices) @ rotation.transpose(-1, -2) + translation
    x, y, z = camera.unbind(-1)
    depth = z / z.mean(-1, keepdim=True) * ((fx + fy) / 2)
    return torch.stack([x / z * fx + cx, y / z * fy + cy, depth], dim=-1)


def intrinsics_matrix(fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """(..., 3, 3) camera matrices of intrinsics of equal shape (...)."""
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = [fx, zero, cx, zero, fy, cy, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def head_to_origin(extr: Tensor, rot: Tensor, tra: Tensor) -> Tensor:
    """Camera that sees the head, moved to the origin, as `extr` sees the posed head.

    new = extr F [R(rot) tra] F. The camera moves instead of the head, so that colours that depend
    on the view act as light fixed to the head.

    Args:
        extr: (..., 4, 4) world-to-camera.
        rot: (..., 3) head rotation vector.
        tra: (..., 3) head translation in metres, head-space axes.

    Returns:
        (..., 4, 4) world-to-camera for a head with rot = tra = 0.
    """
    rotation = rodrigues(rot)
    pose = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=extr.dtype, device=extr.device)
    pose[..., :3, :3] = rotation
    pose[..., :3, 3] = tra
    pose[..., 3, 3] = 1.0
    flip = torch.diag(extr.new_tensor([1.0, -1.0, -1.0, 1.0]))
    return extr @ (flip @ pose @ flip)


def yaw_pitch_matrix(yaw_deg: ArrayLike, pitch_deg: ArrayLike) -> Float64Array:
    """Ry(yaw) Rx(pitch), (..., 3, 3), angles in degrees."""
    yaw, pitch = np.broadcast_arrays(
        np.deg2rad(np.asarray(yaw_deg, np.float64)), np.deg2rad(np.asarray(pitch_deg, np.float64))
    )
    sin_y, cos_y, sin_p, cos_p = np.sin(yaw), np.cos(yaw), np.sin(pitch), np.cos(pitch)
    zero = np.zeros_like(sin_y)
    rows = [
        np.stack([cos_y, sin_y * sin_p, sin_y * cos_p], axis=-1),
        np.stack([zero, cos_p, -sin_p], axis=-1),
        np.stack([-sin_y, cos_y * sin_p, cos_y * cos_p], axis=-1),
    ]
    return np.stack(rows, axis=-2)


def invert_rigid(transform: NDArray[Any]) -> Float64Array:
    """Inverse of rigid (..., 4, 4) transforms, in float64."""
    rotation = np.asarray(transform, np.float64)[..., :3, :3]
    translation = np.asarray(transform, np.float64)[..., :3, 3]
    inverse = np.zeros((*rotation.shape[:-2], 4, 4))
    transposed = np.swapaxes(rotation, -1, -2)
    inverse[..., :3, :3] = transposed
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", transposed, translation)
    inverse[..., 3, 3] = 1.0
    return inverse


def pivot_camera(
    extr: NDArray[Any], target: ArrayLike, yaw_deg: ArrayLike, pitch_deg: ArrayLike
) -> Float64Array:
    """Turns a camera about a point, so that the point keeps its place in the picture.

    With camera-to-world rotation Rc, position t and D = Ry(yaw) Rx(pitch):
    Rc' = Rc D, t' = target + Rc D Rc^T (t - target).

    Args:
        extr: (..., 4, 4) world-to-camera.
        target: (..., 3) pivot in OpenCV world axes (for a head: F tra).
        yaw_deg: (...) angle about the camera's y axis.
        pitch_deg: (...) angle about the camera's x axis.

    Returns:
        (..., 4, 4) world-to-camera, float64.
    """
    camera_to_world = np.linalg.inv(np.asarray(extr, np.float64))
    pivot = np.asarray(target, np.float64)
    delta = yaw_pitch_matrix(yaw_deg, pitch_deg)
    rotation, position = camera_to_world[..., :3, :3], camera_to_world[..., :3, 3]
    turned = rotation @ delta
    moved = turned @ np.linalg.inv(rotation)
    new_position = pivot + np.einsum("...ij,...j->...i", moved, position - pivot)
    result = np.zeros((*turned.shape[:-2], 4, 4))
    result[..., :3, :3] = turned
    result[..., :3, 3] = new_position
    result[..., 3, 3] = 1.0
    inverse: Float64Array = np.linalg.inv(result)
    return inverse


def look_at(position: ArrayLike, target: ArrayLike, up: ArrayLike = (0, -1, 0)) -> Float64Array:
    """World-to-camera transform of a camera at `position` that looks at `target`.

    Args:
        position: (..., 3), OpenCV world axes.
        target: (..., 3).
        up: (..., 3) world direction that appears upwards; y points down in OpenCV axes.

    Returns:
        (..., 4, 4).

    Raises:
        ValueError: position and target coincide, or the view direction is parallel to `up`.
    """
    position, target, up = np.broadcast_arrays(
        np.asarray(position, np.float64), np.asarray(target, np.float64), np.asarray(up, np.float64)
    )
    forward = target - position
    right = np.cross(forward, up)
    lengths = np.linalg.norm(forward, axis=-1), np.linalg.norm(right, axis=-1)
    if min(float(length.min()) for length in lengths) < 1e-12:
        raise ValueError("look_at: no unique camera (target at the camera, or view along 'up')")
    forward = forward / lengths[0][..., None]
    right = right / lengths[1][..., None]
    down = np.cross(forward, right)
    extr = np.zeros((*forward.shape[:-1], 4, 4))
    extr[..., :3, :3] = np.stack([right, down, forward], axis=-2)
    extr[..., :3, 3] = -np.einsum("...ij,...j->...i", extr[..., :3, :3], position)
    extr[..., 3, 3] = 1.0
    return extr


def static_extrinsics(extr: NDArray[Any], num_frames: int) -> Float64Array:
    """One camera repeated, (num_frames, 4, 4)."""
    return np.repeat(np.asarray(extr, np.float64)[None], num_frames, axis=0)


def orbit_angles(num_frames: int, fps: float) -> Float64Array:
    """(num_frames, 2) yaw and pitch in degrees of the orbit of `orbit_extrinsics`."""
    phase = 2 * np.pi * np.arange(num_frames) / fps / ORBIT_PERIOD_S
    return np.stack([ORBIT_YAW_DEG * np.cos(phase), ORBIT_PITCH_DEG * np.sin(phase)], axis=-1)


def orbit_extrinsics(
    extr: NDArray[Any], tra: ArrayLike, num_frames: int, fps: float
) -> Float64Array:
    """Camera path that swings around a head on an ellipse of 55 by 20 degrees in 8 s.

    Args:
        extr: (4, 4) world-to-camera of the recording camera.
        tra: (3,) head translation (head-space axes), the point to turn about.
        num_frames: length of the path.
        fps: frames per second.

    Returns:
        (num_frames, 4, 4) world-to-camera.
    """
    target = np.asarray(tra, np.float64) * [1.0, -1.0, -1.0]
    angles = orbit_angles(num_frames, fps)
    return pivot_camera(static_extrinsics(extr, num_frames), target, angles[:, 0], angles[:, 1])
