"""Identity of the demo head: named units, then smooth fields that get finer and weaker.

Conventions: millimetres and the frame of `anatomy`; functions take points of the undeformed head
(N,3) and return displacements (N,3).
A coefficient of 1 is one standard deviation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy
from cap4d_core.demo.fields import Points, both, bump, eye_local, mid, random_fields, smoothstep

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_SHAPE = 300
SHAPE_UNITS = (
    "size",
    "face_width",
    "face_length",
    "skull_height",
    "skull_width",
    "skull_depth",
    "jaw_width",
    "chin_length",
    "chin_forward",
    "chin_width",
    "cheekbones",
    "cheek_fullness",
    "nose_length",
    "nose_width",
    "nose_forward",
    "bridge_height",
    "bridge_width",
    "tip_up",
    "hump",
    "eye_distance",
    "eye_height",
    "eye_size",
    "eye_slant",
    "brow_height",
    "brow_ridge",
    "forehead_slope",
    "temples",
    "upper_lip",
    "lower_lip",
    "mouth_width",
    "mouth_height",
    "mouth_forward",
    "jaw_angle",
    "ear_size",
    "ear_flare",
    "neck_width",
    "under_eye",
    "folds",
    "tip_size",
    "chin_cleft",
)


def _shape_fields(p: Array, pts: Points | None) -> dict[str, Array]:
    x, y, z = p.T
    ones = np.ones(len(p))

    def vec(a: Array, b: Array, c: Array) -> Array:
        return np.stack([a, b, c], -1)

    zero = 0.0 * ones
    lower = smoothstep(-y, -60.0, 40.0)
    upper = smoothstep(y, 20.0, 110.0)
    front = smoothstep(z, -30.0, 40.0)
    f: dict[str, Array] = {}
    f["size"] = 0.022 * (p - np.array([0, -20.0, -30.0]))
    f["face_width"] = vec(0.042 * x * lower * smoothstep(y, -130.0, -85.0), zero, zero)
    f["face_length"] = vec(zero, 0.045 * np.clip(y - 22.0, -115, 0) * front, zero)
    f["skull_height"] = vec(zero, 5.0 * upper, zero)
    f["skull_width"] = vec(0.040 * x * smoothstep(y, 0.0, 60.0), zero, zero)
    f["skull_depth"] = vec(zero, zero, 0.05 * np.clip(z + 10, -200, 0) * smoothstep(y, -50.0, 30.0))
    f["jaw_width"] = both(p, (50, -55, -5), (26, 30, 36), (4.4, 0, 0))
    f["chin_length"] = mid(p, (0, -88, 42), (36, 22, 40), (0, -4.2, 0))
    f["chin_forward"] = mid(p, (0, -78, 56), (26, 18, 30), (0, 0, 4.0))
    f["chin_width"] = both(p, (15, -80, 48), (12, 16, 24), (3.4, 0, -0.4))
    f["cheekbones"] = both(p, (50, 0, 26), (18, 16, 26), (2.6, 0, 2.2))
    f["cheek_fullness"] = both(p, (40, -34, 28), (19, 24, 28), (3.8, -0.6, 2.4))
    f["nose_length"] = mid(p, (0, -18, 74), (17, 17, 28), (0, -3.4, 0.6))
    f["nose_width"] = both(p, (13, -17, 65), (8, 10, 16), (2.3, 0, 0))
    f["nose_forward"] = mid(p, (0, -13, 80), (14, 15, 22), (0, 0, 4.0))
    f["bridge_height"] = mid(p, (0, 16, 60), (9, 18, 20), (0, 0, 2.8))
    f["bridge_width"] = both(p, (8, 8, 60), (6, 18, 18), (1.7, 0, 0))
    f["tip_up"] = mid(p, (0, -14, 82), (12, 9, 15), (0, 2.6, -0.4))
    f["hump"] = mid(p, (0, 5, 68), (8, 9, 14), (0, 0, 1.9))
    f["eye_distance"] = both(p, (32, 22, 44), (16, 22, 30), (1.8, 0, -0.5))
    f["eye_height"] = both(p, (32, 24, 46), (26, 18, 34), (0, 2.2, 0))
    f["brow_height"] = both(p, (30, 40, 50), (22, 9, 28), (0, 2.4, 0.2))
    f["brow_ridge"] = both(p, (26, 38, 54), (20, 9, 22), (0, -0.8, 2.6)) + mid(
        p, (0, 38, 60), (14, 9, 20), (0, 0, 1.6)
    )
    f["forehead_slope"] = mid(p, (0, 92, 40), (60, 34, 50), (0, 0, -4.5))
    f["temples"] = both(p, (62, 46, 8), (20, 26, 34), (2.6, 0, 0.6))
    f["mouth_width"] = vec(0.085 * x, zero, -0.0016 * x * x) * _m(p, 34, 16)[:, None]
    f["mouth_height"] = mid(p, (0, -46, 60), (32, 16, 30), (0, 2.2, 0))
    f["mouth_forward"] = mid(p, (0, -44, 60), (24, 18, 26), (0, 0, 2.4))
    f["jaw_angle"] = both(p, (52, -56, -12), (24, 22, 30), (1.0, -6.0, -1.0))
    f["neck_width"] = vec(0.07 * x, zero, 0.06 * (z + 45)) * smoothstep(-y, 60.0, 120.0)[:, None]
    f["under_eye"] = both(p, (31, 7, 47), (14, 6, 16), (0, 0, 1.3))
    f["folds"] = both(p, (24, -30, 56), (6, 16, 16), (0, 0, -1.2)) + both(
        p, (33, -28, 48), (8, 14, 18), (0.4, 0, 1.5)
    )
    f["tip_size"] = both(p, (5, -13, 78), (7, 8, 12), (1.5, 0, 0.8))
    f["chin_cleft"] = mid(p, (0, -78, 62), (3.6, 8, 12), (0, 0, -1.6))
    side = smoothstep(np.abs(x), 56.0, 74.0) * bump(p, (0, 3, -42), (1e6, 34, 24))
    ear = p - anatomy.EAR_CENTRE * np.where(x[:, None] < 0, [-1.0, 1, 1], 1.0)
    f["ear_size"] = ear * np.array([0.06, 0.09, 0.09]) * side[:, None]
    flare = side * smoothstep(-(z + 36.0), -6.0, 22.0)
    f["ear_flare"] = vec(np.sign(x) * 5.0 * flare, zero, 1.5 * flare)
    if pts is None:
        up = low = zero
    else:
        up, low = _lip_roll(pts, 1.0), _lip_roll(pts, -1.0)
    f["upper_lip"] = vec(zero, 1.25 * up, 1.5 * up)
    f["lower_lip"] = vec(zero, -1.4 * low, 1.5 * low)
    # Eyes: scaling and slant turn lids and ball together.
    f["eye_size"], f["eye_slant"] = np.zeros_like(p), np.zeros_like(p)
    for s in (1.0, -1.0):
        q = eye_local(p, s)
        w = (1 - smoothstep(np.linalg.norm(q / np.array([1.15, 1, 1.3]), axis=1), 17.0, 29.0))[
            :, None
        ]
        f["eye_size"] += 0.05 * q * w * np.array([s, 1, 1])
        turn = np.stack([-q[:, 1], q[:, 0], zero], -1) * 0.05
        f["eye_slant"] += turn * w * np.array([s, 1, 1])
    return f


def _m(p: Array, rx: float, ry: float) -> Array:
    return bump(p, (0, -46, 58), (rx, ry, 28.0))


def _lip_roll(pts: Points, side: float) -> Array:
    """Bulge of one lip's red: nothing at the lip line, most in the middle of the roll."""
    d = (pts.y - anatomy.STOMION[1]) * side
    w = np.exp(-(((d - 5.0) / 4.6) ** 2)) * np.clip(1 - (pts.x / 27.0) ** 2, 0, 1) * (pts.z > 40)
    out: Array = w * pts.skin * (pts.lip_ring > 0) * (pts.lip_side * side > 0)
    return out


