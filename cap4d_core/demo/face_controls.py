"""How jaw, lips and lids move: weights and motions that several bases share.

Conventions: millimetres and the frame of `anatomy`; functions take points of the undeformed head
(N,3) and return displacements (N,3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy
from cap4d_core.demo.fields import Points, bump, eye_local, smoothstep

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

JAW_JOINT = np.array([0.0, -8.0, -20.0])


def jaw_weight(pts: Points) -> Array:
    """How much a vertex follows the mandible: 0 above the lip line, 1 on lower lip and chin."""
    rel = pts.p - JAW_JOINT
    angle = np.arctan2(rel[:, 1], np.maximum(rel[:, 2], 1.0))
    line = np.arctan2(anatomy.STOMION[1] - JAW_JOINT[1], anatomy.STOMION[2] - JAW_JOINT[2])
    # The transition is a step at the slit and widens over the cheeks.
    beyond = smoothstep(np.abs(pts.x), 16.0, 60.0)
    width = 0.03 + 0.55 * beyond
    w = smoothstep(line - angle, -0.7 * width, width)
    front = smoothstep(pts.z, -16.0, 30.0)
    throat = smoothstep(pts.y + 0.45 * pts.z, -128.0, -84.0)
    w = w * front * throat
    lip = pts.lip_ring < 99
    corner = np.clip(1 - (np.abs(pts.x) / 26.5) ** 2, 0, 1) ** 0.62
    exact = 0.5 - 0.5 * pts.lip_side * corner
    fade = np.where(lip, np.clip(1.0 - np.maximum(pts.lip_ring, 0) / 4.0, 0, 1), 0.0)
    w = w * (1 - fade) + exact * fade
    out: Array = np.where(pts.skin, w, 0.0)
    return out


def lip_field(pts: Points, side: float, reach: float = 13.0, width: float = 25.0) -> Array:
    """Weight of one lip: 1 at the lip line in the middle, 0 at the corners and beyond the reach."""
    p = pts.p
    d = np.abs(p[:, 1] - anatomy.STOMION[1])
    inner = np.where(pts.lip_ring < 0, 0.0, d)
    w = np.clip(1 - (p[:, 0] / width) ** 2, 0, 1) * np.exp(-((inner / reach) ** 2)) * (p[:, 2] > 38)
    out: Array = np.where(pts.lip_side * side > 0, w, 0.0) * pts.skin
    return out


def mouth_zone(pts: Points, rx: float, ry: float) -> Array:
    """A bump over the mouth with radii rx, ry (mm)."""
    return bump(pts.p, (0, -46, 58), (rx, ry, 26.0))


def lid_motion(pts: Points, side: float, upper: float, lower: float) -> Array:
    """Displacement that slides lids over the eyeball; upper = lower = 1 closes the eye.

    Upper lids close 78 %, lower lids 22 % of the opening. Negative values open wider. Every vertex
    turns about the axis through the corners of the eye by an angle that depends on its distance
    from the rim, which the
    loop of lid vertices itself defines: the two rims meet exactly.
    """
    q = eye_local(pts.p, side)
    a, radius = q[:, 0], np.hypot(q[:, 1], q[:, 2])
    angle = np.arctan2(q[:, 1], q[:, 2])
    rim = (pts.lid_ring == 0) & (np.sign(pts.x) == side)
    edges = []
    for s in (1.0, -1.0):
        ids = np.where(rim & (s * pts.lid_side >= 0))[0]
        ids = ids[np.argsort(a[ids], kind="stable")]
        edges.append(np.interp(a, a[ids], angle[ids]))
    top, bottom = edges
    meet = bottom + 0.22 * (top - bottom)
    is_upper = np.where(pts.lid_ring < 99, pts.lid_side >= 0, angle >= 0.5 * (top + bottom))
    out_of_rim = np.where(is_upper, angle - top, bottom - angle)
    fade = 1 - smoothstep(out_of_rim, 0.0, np.where(is_upper, 0.85, 0.80))
    fade = np.where(pts.lid_ring <= 0, 1.0, fade)
    fade = (
        fade * (1 - smoothstep(np.linalg.norm(q, axis=1), 19.0, 27.0)) * (q[:, 2] > -2) * pts.skin
    )
    turn = np.where(is_upper, (meet - top) * upper, (meet - bottom) * lower) * fade
    # Skin that comes down from the fold settles on the ball, a little proud of the straight path.
    ball = np.sqrt(np.maximum((anatomy.LID_RADIUS + 0.3) ** 2 - a**2, 36.0))
    settle = fade * np.clip(np.abs(turn) / 0.3, 0, 1) * (1 - smoothstep(np.abs(a), 7.0, 12.0))
    settle = np.where(pts.lid_ring < 0, 0.0, settle)
    new_radius = radius + (ball - radius) * settle
    d = np.stack(
        [
            0 * a,
            new_radius * np.sin(angle + turn) - q[:, 1],
            new_radius * np.cos(angle + turn) - q[:, 2],
        ],
        -1,
    )
    out: Array = np.where(np.abs(turn)[:, None] > 1e-9, d, 0.0)
    return out
