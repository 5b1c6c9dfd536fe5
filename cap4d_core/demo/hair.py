"""Hair as a shell around the scalp, with strands in its relief and colour.

Conventions: millimetres while building. The shell is a grid over longitude (0 in front, +pi/2 at
the subject's left) and a row parameter that runs over the crown by latitude and then straight down
by height. Where a style has no hair the shell dives below the skin, so that skin and hair meet in a
natural, ragged hairline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy, attachments, fields

Array = NDArray[np.float64]

ROWS_CAP, ROWS_DROP, COLS = 34, 26, 224
ORIGIN = np.array([0.0, 20.0, -40.0])
_LON = np.radians([0, 14, 27, 38, 50, 61, 70, 76, 82, 90, 108, 117, 130, 150, 180])
_HAIRLINE = np.array([91.0, 90, 86, 76, 57, 40, 16, -2, 30, 42, 38, 6, -26, -48, -56])


@dataclass(frozen=True)
class HairStyle:
    """Shape of the hair; lengths in mm.

    top, sides, back: thickness of the shell. fringe: how far hair falls over the forehead. recede:
    how far the
    hairline goes back at the temples. part: x of the parting, None without. curl: size of the
    curls' relief.
    drop: height down to which hair hangs, None if it ends at the hairline. cover_ears: hang over
    the ears.
    bun: radius of a bun at the back of the crown. quiff: extra height above the forehead.
    """

    name: str
    top: float
    sides: float
    back: float
    fringe: float = 0.0
    recede: float = 0.0
    part: float | None = None
    curl: float = 0.0
    drop: float | None = None
    cover_ears: bool = False
    bun: float = 0.0
    quiff: float = 0.0


STYLES: dict[str, HairStyle] = {
    s.name: s
    for s in (
        HairStyle("buzz", 3.0, 2.2, 2.5),
        HairStyle("short", 13.0, 6.0, 8.0, quiff=4.0),
        HairStyle("side_part", 18.0, 8.0, 9.0, part=28.0, quiff=5.0),
        HairStyle("slick", 10.0, 6.0, 8.0, recede=4.0),
        HairStyle("quiff", 16.0, 4.5, 6.0, quiff=16.0),
        HairStyle("receding", 6.0, 5.0, 6.0, recede=20.0),
        HairStyle("curly_short", 20.0, 13.0, 16.0, curl=3.2, fringe=4.0),
        HairStyle("curly_full", 27.0, 24.0, 26.0, curl=4.5, fringe=6.0),
        HairStyle("bob", 15.0, 15.0, 16.0, part=18.0, drop=-62.0, cover_ears=True),
        HairStyle("bob_fringe", 15.0, 16.0, 16.0, fringe=34.0, drop=-58.0, cover_ears=True),
        HairStyle("long", 13.0, 13.0, 18.0, part=0.0, drop=-165.0, cover_ears=True),
        HairStyle("long_side", 15.0, 14.0, 18.0, part=-26.0, drop=-150.0, cover_ears=True),
        HairStyle("long_back", 13.0, 8.0, 18.0, recede=2.0, drop=-150.0),
        HairStyle("wavy", 17.0, 18.0, 20.0, part=20.0, drop=-120.0, cover_ears=True, curl=2.2),
        HairStyle("bun", 8.0, 5.0, 6.0, bun=27.0),
        HairStyle("crop_fringe", 13.0, 6.0, 8.0, fringe=20.0),
    )
}


def _noise1(x: Array, table: Array) -> Array:
    """Smooth periodic noise in [-1,1] of x (period len(table))."""
    n = len(table)
    i = np.floor(x).astype(int)
    f = x - i
    f = f * f * (3 - 2 * f)
    out: Array = table[i % n] * (1 - f) + table[(i + 1) % n] * f
    return out


def _scalp_distance(p: Array) -> Array:
    """Cranium, face and neck without features or ears."""
    u, e = anatomy.smooth_union, anatomy.ellipsoid
    d = e(p, (0, 50, -37), (74, 84, 95))
    d = u(d, e(p, (0, 56, -10), (63, 58, 70)), 24)
    d = u(d, e(p, (0, -8, -6), (64, 60, 60)), 22)
    d = u(d, anatomy.capsule(p, (43, -42, -14), (10, -76, 42), 14, 12), 30)
    return u(d, anatomy.capsule(p, (0, -36, -44), (0, -200, -50), 47, 52), 34)


def hairline(lon: Array, style: HairStyle) -> Array:
    """Height of the hairline at longitudes (mm)."""
    a = np.abs((lon + np.pi) % (2 * np.pi) - np.pi)
    h = np.interp(a, _LON, _HAIRLINE)
    temple = np.exp(-(((a - 0.62) / 0.30) ** 2))
    h = h + style.recede * (temple + 0.45 * np.exp(-((a / 0.5) ** 2)))
    h = h - style.fringe * fields.smoothstep(0.95 - a, 0.0, 0.35)
    if style.drop is not None:
        start = 1.02 if style.cover_ears else 2.05
        hang = fields.smoothstep(a, start, start + 0.14)
        h = h * (1 - hang) + np.minimum(h, style.drop) * hang
    return h


@lru_cache(maxsize=16)
def _rays(low: float) -> tuple[Array, Array, Array]:
    """Origins, directions (N,3) and lengths (N,) of the rays that end on the scalp.

    Args:
        low: height of the last row.
    """
    lon = 2 * np.pi * np.arange(COLS) / COLS
    lat = np.pi / 2 - (np.pi / 2 - 0.03) * np.linspace(0, 1, ROWS_CAP) ** 0.85
    lat[0] = np.pi / 2 - 0.01
    heights = ORIGIN[1] + np.linspace(-1.5, low - ORIGIN[1], ROWS_DROP)
    flat = np.stack([np.sin(lon), np.zeros(COLS), np.cos(lon)], -1)
    cap_dir = np.cos(lat)[:, None, None] * flat + np.sin(lat)[:, None, None] * np.array([0, 1.0, 0])
    direction = np.concatenate([cap_dir, np.broadcast_to(flat, (ROWS_DROP, COLS, 3))])
    origin = np.broadcast_to(ORIGIN, direction.shape).copy()
    origin[ROWS_CAP:, :, 1] = heights[:, None]
    d = np.asfortranarray(direction.reshape(-1, 3))
    o = np.asfortranarray(origin.reshape(-1, 3))
    r = np.full(len(d), 150.0)
    for _ in range(26):
        r -= 0.9 * _scalp_distance(o + r[:, None] * d)
    return o, d, r


def build_hair(
    style: HairStyle, color: Array, skin: Array, rng: np.random.Generator
) -> attachments.Attachment:
    """The hair shell of one subject.

    Args:
        style: its shape.
        color: (3,) linear albedo.
        skin: (V,3) rest vertices in metres, to bind to.
        rng: strands and curls.
    """
    lon = 2 * np.pi * np.arange(COLS) / COLS
    o, d, r = _rays(-70.0 if style.drop is None else style.drop - 6.0)
    p = o + r[:, None] * d
    x, y, z = p.T
    rows = ROWS_CAP + ROWS_DROP
    lon_all = np.tile(lon, rows)
    a = np.abs((lon_all + np.pi) % (2 * np.pi) - np.pi)

    strand_table, curl_phase = rng.uniform(-1, 1, 1024), rng.uniform(0, 6.28, (6, 3))
    # Strands run backwards from the face on top (constant x), downwards on the sides (constant
    # longitude).
    top = fields.smoothstep(y, 70.0, 112.0)
    part_x = style.part if style.part is not None else 1e3
    sweep = (x - part_x) * 0.4 if style.part is not None else x
    s_top = 0.55 * (sweep + 0.25 * z * (style.part is not None))
    s_side = lon_all * 34.0 + 0.03 * y
    coarse = top * _noise1(s_top * 0.45, strand_table) + (1 - top) * _noise1(
        s_side * 0.45, strand_table
    )
    fine = top * _noise1(s_top * 1.6 + 37, strand_table) + (1 - top) * _noise1(
        s_side * 1.6 + 37, strand_table
    )
    if style.curl > 0:
        k = 2 * np.pi / np.array([30.0, 21.0, 15.0])
        w = [
            np.sin((p * (k[i % 3] * _unit_rows(curl_phase)[i])).sum(1) + curl_phase[i, 0])
            for i in range(6)
        ]
        curl = (w[0] * w[1] + w[2] * w[3] + 0.7 * w[4] * w[5]) / 1.6
        coarse, fine = 0.4 * coarse + 0.9 * curl, 0.5 * fine + 0.6 * w[5] * w[2]
    else:
        curl = np.zeros(len(p))

    ragged = 0.6 if style.name == "buzz" else 2.2 if style.fringe < 10 else 4.0
    line = hairline(lon_all, style) + ragged * (
        _noise1(lon_all * 9.0, strand_table) + 0.5 * _noise1(lon_all * 24.0 + 11, strand_table)
    )
    inside = y - line
    ramp = 6.0 if style.name == "buzz" else 22.0 if style.fringe < 10 else 12.0
    grow = fields.smoothstep(inside, 0.0, ramp)
    back = fields.smoothstep(a, 1.9, 2.6)
    thick = style.top * top + (1 - top) * (style.sides * (1 - back) + style.back * back)
    thick = thick + style.quiff * np.exp(-(((y - 108) / 26) ** 2)) * np.exp(
        -((a / 0.75) ** 2)
    ) * np.cos(0.8 * a)
    relief = 0.06 * style.top + 0.35
    thick = thick + relief * (0.9 * coarse + 0.45 * fine) + style.curl * curl
    if style.part is not None:
        on_part = (
            np.exp(-(((x - style.part) / 4.0) ** 2)) * fields.smoothstep(y, 78.0, 95.0) * (z > -90)
        )
        thick = thick * (1 - 0.6 * on_part)
    else:
        on_part = np.zeros(len(p))
    # Through zero at the hairline, so that the cut with the skin is a clean curve between grid
    # points.
    height = np.clip(0.35 * inside, -5.0, 1.0) + thick * grow

    r_new = r + height
    if style.drop is not None:
        # Hanging hair keeps the width it has at ear level instead of following jaw and neck.
        level = r_new.reshape(rows, COLS)[ROWS_CAP - 6]
        fall = np.clip((ORIGIN[1] - y) / max(ORIGIN[1] - style.drop, 1.0), 0, 1)
        width = np.tile(np.maximum(level, 81.0 * fields.smoothstep(a[:COLS], 1.1, 1.5)), rows)
        taper = 1.0 - (0.07 if style.drop > -90 else 0.16) * fall**2
        hang = fields.smoothstep(ORIGIN[1] + 28.0 - y, 0.0, 34.0) * fields.smoothstep(
            inside, -1.0, 3.0
        )
        wave = 2.5 * np.sin(y / 15.0 + 3 * np.sin(2 * lon_all)) * (style.curl > 0)
        free = width * taper + relief * (0.9 * coarse + 0.5 * fine) + wave
        # Locks leave the temple flat and sweep back on their way down.
        start = 1.03 + 0.22 * fall + 0.05 * _noise1(y * 0.09, strand_table)
        front_edge = (
            fields.smoothstep(a, start, start + 0.45) if style.cover_ears else np.ones(len(a))
        )
        seen = (
            fields.smoothstep(a, start - 0.06, start + 0.04)
            if style.cover_ears
            else np.ones(len(a))
        )
        goal = np.clip(free, r + 4.0, r + 36.0)
        lock = (r - 5.0) + 6.5 * seen
        height = np.where(
            y < ORIGIN[1], np.minimum(height, 7.0 * seen - 5.0 + 40.0 * front_edge), height
        )
        r_new = r_new * (1 - hang) + hang * (lock * (1 - front_edge) + goal * front_edge)
    q = o + r_new[:, None] * d

    # Colour: strands, darker roots, deep grooves and hairline; sun-lit tips on top.
    tone = 1.0 + 0.30 * coarse + 0.30 * fine
    tone *= 0.74 + 0.26 * fields.smoothstep(inside, 0.0, 22.0)
    tone *= 1.0 - 0.35 * on_part
    tone *= 0.86 + 0.14 * fields.smoothstep(y, -60.0, 70.0)
    colors = np.clip(color * tone[:, None], 0.003, 0.95)
    faces = attachments.grid_faces(rows, COLS, True)
    # Triangles that lie below the skin everywhere are of no use.
    hidden = (height < -0.6)[faces].all(1)
    faces = faces[~hidden]
    if style.bun > 0:
        q, faces, colors = _add_bun(q, faces, colors, style.bun, color, rng)
    idx, w3 = attachments.bind(1e-3 * q, skin)
    return attachments.Attachment(
        1e-3 * q, faces, colors, attachments.HAIR, idx, w3, False, np.zeros(len(q), bool)
    )


def _unit_rows(v: Array) -> Array:
    w = v - np.pi
    out: Array = w / np.linalg.norm(w, axis=1, keepdims=True)
    return out


def _add_bun(
    q: Array,
    faces: NDArray[np.int64],
    colors: Array,
    radius: float,
    color: Array,
    rng: np.random.Generator,
) -> tuple[Array, NDArray[np.int64], Array]:
    rows, cols = 22, 40
    phi = np.pi * np.linspace(0, 1, rows)
    theta = 2 * np.pi * np.arange(cols) / cols
    pp, tt = np.meshgrid(phi, theta, indexing="ij")
    twist = np.sin(7 * tt + 5 * pp)
    rr = radius * (1 + 0.05 * twist)
    ball = np.stack(
        [rr * np.sin(pp) * np.sin(tt), 0.85 * rr * np.cos(pp), rr * np.sin(pp) * np.cos(tt)], -1
    )
    ball = ball.reshape(-1, 3) + np.array([0, 118.0, -105.0])
    tone = 1.0 + 0.25 * twist + 0.08 * rng.standard_normal(twist.shape)
    return (
        np.concatenate([q, ball]),
        np.concatenate([faces, attachments.grid_faces(rows, cols, True) + len(q)]),
        np.concatenate([colors, np.clip(color * tone.reshape(-1, 1), 0.003, 0.95)]),
    )