def shape_basis(pts: Points, seed: int) -> Array:
    """(300,V,3) mm: named units, then smooth fields that get finer and weaker."""
    f = _shape_fields(pts.p, pts)
    out = np.zeros((NUM_SHAPE, len(pts.p), 3))
    rng = np.random.RandomState(seed)
    eyes = _eyes(pts)
    rigid = ("eye_size", "eye_slant", "size", "upper_lip", "lower_lip")
    for k, name in enumerate(SHAPE_UNITS):
        out[k] = f[name] if name in rigid else _carry_eyes(eyes, f[name])
    for k in range(len(SHAPE_UNITS), NUM_SHAPE):
        j = k - len(SHAPE_UNITS)
        field = random_fields(pts.p, 1, rng, 0.55 * (1 + j) ** -0.55, max(190.0 - 0.5 * j, 70.0))[0]
        out[k] = _carry_eyes(eyes, field)
    return out


def _eyes(pts: Points) -> list[tuple[Array, Ints, Array]]:
    """For each eye: its ball (V,), the vertices near its front, the reach of its lids (V,1)."""
    out = []
    for side in (1.0, -1.0):
        q = eye_local(pts.p, side)
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        front = np.linalg.norm(q - np.array([0, 0, 13.0]), axis=1)
        near = np.argsort(front, kind="stable")[:24]
        w = 1 - smoothstep(np.linalg.norm(q / np.array([1.15, 1, 1.2]), axis=1), 15.5, 26.0)
        out.append((ball, near, w[:, None]))
    return out


def _carry_eyes(eyes: list[tuple[Array, Ints, Array]], field: Array) -> Array:
    """Make a field constant over each eyeball and its lids, so that they keep touching."""
    out = field.copy()
    for ball, near, w in eyes:
        value = field[near].mean(0)
        out = out * (1 - w) + value * w
        out[ball] = value
    return out
