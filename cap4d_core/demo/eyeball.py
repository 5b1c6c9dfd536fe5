"""The eyeball mesh with its cornea and texture disc."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy
from cap4d_core.demo.topology import NUM_EYE

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def build_eye(side: float) -> tuple[Array, Ints, Array]:
    """One eyeball: vertices (546,3) mm, faces, and per-corner coordinates (F,3,2) in the unit disc.

    The disc magnifies the front of the eye; its centre is the pupil, its rim the back pole.
    """
    rows, cols = 16, 34
    # Rings gather at the front, where iris and limbus are seen.
    phi = np.pi * (np.arange(1, rows + 1) / (rows + 1)) ** 1.35
    theta = 2 * np.pi * np.arange(cols) / cols
    pp, tt = np.meshgrid(phi, theta, indexing="ij")
    ring = np.stack([np.sin(pp) * np.cos(tt), np.sin(pp) * np.sin(tt), np.cos(pp)], -1).reshape(
        -1, 3
    )
    v = np.concatenate([[[0, 0, 1.0]], ring, [[0, 0, -1.0]]])
    v = v * (1.0 + 0.055 * np.exp(-(((1 - v[:, 2:3]) / 0.09) ** 2)))  # cornea
    centre = anatomy.EYE_CENTRE * np.array([side, 1, 1])
    v = centre + anatomy.EYE_RADIUS * v

    def vid(r: int, c: int) -> int:
        return 1 + r * cols + c % cols

    def disc(r: float, c: float) -> list[float]:
        rho = ((r + 1) / (rows + 1)) ** 0.85
        return [rho * np.cos(2 * np.pi * c / cols), rho * np.sin(2 * np.pi * c / cols)]

    faces: list[list[int]] = []
    uv: list[list[list[float]]] = []
    for c in range(cols):
        faces.append([0, vid(0, c), vid(0, c + 1)])
        uv.append([[0.0, 0.0], disc(0, c), disc(0, c + 1)])
    for r in range(rows - 1):
        for c in range(cols):
            faces += [
                [vid(r, c), vid(r + 1, c), vid(r + 1, c + 1)],
                [vid(r, c), vid(r + 1, c + 1), vid(r, c + 1)],
            ]
            uv += [
                [disc(r, c), disc(r + 1, c), disc(r + 1, c + 1)],
                [disc(r, c), disc(r + 1, c + 1), disc(r, c + 1)],
            ]
    for c in range(cols):
        faces.append([vid(rows - 1, c), NUM_EYE - 1, vid(rows - 1, c + 1)])
        uv.append([disc(rows - 1, c), disc(rows, c + 0.5), disc(rows - 1, c + 1)])
    return v, np.array(faces, dtype=np.int64), np.array(uv)
