"""Compiled CPU backend of `cap4d_core.geometry.mesh_rasterizer`; same rules, float32 arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.geometry.mesh_rasterizer import axis_coordinates, pixel_centers

_F = np.float32
_TINY = _F(1e-8)
_MIN_SUM = _F(1e-5)
_ZERO = _F(0.0)


def rasterize_numba(
    vertices: NDArray[Any],
    faces: NDArray[Any],
    size: tuple[int, int],
    perspective: bool,
    cull_backfaces: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """See `rasterize`; (B, V, 3) float32 and (F, 3) int64 arrays in, fragments' arrays out."""
    height, width = size
    batch = len(vertices)
    device = torch.device("cpu")
    columns = axis_coordinates(width, height, device).numpy()
    rows = axis_coordinates(height, width, device).numpy()
    face_index = np.full((batch, height, width), -1, np.int64)
    barycentrics = np.full((batch, height, width, 3), -1.0, np.float32)
    depth = np.full((batch, height, width), -1.0, np.float32)
    # numba's OpenMP pool is torch's too: left alone, it would start with all cores and leave torch
    # with that number of threads, whatever it was set to.
    threads = torch.get_num_threads()
    available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, available))
    # Strips of rows give single pictures to several cores; every pixel is written by one of them,
    # so results do not depend on their number.
    strips = max(1, min(height, -(-numba.get_num_threads() // max(batch, 1))))
    half_x, step_x = pixel_centers(width, height)
    half_y, step_y = pixel_centers(height, width)
    _fill(
        np.ascontiguousarray(vertices, np.float32),
        np.ascontiguousarray(faces, np.int64),
        columns,
        rows,
        (half_x, step_x, half_y, step_y),
        strips,
        perspective,
        cull_backfaces,
        face_index,
        barycentrics,
        depth,
    )
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return face_index, barycentrics, depth


@numba.njit(cache=True, inline="always")
def _edge(px, py, ax, ay, bx, by):  # type: ignore[no-untyped-def]
    return (px - ax) * (by - ay) - (py - ay) * (bx - ax)


@numba.njit(cache=True, inline="always")
def _clamp(value, low, high):  # type: ignore[no-untyped-def]
    # Compared as floats first: converting an infinite or huge float to int is undefined.
    if value < low:
        return low
    if value > high:
        return high
    return int(value)


@numba.njit(cache=True, parallel=True)
def _fill(  # type: ignore[no-untyped-def]
    vertices, faces, columns, rows, grid, strips, perspective, cull, face_index, barycentrics, depth
):
    height, width = len(rows), len(columns)
    half_x, step_x, half_y, step_y = grid
    for job in numba.prange(len(vertices) * strips):
        b = job // strips
        strip = job % strips
        row_start = height * strip // strips
        row_stop = height * (strip + 1) // strips
        for f in range(len(faces)):
            x0, y0, z0 = vertices[b, faces[f, 0]]
            x1, y1, z1 = vertices[b, faces[f, 1]]
            x2, y2, z2 = vertices[b, faces[f, 2]]
            y_low, y_high = min(y0, y1, y2), max(y0, y1, y2)
            # One pixel wider than needed: rounding here must not lose a pixel.
            top = _clamp(math.floor((half_y - y_high) / step_y - 1.5), row_start, height)
            bottom = _clamp(math.ceil((half_y - y_low) / step_y + 0.5), -1, row_stop - 1)
            if bottom < top:
                continue
            area = _edge(x0, y0, x1, y1, x2, y2)
            # Written so that NaN is refused as well.
            if not (area > _TINY or (not cull and area < -_TINY)):
                continue
            if not min(z0, z1, z2) >= _TINY:
                continue
            x_low, x_high = min(x0, x1, x2), max(x0, x1, x2)
            left = _clamp(math.floor((half_x - x_high) / step_x - 1.5), 0, width)
            right = _clamp(math.ceil((half_x - x_low) / step_x + 0.5), -1, width - 1)
            divisor = _edge(x2, y2, x0, y0, x1, y1) + _TINY
            for i in range(top, bottom + 1):
                py = rows[i]
                if py < y_low or py > y_high:
                    continue
                for j in range(left, right + 1):
                    px = columns[j]
                    if px < x_low or px > x_high:
                        continue
                    w0 = _edge(px, py, x1, y1, x2, y2) / divisor
                    w1 = _edge(px, py, x2, y2, x0, y0) / divisor
                    w2 = _edge(px, py, x0, y0, x1, y1) / divisor
                    if not (w0 > _ZERO and w1 > _ZERO and w2 > _ZERO):
                        continue
                    if perspective:
                        w0 = w0 * z1 * z2
                        w1 = w1 * z0 * z2
                        w2 = w2 * z0 * z1
                        total = max(w0 + w1 + w2, _TINY)
                        w0 /= total
                        w1 /= total
                        w2 /= total
                    total = max(w0 + w1 + w2, _MIN_SUM)
                    w0 /= total
                    w1 /= total
                    w2 /= total
                    z = w0 * z0 + w1 * z1 + w2 * z2
                    # Faces come in ascending order, so equal depths keep the lower index.
                    if face_index[b, i, j] < 0 or z < depth[b, i, j]:
                        face_index[b, i, j] = f
                        depth[b, i, j] = z
                        barycentrics[b, i, j, 0] = w0
                        barycentrics[b, i, j, 1] = w1
                        barycentrics[b, i, j, 2] = w2
