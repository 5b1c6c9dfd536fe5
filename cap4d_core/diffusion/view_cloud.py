"""Where planned views look from: angles about the head, and cameras on them.

Conventions: OpenCV world (head space with y, z negated); extr world-to-camera; the head turns about
`tra`. Yaw and pitch are degrees about the camera's y and x axis, applied as Ry(yaw) Rx(pitch).
Angles of a camera "off the front": where it stands, seen from the head.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cap4d_core.geometry.cameras import invert_rigid
from cap4d_core.geometry.rotations import rodrigues

Float64Array = NDArray[np.float64]
FLIP = np.array([1.0, -1.0, -1.0])


class UniformSource(Protocol):
    """Random numbers: numpy's Generator, or RandomState for the published stream."""

    def uniform(self, low: float, high: float) -> Any:
        """One draw in [low, high)."""
        ...


def head_rotation(rot: ArrayLike) -> Float64Array:
    """(3, 3) rotation of the head, head-space axes."""
    vector = torch.as_tensor(np.asarray(rot, np.float64).reshape(3))
    return np.asarray(rodrigues(vector), np.float64)


def pivot_of(tra: ArrayLike) -> Float64Array:
    """(3,) point that cameras turn about, OpenCV world."""
    return np.asarray(tra, np.float64).reshape(3) * FLIP


def draw_angles(source: UniformSource, yaw_range: float, pitch_range: float) -> tuple[float, float]:
    """Uniform point of the ellipse with these half axes: (yaw, pitch); nothing drawn if flat."""
    if yaw_range == 0 or pitch_range == 0:
        return 0.0, 0.0
    while True:
        yaw = float(source.uniform(-yaw_range, yaw_range))
        pitch = float(source.uniform(-pitch_range, pitch_range))
        if (yaw / yaw_range) ** 2 + (pitch / pitch_range) ** 2 < 1:
            return yaw, pitch


def published_head_direction(rot: ArrayLike) -> Float64Array:
    """The published direction into the head, head-space axes: its inverse rotation by a slip.

    Only right for heads that are not turned; kept for parity.
    """
    return -head_rotation(rot)[2]


def published_yaw_pitch(direction_cv: ArrayLike, extr: NDArray[Any]) -> tuple[float, float]:
    """Published yaw and pitch of an OpenCV direction, with extr transposed by a slip."""
    h = np.asarray(direction_cv, np.float64).reshape(3)
    d = np.asarray(extr)[:3, :3].T @ (h / np.linalg.norm(h))
    return math.degrees(math.atan2(d[0], d[2])), math.degrees(math.asin(-np.clip(d[1], -1, 1)))


def published_centre(rot: ArrayLike, extr: NDArray[Any]) -> tuple[float, float]:
    """Offsets added to drawn angles in the published planning.

    Pitch is centred on the face, yaw is not: a head turned by an angle moves the cloud by twice
    that angle off its front.
    """
    yaw, pitch = published_yaw_pitch(published_head_direction(rot) * FLIP, extr)
    return yaw, -pitch


def frontal_centre(rot: ArrayLike, tra: ArrayLike, extr: NDArray[Any]) -> tuple[float, float]:
    """Yaw and pitch that bring a camera in front of the face.

    Exact for any head rotation and also for heads off the picture's centre: after turning the
    camera about the head, the line from camera to pivot is the head's backward direction.
    """
    rotation, translation = np.asarray(extr, np.float64)[:3, :3], np.asarray(extr)[:3, 3]
    to_pivot = rotation @ pivot_of(tra) + translation
    to_pivot = to_pivot / np.linalg.norm(to_pivot)
    # Into the face: minus the head's third axis.
    wanted = rotation @ (-head_rotation(rot)[:, 2] * FLIP)
    # Ry(yaw) Rx(pitch) to_pivot = wanted: the y component gives pitch, then x and z give yaw.
    in_plane = math.hypot(to_pivot[1], to_pivot[2])
    sine = np.clip(wanted[1] / in_plane, -1.0, 1.0)
    pitch = math.atan2(to_pivot[1], to_pivot[2]) - math.asin(sine)
    depth = to_pivot[1] * math.sin(pitch) + to_pivot[2] * math.cos(pitch)
    yaw = math.atan2(wanted[0], wanted[2]) - math.atan2(to_pivot[0], depth)
    wrapped = (yaw + math.pi) % (2 * math.pi) - math.pi
    return math.degrees(wrapped), math.degrees(pitch)


def camera_directions(rot: ArrayLike, tra: ArrayLike, extr: NDArray[Any]) -> Float64Array:
    """(n, 3) unit vectors from head to cameras (n, 4, 4), in the head's own axes (z = front)."""
    positions = invert_rigid(np.asarray(extr))[:, :3, 3]
    offsets = (positions - pivot_of(tra)) * FLIP
    local = offsets @ head_rotation(rot)
    return np.asarray(local / np.linalg.norm(local, axis=-1, keepdims=True))


def angle_off_front(rot: ArrayLike, tra: ArrayLike, extr: NDArray[Any]) -> float:
    """Degrees between the head's front and one camera (4, 4)."""
    return math.degrees(math.acos(np.clip(camera_directions(rot, tra, extr[None])[0, 2], -1, 1)))
