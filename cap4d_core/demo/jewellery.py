"""Earrings, hung on one subject's ear lobes.

Conventions: millimetres while building, in the frame of the subject's own head at rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import attachments
from cap4d_core.demo.head import DemoHead

Array = NDArray[np.float64]

KINDS = ("stud", "hoop", "drop")
COLORS = ("#c9a24e", "#b9bcc2", "#e8e4da", "#5d8fb0", "#9c2f3c")


@dataclass(frozen=True)
class Earrings:
    """A pair: kind (one of KINDS), color (3,) linear albedo, size relative to the usual one."""

    kind: str
    color: Array
    size: float


def _ball(centre: Array, radii: tuple[float, float, float]) -> tuple[Array, NDArray[np.int64]]:
    rows, cols = 7, 10
    phi = np.pi * np.linspace(0.02, 0.98, rows)
    theta = 2 * np.pi * np.arange(cols) / cols
    pp, tt = np.meshgrid(phi, theta, indexing="ij")
    v = np.stack([np.sin(pp) * np.sin(tt), np.cos(pp), np.sin(pp) * np.cos(tt)], -1)
    return centre + np.asarray(radii) * v.reshape(-1, 3), attachments.grid_faces(rows, cols, True)


def _hoop(top: Array, radius: float) -> tuple[Array, NDArray[np.int64]]:
    rows, cols, tube = 28, 6, 1.0
    turn = 2 * np.pi * np.arange(rows) / rows
    ring = 2 * np.pi * np.arange(cols) / cols
    t, r = np.meshgrid(turn, ring, indexing="ij")
    out = radius + tube * np.cos(r)
    # In the plane of y and z, as it hangs.
    v = np.stack([tube * np.sin(r), out * np.cos(t) - radius, out * np.sin(t)], -1).reshape(-1, 3)
    return top + v, attachments.grid_faces(rows + 1, cols, True) % (rows * cols)


def build_earrings(what: Earrings, head: DemoHead, shaped: Array) -> attachments.Attachment:
    """A subject's pair of earrings.

    Args:
        what: kind, colour and size.
        head: the head model.
        shaped: (V,3) metres, the subject's head at rest.
    """
    pts = head.points
    vertices, faces, binding, num = [], [], [], 0
    for side in (1.0, -1.0):
        target = np.array([side * 78.0, -21.0, -38.0])
        lobe = int(np.argmin(((pts.p - target) ** 2).sum(1) + 1e6 * ~pts.skin))
        at = 1e3 * shaped[lobe] + np.array([side * 1.2, 0.0, 0.0])
        pieces = [_ball(at, (2.2 * what.size,) * 3)]
        if what.kind == "hoop":
            pieces = [_hoop(at - np.array([0.0, 2.0, 0.0]), 8.5 * what.size)]
        elif what.kind == "drop":
            low = at - np.array([0.0, 11.0 * what.size, 0.0])
            pieces.append(_ball(low, (2.6 * what.size, 7.0 * what.size, 2.6 * what.size)))
        for v, f in pieces:
            # The lobe's change by identity is taken out again: the renderer adds it.
            vertices.append(1e-3 * v - (shaped[lobe] - head.rest[lobe]))
            faces.append(f + num)
            binding.append(np.full((len(v), 3), lobe))
            num += len(v)
    return attachments.Attachment(
        np.concatenate(vertices),
        np.concatenate(faces),
        np.tile(what.color, (num, 1)),
        attachments.METAL,
        np.concatenate(binding),
        np.full((num, 3), 1 / 3),
        False,
        np.zeros(num, bool),
    )
