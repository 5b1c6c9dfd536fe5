"""Expressions of the demo head: named units, then small smooth fields.

Conventions: millimetres and the frame of `anatomy`; functions take points of the undeformed head
(N,3) and return displacements (N,3).
A coefficient of 1 is a clear but everyday expression; most units are one-sided (0 to 2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo.face_controls import JAW_JOINT, jaw_weight, lid_motion, lip_field, mouth_zone
from cap4d_core.demo.fields import Points, both, lid_free, mid, one, random_fields, smoothstep

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_EXPRESSION = 100
JAW_ANGLE_PER_UNIT = 0.11
EXPRESSION_UNITS = (
    "jaw_open",
    "smile",
    "frown",
    "pucker",
    "stretch",
    "press",
    "brow_raise",
    "brow_lower",
    "brow_inner_raise",
    "brow_raise_left",
    "brow_raise_right",
    "cheek_puff",
    "sneer",
    "squint",
    "eyes_wide",
    "mouth_left",
    "jaw_left",
    "upper_lip_raise",
    "lower_lip_drop",
    "smile_left",
    "smile_right",
    "pout",
    "chin_raise",
    "jaw_forward",
    "nostril_flare",
    "cheek_suck",
    "lips_part",
    "blink_left",
    "blink_right",
)


def _smile(pts: Points, side: float) -> Array:
    p = pts.p
    d = one(p, (25, -46, 54), (15, 15, 22), (4.6, 5.0, -2.6), side)
    d += one(p, (34, -20, 42), (17, 15, 22), (1.5, 3.6, 2.4), side)
    d += one(p, (32, 8, 44), (18, 8, 20), (0.2, 1.0, 0.4), side)
    d += one(p, (12, -17, 66), (8, 8, 14), (0.9, 0.5, -0.2), side)
    d[:, 2] -= 1.2 * mouth_zone(pts, 22, 12) * smoothstep(side * pts.x, -8.0, 12.0)
    return d


def _brow(pts: Points, side: float, move: tuple[float, float, float]) -> Array:
    p = pts.p
    return one(p, (30, 40, 50), (20, 13, 26), move, side) + one(
        p, (30, 58, 50), (22, 18, 30), (0.2 * move[0], 0.45 * move[1], 0.1), side
    )


def expression_units(pts: Points) -> dict[str, Array]:
    """Displacement of every named unit at coefficient 1 (mm)."""
    p = pts.p
    up, low = lip_field(pts, 1.0), lip_field(pts, -1.0)
    wj = jaw_weight(pts)[:, None]
    mouth = mouth_zone(pts, 31, 17)
    lips = mouth_zone(pts, 24, 9)
    zero = np.zeros_like(p)

    def axis(v: Array, *move: float) -> Array:
        return v[:, None] * np.asarray(move)

    u: dict[str, Array] = {}
    u["jaw_open"] = JAW_ANGLE_PER_UNIT * np.cross([1.0, 0, 0], p - JAW_JOINT) * wj
    u["jaw_open"] += both(p, (26, -46, 53), (9, 9, 16), (-1.2, -0.6, 0.0))
    u["jaw_open"] += both(p, (40, -34, 30), (16, 18, 20), (-1.2, -0.6, -0.8))
    u["smile"] = _smile(pts, 1.0) + _smile(pts, -1.0)
    u["frown"] = both(p, (25, -48, 54), (13, 12, 20), (0.8, -4.0, -0.6)) + mid(
        p, (0, -62, 62), (18, 10, 18), (0, 1.2, 0.8)
    )
    pucker = np.stack([-0.36 * p[:, 0], 0 * p[:, 1], 5.0 * np.ones(len(p))], -1) * mouth[:, None]
    u["pucker"] = pucker + axis(up + low, 0, 0, 0.8)
    u["stretch"] = both(p, (25, -47, 54), (15, 14, 22), (4.6, -0.6, -2.6)) + axis(lips, 0, 0, -0.8)
    u["press"] = axis(np.where(pts.lip_side > 0, lips, 0), 0, -1.1, -1.5) + axis(
        np.where(pts.lip_side < 0, lips, 0), 0, 0.5, -1.5
    )
    # The lip line itself must stay shut when the lips are rolled in.
    rim = (pts.lip_ring <= 0)[:, None]
    u["press"] = np.where(rim, axis(lips, 0, -0.3, -1.2), u["press"])
    u["brow_raise"] = _brow(pts, 1, (0.2, 5.0, 0.3)) + _brow(pts, -1, (0.2, 5.0, 0.3))
    furrow = (-2.4, -3.6, 0.8)
    u["brow_lower"] = both(p, (18, 36, 54), (14, 11, 22), furrow) + both(
        p, (34, 38, 48), (16, 9, 24), (-0.8, -2.0, 0.3)
    )
    u["brow_inner_raise"] = both(p, (15, 39, 55), (11, 13, 22), (-0.8, 4.2, 0.4))
    u["brow_raise_left"] = _brow(pts, 1, (0.2, 5.0, 0.3))
    u["brow_raise_right"] = _brow(pts, -1, (0.2, 5.0, 0.3))
    u["cheek_puff"] = both(p, (40, -40, 34), (17, 17, 22), (6.0, 0, 3.5)) + axis(lips, 0, 0, 1.2)
    u["sneer"] = (
        both(p, (13, -14, 64), (8, 10, 16), (0.6, 3.0, 0.2))
        + axis(up, 0, 2.0, 0.3)
        + both(p, (9, 10, 60), (8, 10, 14), (-0.3, 1.4, 0.6))
    )
    u["squint"] = both(p, (33, 8, 46), (20, 8, 20), (0, 1.8, 0.8))
    u["eyes_wide"] = zero.copy()
    for side in (1.0, -1.0):
        u["squint"] += lid_motion(pts, side, 0.22, 1.1)
        u["eyes_wide"] += lid_motion(pts, side, -0.24, -0.15)
    u["mouth_left"] = axis(mouth_zone(pts, 30, 18), 5.0, 0.5, -0.4)
    sway = np.cross([0, 1.0, 0], p - JAW_JOINT) * 0.055
    u["jaw_left"] = sway * wj
    u["upper_lip_raise"] = axis(up, 0, 3.6, 0.3) + both(
        p, (14, -28, 60), (10, 10, 18), (0.2, 1.6, 0.4)
    )
    u["lower_lip_drop"] = axis(low, 0, -4.2, 0.3) + mid(
        p, (0, -62, 60), (18, 8, 18), (0, -0.8, 0.2)
    )
    u["smile_left"], u["smile_right"] = _smile(pts, 1.0), _smile(pts, -1.0)
    pout = mid(p, (0, -52, 62), (18, 7, 18), (0, 1.6, 3.0))
    u["pout"] = np.where(rim, axis(mouth_zone(pts, 20, 9), 0, 0.8, 1.6), pout)
    u["chin_raise"] = mid(p, (0, -72, 58), (19, 14, 22), (0, 2.8, 1.4)) + axis(lips, 0, 0.7, 0.4)
    u["jaw_forward"] = wj * np.array([0, -0.3, 4.0])
    u["nostril_flare"] = both(p, (13, -17, 63), (6, 7, 12), (2.0, 0.3, 0))
    u["cheek_suck"] = both(p, (40, -36, 34), (14, 17, 20), (-4.5, 0, -2.5))
    u["lips_part"] = axis(up, 0, 1.6, 0.2) + axis(low, 0, -2.2, 0.2)
    u["blink_left"] = lid_motion(pts, 1.0, 1.0, 1.0)
    u["blink_right"] = lid_motion(pts, -1.0, 1.0, 1.0)
    return {name: field * pts.skin[:, None] for name, field in u.items()}


def expression_basis(pts: Points, seed: int) -> Array:
    """(100,V,3) mm: the named units, then small smooth fields on the face."""
    units = expression_units(pts)
    out = np.zeros((NUM_EXPRESSION, len(pts.p), 3))
    for k, name in enumerate(EXPRESSION_UNITS):
        out[k] = units[name]
    rng = np.random.RandomState(seed)
    num = NUM_EXPRESSION - len(EXPRESSION_UNITS)
    face = (
        smoothstep(pts.z, 5.0, 45.0)
        * smoothstep(pts.y, -100.0, -70.0)
        * (1 - smoothstep(pts.y, 55.0, 85.0))
    )
    face = face * lid_free(pts) * pts.skin
    small = random_fields(pts.p, num, rng, 0.32, 75.0) * face[None, :, None]
    # Both rims of the slit ride on the same motion: no accidental gaps.
    out[len(EXPRESSION_UNITS) :] = small * (1.0 + np.arange(num))[:, None, None] ** -0.25
    return out
