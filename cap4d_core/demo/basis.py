"""Deformation bases of the demo head: identity, expression, blink, pose correctives, skinning.

Conventions: millimetres and the frame of `anatomy`; all functions take points of the undeformed
head (N,3) and return displacements (N,3). A coefficient of 1 is one standard deviation (identity)
or a clear but everyday expression (expression units; most are one-sided, natural range 0 to 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy, topology

Array = NDArray[np.float64]

NUM_SHAPE, NUM_EXPRESSION = 300, 100
JAW_JOINT = np.array([0.0, -8.0, -20.0])
JOINTS = np.array(
    [
        [0.0, -138.0, -38.0],
        [0.0, -92.0, -32.0],
        JAW_JOINT,
        anatomy.EYE_CENTRE,
        anatomy.EYE_CENTRE * [-1, 1, 1],
    ]
)
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


@dataclass(frozen=True)
class Points:
    """All head vertices with what the fields need to know about them."""

    p: Array  # (V,3)
    skin: NDArray[np.bool_]
    lip_side: Array  # +1 upper, -1 lower
    lip_ring: NDArray[np.int64]
    lid_ring: NDArray[np.int64]
    lid_side: Array  # +1 upper, -1 lower, 0 corners

    @property
    def x(self) -> Array:
        """(V,) mm."""
        return self.p[:, 0]

    @property
    def y(self) -> Array:
        """(V,) mm."""
        return self.p[:, 1]

    @property
    def z(self) -> Array:
        """(V,) mm."""
        return self.p[:, 2]


def gather(skin: topology.Skin, eyes: Array) -> Points:
    """Points for a skin mesh followed by the eyeball vertices (2*546,3)."""
    e = len(eyes)
    return Points(
        np.concatenate([skin.vertices, eyes]),
        np.arange(len(skin.vertices) + e) < len(skin.vertices),
        np.concatenate([skin.lip_side, np.ones(e)]),
        np.concatenate([skin.lip_ring, np.full(e, 99)]),
        np.concatenate([skin.lid_ring, np.full(e, 99)]),
        np.concatenate([skin.lid_side, np.zeros(e)]),
    )


def smoothstep(x: Array, lo: float | Array, hi: float | Array) -> Array:
    """Cubic ramp from 0 at lo to 1 at hi."""
    t = np.clip((x - lo) / (np.asarray(hi) - np.asarray(lo)), 0.0, 1.0)
    out: Array = t * t * (3 - 2 * t)
    return out


def bump(p: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    """Gaussian bump (N,)."""
    out: Array = np.exp(-(((p - np.asarray(centre)) / np.asarray(radii)) ** 2).sum(-1))
    return out


def both(
    p: Array, centre: tuple[float, ...], radii: tuple[float, ...], move: tuple[float, ...]
) -> Array:
    """A bump at centre and its mirror image, moving by `move` and its mirror image."""
    return one(p, centre, radii, move, 1.0) + one(p, centre, radii, move, -1.0)


def one(
    p: Array,
    centre: tuple[float, ...],
    radii: tuple[float, ...],
    move: tuple[float, ...],
    side: float,
) -> Array:
    """The same on one side only (+1: the subject's left)."""
    s = np.array([side, 1.0, 1.0])
    return bump(p, tuple(np.asarray(centre) * s), radii)[:, None] * (np.asarray(move) * s)


def mid(
    p: Array, centre: tuple[float, ...], radii: tuple[float, ...], move: tuple[float, ...]
) -> Array:
    """A bump on the midline."""
    return bump(p, centre, radii)[:, None] * np.asarray(move)


# --- jaw and lips -------------------------------------------------------------------------------


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


def _lip_field(pts: Points, side: float, reach: float = 13.0, width: float = 25.0) -> Array:
    """Weight of one lip: 1 at the lip line in the middle, 0 at the corners and beyond the reach."""
    p = pts.p
    d = np.abs(p[:, 1] - anatomy.STOMION[1])
    inner = np.where(pts.lip_ring < 0, 0.0, d)
    w = np.clip(1 - (p[:, 0] / width) ** 2, 0, 1) * np.exp(-((inner / reach) ** 2)) * (p[:, 2] > 38)
    out: Array = np.where(pts.lip_side * side > 0, w, 0.0) * pts.skin
    return out


def _mouth(pts: Points, rx: float, ry: float) -> Array:
    return bump(pts.p, (0, -46, 58), (rx, ry, 26.0))


# --- lids -----------------------------------------------------------------------------------------


def _eye_local(p: Array, side: float) -> Array:
    """Eye-centred coordinates with +a outwards."""
    return (p - anatomy.EYE_CENTRE * np.array([side, 1, 1])) * np.array([side, 1, 1])


def lid_motion(pts: Points, side: float, upper: float, lower: float) -> Array:
    """Displacement that slides lids over the eyeball; upper = lower = 1 closes the eye.

    Upper lids close 78 %, lower lids 22 % of the opening. Negative values open wider. Every vertex
    turns about the axis through the corners of the eye by an angle that depends on its distance
    from the rim, which the
    loop of lid vertices itself defines: the two rims meet exactly.
    """
    q = _eye_local(pts.p, side)
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


# --- expression -----------------------------------------------------------------------------------


def _smile(pts: Points, side: float) -> Array:
    p = pts.p
    d = one(p, (25, -46, 54), (15, 15, 22), (4.6, 5.0, -2.6), side)
    d += one(p, (34, -20, 42), (17, 15, 22), (1.5, 3.6, 2.4), side)
    d += one(p, (32, 8, 44), (18, 8, 20), (0.2, 1.0, 0.4), side)
    d += one(p, (12, -17, 66), (8, 8, 14), (0.9, 0.5, -0.2), side)
    d[:, 2] -= 1.2 * _mouth(pts, 22, 12) * smoothstep(side * pts.x, -8.0, 12.0)
    return d


def _brow(pts: Points, side: float, move: tuple[float, float, float]) -> Array:
    p = pts.p
    return one(p, (30, 40, 50), (20, 13, 26), move, side) + one(
        p, (30, 58, 50), (22, 18, 30), (0.2 * move[0], 0.45 * move[1], 0.1), side
    )


def expression_units(pts: Points) -> dict[str, Array]:
    """Displacement of every named unit at coefficient 1 (mm)."""
    p = pts.p
    up, low = _lip_field(pts, 1.0), _lip_field(pts, -1.0)
    wj = jaw_weight(pts)[:, None]
    mouth = _mouth(pts, 26, 17)
    lips = _mouth(pts, 24, 9)
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
    pucker = np.stack([-0.30 * p[:, 0], 0 * p[:, 1], 4.2 * np.ones(len(p))], -1) * mouth[:, None]
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
    u["mouth_left"] = axis(_mouth(pts, 30, 18), 5.0, 0.5, -0.4)
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
    u["pout"] = np.where(rim, axis(_mouth(pts, 20, 9), 0, 0.8, 1.6), pout)
    u["chin_raise"] = mid(p, (0, -72, 58), (19, 14, 22), (0, 2.8, 1.4)) + axis(lips, 0, 0.7, 0.4)
    u["jaw_forward"] = wj * np.array([0, -0.3, 4.0])
    u["nostril_flare"] = both(p, (13, -17, 63), (6, 7, 12), (2.0, 0.3, 0))
    u["cheek_suck"] = both(p, (40, -36, 34), (14, 17, 20), (-4.5, 0, -2.5))
    u["lips_part"] = axis(up, 0, 1.6, 0.2) + axis(low, 0, -2.2, 0.2)
    u["blink_left"] = lid_motion(pts, 1.0, 1.0, 1.0)
    u["blink_right"] = lid_motion(pts, -1.0, 1.0, 1.0)
    return {name: field * pts.skin[:, None] for name, field in u.items()}


def random_fields(
    p: Array, num: int, rng: np.random.RandomState, amplitude: float, wavelength: float
) -> Array:
    """Smooth seeded vector fields (num,N,3) of the given RMS (mm) and wavelength (mm)."""
    out = np.empty((num, len(p), 3))
    for k in range(num):
        waves = rng.randn(4, 3) * 2 * np.pi / wavelength
        phase, a = rng.uniform(0, 2 * np.pi, 4), rng.randn(4, 3)
        f = np.cos(p @ waves.T + phase) @ a
        out[k] = f * (amplitude / np.sqrt((f * f).sum(1).mean()))
    return out


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
    face = face * _lid_free(pts) * pts.skin
    small = random_fields(pts.p, num, rng, 0.32, 75.0) * face[None, :, None]
    # Both rims of the slit ride on the same motion: no accidental gaps.
    out[len(EXPRESSION_UNITS) :] = small * (1.0 + np.arange(num))[:, None, None] ** -0.25
    return out


def _lid_free(pts: Points) -> Array:
    """0 on and around the lids, 1 elsewhere."""
    out = np.ones(len(pts.p))
    for side in (1.0, -1.0):
        q = _eye_local(pts.p, side)
        out *= smoothstep(np.hypot(q[:, 0] / 19.0, q[:, 1] / 14.0), 0.9, 1.5)
    return out


# --- identity -------------------------------------------------------------------------------------

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
        q = _eye_local(p, s)
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
    rigid = ("eye_size", "eye_slant", "size", "upper_lip", "lower_lip")
    for k, name in enumerate(SHAPE_UNITS):
        out[k] = f[name] if name in rigid else _carry_eyes(pts, f[name])
    for k in range(len(SHAPE_UNITS), NUM_SHAPE):
        j = k - len(SHAPE_UNITS)
        field = random_fields(pts.p, 1, rng, 0.55 * (1 + j) ** -0.55, max(190.0 - 0.5 * j, 70.0))[0]
        out[k] = _carry_eyes(pts, field)
    return out


def _carry_eyes(pts: Points, field: Array) -> Array:
    """Make a field constant over each eyeball and its lids, so that they keep touching."""
    out = field.copy()
    for side in (1.0, -1.0):
        q = _eye_local(pts.p, side)
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        front = np.linalg.norm(q - np.array([0, 0, 13.0]), axis=1)
        near = np.argsort(front, kind="stable")[:24]
        value = field[near].mean(0)
        w = (1 - smoothstep(np.linalg.norm(q / np.array([1.15, 1, 1.2]), axis=1), 15.5, 26.0))[
            :, None
        ]
        out = out * (1 - w) + value * w
        out[ball] = value
    return out


# --- pose -----------------------------------------------------------------------------------------


def skin_weights(pts: Points) -> Array:
    """(V,5): lower neck, head, jaw, eye +x, eye -x."""
    w = np.zeros((len(pts.p), 5))
    w[:, 2] = 0.97 * jaw_weight(pts)
    base = smoothstep(-(pts.y + 0.30 * (pts.z + 40)), 92.0, 150.0)
    w[:, 0] = base * (1 - w[:, 2])
    w[:, 1] = 1 - w[:, 0] - w[:, 2]
    for joint, side in ((3, 1.0), (4, -1.0)):
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        w[ball] = 0
        w[ball, joint] = 1
    return w


def pose_basis(pts: Points, seed: int) -> Array:
    """(36,V,3) mm, joint x row x column of the rotation of joints 0, 2, 3, 4.

    Upper lids follow the gaze: the entry [2,1] of an eye's rotation is the sine of its downward
    turn. The rest is a small smooth field, so that correctives and their constant offset at rest
    can be tested.
    """
    rng = np.random.RandomState(seed)
    calm = _lid_free(pts) * pts.skin
    out = random_fields(pts.p, 36, rng, 0.22, 160.0) * calm[None, :, None]
    calm_mouth = 1 - _mouth(pts, 40, 30)
    out *= calm_mouth[None, :, None]
    for k, side in ((2, 1.0), (3, -1.0)):
        block = out[9 * k : 9 * k + 9]
        block *= 0.3
        block[7] = lid_motion(pts, side, 0.85, -0.5)
    return out


def joint_regressor(pts: Points) -> Array:
    """(5,V) with rows that sum to one and give JOINTS on the undeformed head."""
    out = np.zeros((5, len(pts.p)))
    still = pts.skin & (jaw_weight(pts) < 0.02)
    for j, radius in ((0, 16.0), (1, 14.0), (2, 12.0)):
        t = JOINTS[j]
        near = still & (np.abs(pts.y - t[1]) < radius) & (np.abs(pts.z - t[2]) < 70.0)
        if j == 2:  # the joint of the jaw lies between the ears
            near &= (np.abs(pts.x) > 50) & (np.abs(pts.z - t[2]) < 24.0)
        idx = np.where(near)[0]
        a = np.concatenate([pts.p[idx].T / 100.0, np.ones((1, len(idx)))])
        out[j, idx] = np.linalg.lstsq(a, np.append(t / 100.0, 1.0), rcond=None)[0]
    for j, side in ((3, 1.0), (4, -1.0)):
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        ids = np.where(ball)[0]
        a = np.concatenate([pts.p[ids].T / 100.0, np.ones((1, len(ids)))])
        out[j, ids] = np.linalg.lstsq(a, np.append(JOINTS[j] / 100.0, 1.0), rcond=None)[0]
    return out
