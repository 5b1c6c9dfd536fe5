"""Mouth interior: half-spheres behind the lips that stand for the upper and lower teeth.

Conventions: head space (+y up, +z out of the face), metres. Vertex id = 20 * row + column; row 0 is
the pole (20 equal points), column 19 equals column 0.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GRID = 20
_ROWS = _GRID // 2
NUM_MOUTH_VERTICES = _ROWS * _GRID
# The vertex of the lower lip's centre in the head model's topology.
LOWER_LIP_VERTEX = 3533
# Size and place relative to the distance from jaw joint to lip, and an offset in metres.
_RADIUS = 0.25
_POSITION = 0.75
_SETBACK_M = 0.005


def half_sphere() -> NDArray[np.float64]:
    """(200, 3) points of the unit half-sphere around the pole -z, latitude by latitude."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, _GRID)[:_ROWS, None]
    longitude = np.linspace(0, 2 * np.pi, _GRID)[None]
    points = np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude) + 0 * longitude,
        ],
        axis=-1,
    )
    return points.reshape(-1, 3)


def half_sphere_faces() -> NDArray[np.int64]:
    """(340, 3) triangles of `half_sphere`; the last column is joined to the first."""
    faces = []
    for row in range(_ROWS - 1):
        for column in range(_GRID):
            following = (column + 1) % _GRID
            here, below = row * _GRID, (row + 1) * _GRID
            faces.append([here + column, below + following, below + column])
            if row > 0:
                faces.append([here + column, here + following, below + following])
    return np.array(faces, np.int64)


# Cached, because a copy from the host would stop the GPU, and cannot be recorded in a graph.
@functools.cache
def _unit_points(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`half_sphere` turned half about x, so that the pole points to +z."""
    return torch.as_tensor(half_sphere() * [1.0, -1.0, -1.0], dtype=dtype, device=device)


def rotate_about(points: Tensor, pivot: Tensor, rotation: Tensor) -> Tensor:
    """Points (..., N, 3) turned by matrices (..., 3, 3) about pivots (..., 3)."""
    pivot = pivot.unsqueeze(-2)
    return (points - pivot) @ rotation.transpose(-1, -2) + pivot


def place_mouth(jaw: Tensor, lip: Tensor) -> Tensor:
    """Half-sphere between jaw joint and lip, bulging towards the lip.

    Args:
        jaw: (..., 3) jaw joint of the neutral head.
        lip: (..., 3) centre of its lower lip.

    Returns:
        (..., 200, 3) points.
    """
    offset = lip - jaw
    length = offset.norm(dim=-1, keepdim=True)
    axis_z = offset / length
    nought = torch.zeros_like(length)
    up = torch.cat([nought, torch.ones_like(length), nought], dim=-1)
    axis_x = torch.nn.functional.normalize(torch.linalg.cross(up, axis_z), dim=-1)
    axis_y = torch.nn.functional.normalize(torch.linalg.cross(axis_z, axis_x), dim=-1)
    axes = torch.stack([axis_x, axis_y, axis_z], dim=-2)
    points = _unit_points(jaw.dtype, jaw.device) @ axes
    center = jaw + _POSITION * offset - _SETBACK_M * axis_z
    return _RADIUS * length[..., None, :] * points + center[..., None, :]
