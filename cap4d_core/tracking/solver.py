"""Linear algebra of the fit: normal equations that couple frames, in a band, over time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

# A change of shape or expression that looks like a turn or shift of the face belongs to the pose.
_RIGID_ANGLE, _RIGID_SHIFT_M = np.deg2rad(1.0), 0.002


def gram(first: Array, second: Array) -> Array:
    """first^T second. By torch, whose threads the caller can limit; numpy's cannot be."""
    product = torch.from_numpy(first).T @ torch.from_numpy(second)
    result: Array = product.numpy()
    return result


def rigid_part(points: Array, basis: Array) -> Array:
    """Penalty matrix (K, K) on the rotation and translation that coefficients cause.

    The best-fitting rigid motion of the displacement field of every basis vector is found by least
    squares; its size counts in units of a degree and two millimetres.
    """
    centered = points - points.mean(axis=0)
    motion = np.zeros((len(points), 3, 6))
    # w x p as a matrix acting on w.
    for axis in range(3):
        unit = np.zeros(3)
        unit[axis] = 1.0
        motion[:, :, axis] = np.cross(unit, centered)
        motion[:, axis, 3 + axis] = 1.0
    solution, *_ = np.linalg.lstsq(
        motion.reshape(-1, 6), basis.reshape(-1, basis.shape[-1]), rcond=None
    )
    solution[:3] /= _RIGID_ANGLE
    solution[3:] /= _RIGID_SHIFT_M
    penalty: Array = solution.T @ solution
    return penalty


def acceleration_gradient(rotation: Array, tra: Array, expr: Array) -> Array:
    """(T, n): D^T D of the parameters, D the second difference over frames.

    Args:
        rotation: (T, 3, 3).
        tra: (T, 3).
        expr: (T, E), E = 0 where expressions are fixed.
    """
    frames, num_expr = len(rotation), expr.shape[1]
    relative = rotation[1:] @ rotation[:-1].transpose(0, 2, 1)
    velocity = Rotation.from_matrix(relative).as_rotvec()
    acceleration = np.zeros((frames - 2, 6 + num_expr))
    acceleration[:, :3] = np.diff(velocity, axis=0)
    acceleration[:, 3:6] = np.diff(tra, n=2, axis=0)
    if num_expr:
        acceleration[:, 6:] = np.diff(expr, n=2, axis=0)
    gradient = np.zeros((frames, 6 + num_expr))
    for place, factor in enumerate((1.0, -2.0, 1.0)):
        gradient[place : place + frames - 2] += factor * acceleration
    return gradient


def solve_banded(matrix: Array, weights: Array, right: Array) -> Array:
    """Solves (blockdiag(matrix) + D^T D x diag(weights)) x = right for all frames at once."""
    frames, size, columns = right.shape
    stencil = np.zeros((frames, 3))  # diagonals 0, 1, 2 of D^T D
    for place in range(frames - 2):
        for i, a in enumerate((1.0, -2.0, 1.0)):
            for j in range(i, 3):
                stencil[place + i, j - i] += a * (1.0, -2.0, 1.0)[j]
    total, band = frames * size, 2 * size
    lower = np.zeros((band + 1, total))
    index = np.arange(size)
    for offset in range(size):
        values = np.zeros((frames, size))
        column = index[: size - offset]
        values[:, : size - offset] = matrix[:, column + offset, column]
        lower[offset] += values.reshape(-1)
    for distance in range(3):
        lower[distance * size] += (stencil[:, distance, None] * weights).reshape(-1)
    solved = solveh_banded(
        lower, right.reshape(total, columns), lower=True, overwrite_ab=True, check_finite=False
    )
    result: Array = solved.reshape(frames, size, columns)
    return result
