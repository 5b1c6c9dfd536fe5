"""Local coordinate frames of triangles, to which splats are bound (Qian et al. 2024).

A face (v0, v1, v2) has axes e0 along v0->v1, e1 = its normal, e2 = -(e1 x e0); scale = mean of base
and height in metres; centre = mean of the corners. Rotations have the axes as columns (det +1);
quaternions are (w, x, y, z).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cap4d_core.geometry.rotations import matrix_to_quaternion


@dataclass
class FaceFrames:
    """Frames of F faces in B meshes.

    rotation (B, F, 3, 3); scale (B, F, 1) metres; centre (B, F, 3); quaternion (B, F, 4) wxyz,
    computed when first asked for.
    """

    rotation: Tensor
    scale: Tensor
    centre: Tensor

    @cached_property
    def quaternion(self) -> Tensor:
        """(B, F, 4) wxyz."""
        return matrix_to_quaternion(self.rotation)


def _unit(vectors: Tensor) -> Tensor:
    # The floor keeps zero-area faces finite (published value).
    return vectors / vectors.square().sum(-1, keepdim=True).clamp(min=1e-20).sqrt()


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of tables (B, V, C).

    The gradient of an embedding is several times faster on the CPU than that of index_select, and
    does not depend on the order of threads on CUDA.
    """
    batch, _, channels = table.shape
    if batch == 1:
        return F.embedding(index, table[0])[None]
    flat = table.transpose(0, 1).reshape(-1, batch * channels)
    rows = F.embedding(index, flat)
    return rows.view(-1, batch, channels).transpose(0, 1)


def face_frames(vertices: Tensor, faces: Tensor) -> FaceFrames:
    """Frames of all faces.

    Args:
        vertices: (B, V, 3) metres.
        faces: (F, 3) int64.
    """
    batch = vertices.shape[0]
    corners = gather_rows(vertices, faces.reshape(-1)).reshape(batch, -1, 3, 3)
    v0, v1, v2 = corners.unbind(2)
    base, side = v1 - v0, v2 - v0
    e0 = _unit(base)
    e1 = _unit(torch.linalg.cross(e0, side))
    e2 = -_unit(torch.linalg.cross(e1, e0))
    rotation = torch.stack([e0, e1, e2], dim=-1)
    length = base.square().sum(-1, keepdim=True).clamp(min=1e-20).sqrt()
    height = (e2 * side).sum(-1, keepdim=True).abs()
    return FaceFrames(
        rotation=rotation,
        scale=(length + height) / 2,
        centre=corners.mean(dim=2),
    )


def squared_rotation_angle(rotation: Tensor) -> Tensor:
    """Squared angle of rotation matrices (..., 3, 3), with a finite gradient at the identity.

    angle^2 = sin^2 (angle/sin)^2; the factor is a constant to first order at zero.
    """
    m = rotation
    axis = torch.stack(
        [
            m[..., 2, 1] - m[..., 1, 2],
            m[..., 0, 2] - m[..., 2, 0],
            m[..., 1, 0] - m[..., 0, 1],
        ],
        dim=-1,
    )
    sin_squared = axis.square().sum(-1) / 4
    cos = (m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2] - 1) / 2
    small = (sin_squared < 1e-8) & (cos > 0)
    # Both branches of a `where` are differentiated: keep the unused one away from its pole.
    sin = torch.where(small, torch.ones_like(sin_squared), sin_squared).clamp(min=1e-20).sqrt()
    angle = torch.atan2(sin, torch.where(small, torch.ones_like(cos), cos))
    series = sin_squared * (1 + sin_squared / 3)
    return torch.where(small, series, angle.square())
