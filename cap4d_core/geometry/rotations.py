"""Rotations: vectors, matrices, quaternions.

Conventions:
    Rotation vectors are axis * angle in radians. Matrices act on column vectors, R @ x.
    Quaternions are (w, x, y, z), w the real part. All functions take any leading dimensions, keep
    dtype and device, and are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(vector: Tensor) -> Tensor:
    """Matrices of the cross product with (..., 3) vectors: `skew(a) @ b` is a x b."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))


def rodrigues(rotvec: Tensor) -> Tensor:
    """Rotation matrix of a rotation vector, as the head model defines it.

    The angle is clamped from below at 1e-4: shorter vectors give I + [r] with a finite gradient at
    zero, at the price of a matrix that is orthonormal only to 1e-8 there. Fits and the diffusion
    model depend on this definition; use `so3_exp` for the exact map.

    Args:
        rotvec: (..., 3) radians.

    Returns:
        (..., 3, 3) matrices.
    """
    angle = (rotvec * rotvec).sum(-1, keepdim=True).clamp(min=1e-8).sqrt()
    cross = skew(rotvec / angle)
    angle = angle.unsqueeze(-1)
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return identity + angle.sin() * cross + (1.0 - angle.cos()) * (cross @ cross)


def so3_exp(rotvec: Tensor) -> Tensor:
    """Exact exponential map, (..., 3) -> (..., 3, 3); Taylor series below 1e-2 rad."""
    square = (rotvec * rotvec).sum(-1)[..., None, None]
    small = square < 1e-4
    # The unused branch must stay finite, or its gradient turns the result into NaN.
    safe = torch.where(small, torch.ones_like(square), square)
    angle = safe.sqrt()
    sine = torch.where(small, 1.0 - square / 6.0 + square**2 / 120.0, angle.sin() / angle)
    cosine = torch.where(small, 0.5 - square / 24.0 + square**2 / 720.0, (1.0 - angle.cos()) / safe)
    cross = skew(rotvec)
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return identity + sine * cross + cosine * (cross @ cross)


def so3_log(matrix: Tensor) -> Tensor:
    """Rotation vector (..., 3) with angle in [0, pi] of rotation matrices (..., 3, 3)."""
    quaternion = matrix_to_quaternion(matrix)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    real, imaginary = quaternion[..., 0], quaternion[..., 1:]
    square = (imaginary * imaginary).sum(-1)
    small = square < 1e-8
    sine = torch.where(small, torch.ones_like(square), square).sqrt()
    ratio = square / (real * real).clamp(min=0.25)
    # 2 atan(s / w) / s = 2 / w (1 - (s / w)^2 / 3 + ...)
    series = 2.0 / real.clamp(min=0.5) * (1.0 - ratio / 3.0)
    factor = torch.where(small, series, 2.0 * torch.atan2(sine, real) / sine)
    return factor.unsqueeze(-1) * imaginary


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternion (..., 4) of rotation matrices (..., 3, 3).

    The component of largest magnitude is positive (Shepperd's method), so the sign jumps between
    regions; compare quaternions up to sign.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (
        row.unbind(-1) for row in matrix.unbind(-2)
    )
    # Row i holds 4 q_i (w, x, y, z): choose the row of the largest q_i^2 and normalise it.
    rows = torch.stack(
        [
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20], -1),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12], -1),
            torch.stack([m10 - m01, m02 + m20, m21 + m12, 1 - m00 - m11 + m22], -1),
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01], -1),
        ],
        dim=-2,
    )
    trace = m00 + m11 + m22
    best = torch.stack([m00, m11, m22, trace], -1).argmax(-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    return torch.nn.functional.normalize(rows.gather(-2, index).squeeze(-2), dim=-1)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), which need not be normalised."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternion_multiply(first: Tensor, second: Tensor) -> Tensor:
    """Hamilton product of (..., 4) quaternions: rotates by `second`, then by `first`."""
    aw, ax, ay, az = first.unbind(-1)
    bw, bx, by, bz = second.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def minimal_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Rotation by the smallest angle that takes one unit vector to another.

    For opposite vectors the axis is source x (1, 0, 0), or source x (0, 1, 0) if that vanishes.

    Args:
        source: (..., 3) unit vectors.
        target: (..., 3) unit vectors.

    Returns:
        (..., 3, 3) matrices with R @ source = target.
    """
    source, target = torch.broadcast_tensors(source, target)
    axis = torch.linalg.cross(source, target)
    cosine = (source * target).sum(-1)[..., None, None]
    square = (axis * axis).sum(-1)[..., None, None]
    cross = skew(axis)
    identity = torch.eye(3, dtype=source.dtype, device=source.device)
    regular = identity + cross + cross @ cross * ((1.0 - cosine) / (square + 1e-8))

    unit_x = torch.zeros_like(source)
    unit_x[..., 0] = 1.0
    unit_y = unit_x.roll(1, -1)
    along_x = source[..., :1].abs() > 0.999
    half_turn_axis = torch.linalg.cross(source, torch.where(along_x, unit_y, unit_x))
    half_turn_axis = torch.nn.functional.normalize(half_turn_axis, dim=-1)
    half_turn = 2.0 * half_turn_axis[..., :, None] * half_turn_axis[..., None, :] - identity
    return torch.where(cosine < -0.999999, half_turn, regular)
