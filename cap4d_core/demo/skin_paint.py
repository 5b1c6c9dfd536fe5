"""Albedo of skin and eyes, painted into the UV atlas.

Conventions: linear RGB in 0..1; image row 0 is v = 1. Everything is painted as a function of the
undeformed head (mm), so that a freckle sits on the same spot whatever the identity and expression.
float32: an atlas has a quarter of a million texels, and every subject its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import facial_hair, fields, hair
from cap4d_core.demo.noise import Noise
from cap4d_core.demo.skin_zones import (
    Floats,
    Ints,
    Texels,
    Zone,
    Zones,
    above_hairline,
    lip_rise,
    texels,
    zones,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Face:
    """How a subject's skin and eyes look; colours are linear RGB."""

    skin: Array
    blush: float
    lips: Array
    lip_strength: float
    iris: Array
    iris_rim: Array
    brow: Array
    brow_density: float
    brow_thickness: float
    brow_arch: float
    brow_height: float
    stubble: float
    freckles: float
    lashes: float
    shadow: Array
    shadow_strength: float
    age: float
    scalp: Array | None
    hair_style: hair.HairStyle | None
    beard: facial_hair.BeardStyle | None = None
    beard_color: Array | None = None


class _Canvas:
    """The colours (3,N) of all filled texels, one plane per channel."""

    def __init__(self, color: Array, num: int) -> None:
        self.c = np.repeat(np.asarray(color, np.float32)[:, None], num, 1)

    def scale(self, zone: Zone, amount: float, gains: tuple[float, float, float]) -> None:
        """Multiply by 1 - amount * weight * gain."""
        for plane, gain in zip(self.c, gains, strict=True):
            plane[zone.index] *= 1 - np.float32(amount * gain) * zone.weight

    def mix(self, index: Ints, color: Array | Floats, weight: Floats | float) -> None:
        """Mix with one colour (3,) or one per texel (3,M)."""
        w = np.clip(np.asarray(weight, np.float32), 0, 1)
        for plane, other in zip(self.c, np.asarray(color, np.float32), strict=True):
            old = plane[index]
            plane[index] = old * (1 - w) + other * w


def paint(
    face: Face, size: int, rng: np.random.Generator, beard_rng: np.random.Generator
) -> NDArray[np.float32]:
    """Paint the atlas.

    Args:
        face: what to paint.
        size: side of the atlas in pixels.
        rng: noise, freckles and moles.
        beard_rng: the roots of a beard, apart so that a beard changes nothing else.

    Returns:
        (size, size, 3) linear albedo.
    """
    t, zone = texels(size), zones(size)
    skin = face.skin
    canvas = _Canvas(skin, len(t.x))
    coarse, grain = Noise(60.0, rng, 2), Noise(7.0, rng, 2)
    tone = 0.032 * coarse.at(t.x, t.y, t.z)
    tone += 0.012 * grain.at(t.x, t.y, t.z)
    tone += 1
    canvas.c *= tone
    flush = Zone(zone.red.index, np.clip(zone.red.weight * np.float32(face.blush), 0, 1.2))
    canvas.scale(flush, 1.0, (-0.10, 0.17, 0.14))
    # Thin, cooler skin below the eyes and on the lids.
    canvas.scale(zone.under_eye, 0.16 + 0.18 * face.age, (0.7, 1.0, 0.8))
    canvas.scale(zone.lid_skin, 0.10, (0.6, 1.0, 1.0))
    # Folds: nasolabial, forehead.
    canvas.scale(zone.fold, 0.05 + 0.22 * face.age, (0.7, 1.0, 1.0))
    canvas.scale(zone.forehead_lines, 0.13 * face.age**1.5, (0.7, 1.0, 1.0))
    if face.freckles > 0:
        _paint_freckles(canvas, face, t, zone, rng)
    for _ in range(int(rng.integers(0, 4))):
        _paint_mole(canvas, face, t, zone, float(rng.uniform(-50, 50)), float(rng.uniform(-80, 60)))
    if face.stubble > 0:
        k = zone.beard.index
        rough = 0.8 + 0.15 * Noise(6.0, rng, 2).at(t.x[k], t.y[k], t.z[k])
        canvas.mix(k, face.brow * 0.8 + skin * 0.2, face.stubble * 0.75 * zone.beard.weight * rough)
    _paint_lips(canvas, face, t, zone, rng)
    canvas.scale(zone.nostrils, 0.86, (0.92, 1.0, 1.0))
    _paint_lids(canvas, face, zone)
    _paint_brows(canvas, face, t, zone, rng)
    if face.scalp is not None and face.hair_style is not None:
        _paint_scalp(canvas, face.scalp, face.hair_style, t, rng)
    if face.beard is not None and face.beard_color is not None:
        _paint_beard(canvas, face.beard, face.beard_color, t, zone, beard_rng)
    canvas.c *= zone.shade
    for index in zone.eyes:
        canvas.c[:, index] = _eye(face, t.disc[index].astype(np.float64), rng).T
    np.clip(canvas.c, 0.002, 0.98, out=canvas.c)
    out: NDArray[np.float32] = np.ascontiguousarray(canvas.c.T)[t.source]
    return out.reshape(size, size, 3)


def _paint_freckles(
    canvas: _Canvas, face: Face, t: Texels, zone: Zones, rng: np.random.Generator
) -> None:
    spots = rng.uniform([-55, -40, 20], [55, 45, 80], (240, 3))
    k, reach = zone.freckles.index, zone.freckles.weight
    x, y = t.x[k], t.y[k]
    order = np.argsort(x)
    sorted_x = x[order]
    w = np.zeros(len(k), np.float32)
    for sx, sy, _ in spots:
        r = rng.uniform(0.5, 1.1)
        first, last = np.searchsorted(sorted_x, (sx - 6 * r, sx + 6 * r))
        near = order[first:last]
        spot = np.exp(-((x[near] - sx) ** 2 + (y[near] - sy) ** 2) / (2 * r * r))
        w[near] = np.maximum(w[near], spot)
    canvas.mix(k, face.skin * np.array([0.62, 0.48, 0.40]), face.freckles * w * reach)


def _paint_mole(canvas: _Canvas, face: Face, t: Texels, zone: Zones, x: float, y: float) -> None:
    k = np.where((np.abs(t.x - x) < 5.0) & (np.abs(t.y - y) < 5.0) & (zone.front > 0))[0]
    spot = np.exp(-((t.x[k] - x) ** 2 + (t.y[k] - y) ** 2) / 1.6)
    canvas.mix(k, face.skin * 0.30, 0.85 * spot * zone.front[k])


def _paint_lips(
    canvas: _Canvas, face: Face, t: Texels, zone: Zones, rng: np.random.Generator
) -> None:
    k = zone.lips.index
    x, y, z = t.x[k], t.y[k], t.z[k]
    tone = 1 + 0.07 * np.sin(1.9 * x + 2 * Noise(9.0, rng).at(x, y, z))
    tone = np.where(y - lip_rise(x) > -46.3, tone * 0.88, tone)
    canvas.mix(k, face.lips[:, None] * tone, zone.lips.weight * face.lip_strength)
    canvas.scale(zone.seam, 0.55, (1.0, 1.0, 1.0))
    canvas.mix(zone.inner_lips, face.lips * 0.42, 1.0)


def _paint_lids(canvas: _Canvas, face: Face, zone: Zones) -> None:
    """Lash line, waterline, make-up, crease."""
    canvas.mix(zone.make_up.index, face.shadow, face.shadow_strength * zone.make_up.weight)
    lash = zone.lashes.weight * np.where(zone.upper_lashes, face.lashes, 0.35 * face.lashes)
    canvas.mix(zone.lashes.index, np.array([0.012, 0.010, 0.010]), lash)
    canvas.mix(zone.lid_margin, face.skin * np.array([0.85, 0.52, 0.48]), 1.0)
    corner = 0.5 * face.skin + np.array([0.25, 0.10, 0.09])
    canvas.mix(zone.eye_corner.index, corner, 0.6 * zone.eye_corner.weight)
    canvas.scale(zone.crease, 0.38, (0.8, 1.0, 1.0))


def _paint_brows(
    canvas: _Canvas, face: Face, t: Texels, zone: Zones, rng: np.random.Generator
) -> None:
    k = zone.brows
    x, y, z = t.x[k], t.y[k], t.z[k]
    a = np.abs(x)
    s = np.clip((a - 11.5) / 36.0, -0.2, 1.2)  # 0 inner end, 1 tail
    line = (
        37.2
        + face.brow_height
        + face.brow_arch * 5.5 * np.sin(np.clip(s, 0, 1) * 2.35)
        - 3.0 * np.clip(s, 0, 1) ** 2.2
    )
    half = face.brow_thickness * (3.1 - 2.0 * np.clip(s, 0, 1) ** 1.4)
    d = (y - line) / half
    ends = fields.smoothstep(s, -0.06, 0.07) * (1 - fields.smoothstep(s, 0.93, 1.07))
    body = np.exp(-(np.abs(d) ** 3)) * ends
    # Hairs lean outwards and up near the nose, along the brow at its tail.
    lean = a - (0.9 - 0.9 * np.clip(s, 0, 1)) * (y - line)
    coarse, fine = Noise(6.0, rng), Noise(3.0, rng)
    hairs = 0.68 + 0.32 * np.sin(lean * 3.4 + 2.0 * coarse.at(x, y, z)) * (
        0.7 + 0.3 * fine.at(x, y, z)
    )
    canvas.mix(k, face.brow, face.brow_density * body * np.clip(hairs, 0.2, 1.0))


def _paint_scalp(
    canvas: _Canvas, color: Array, style: hair.HairStyle, t: Texels, rng: np.random.Generator
) -> None:
    """Under the hair, and softly across the hairline, so that hair looks rooted."""
    k, above = above_hairline(t.size, style)
    strands = Noise(4.0, rng, 2)
    root = np.ones(len(k), np.float32)
    line = np.where(above < 15.0)[0]  # further up the noise makes no difference
    i = k[line]
    a, y, z = np.abs(t.x[i]), t.y[i], t.z[i]
    ragged = above[line] + 2.5 * strands.at(a, 0.12 * y, 0.12 * z)
    root[line] = fields.smoothstep(ragged, -4.5, 3.5)
    x, y, z = np.abs(t.x[k]), t.y[k], t.z[k]
    ear = np.where(x > 70)[0]
    points = np.stack([x[ear], y[ear], z[ear]], -1)
    root[ear] *= 1 - fields.bump(points, (76, 3, -44), (10, 30, 18))
    canvas.mix(k, color, 0.88 * root)


def _paint_beard(
    canvas: _Canvas,
    style: facial_hair.BeardStyle,
    color: Array,
    t: Texels,
    zone: Zones,
    rng: np.random.Generator,
) -> None:
    """Under the beard, so that its shell looks rooted and its edge soft."""
    k = zone.lower_face
    x, y, z = t.x[k], t.y[k], t.z[k]
    ragged, grain = Noise(7.0, rng, 2).at(x, y, z), Noise(3.5, rng, 2).at(x, y, z)
    points = np.asfortranarray(np.stack([x, y, z], -1).astype(np.float64))
    cover = facial_hair.coverage(style, points, ragged.astype(np.float64))
    strength = 0.5 if style.name == "stubble" else 0.75
    canvas.mix(k, color, strength * cover * np.clip(0.85 + 0.2 * grain, 0, 1))


def _eye(face: Face, disc: Array, rng: np.random.Generator) -> Array:
    """Sclera, iris and pupil over the unit disc, which magnifies the front of the eye."""
    rho, angle = np.hypot(disc[:, 0], disc[:, 1]), np.arctan2(disc[:, 1], disc[:, 0])
    phi = np.pi * rho ** (1.35 / 0.85)
    iris_edge, pupil = 0.47, 0.185
    veins = np.clip(np.sin(9 * angle + 6 * phi + 2 * np.sin(5 * angle)), 0.9, 1.0) * 10 - 9
    sclera = np.array([0.54, 0.515, 0.50]) * np.ones((len(rho), 3))
    sclera *= 1 - (
        0.10 * fields.smoothstep(phi, 0.55, 1.2) + 0.10 * veins * fields.smoothstep(phi, 0.6, 1.1)
    )[:, None] * np.array([0.25, 1.0, 1.0])
    table = rng.uniform(-1, 1, 96)
    k = (angle / (2 * np.pi) % 1.0) * 96
    i = np.floor(k).astype(int)
    streak = table[i % 96] * (1 - (k - i)) + table[(i + 1) % 96] * (k - i)
    r = np.clip((phi - pupil) / (iris_edge - pupil), 0, 1)
    iris = face.iris * (1.0 + 0.35 * streak * (1 - 0.4 * r))[:, None] * (1.25 - 0.5 * r)[:, None]
    iris = _mix(
        iris, face.iris * np.array([1.35, 1.05, 0.75]), 0.55 * np.exp(-(((r - 0.18) / 0.16) ** 2))
    )
    iris = _mix(iris, face.iris_rim, fields.smoothstep(r, 0.72, 1.0))
    # Light enters from above: the lower half of the iris glows.
    iris = iris * (1.0 - 0.25 * np.sin(angle) * np.clip(r, 0, 1))[:, None]
    out = _mix(sclera, iris, 1 - fields.smoothstep(phi, iris_edge - 0.025, iris_edge + 0.035))
    return _mix(
        out, np.array([0.006, 0.006, 0.007]), 1 - fields.smoothstep(phi, pupil - 0.02, pupil + 0.02)
    )


def _mix(color: Array, other: Array, weight: Array) -> Array:
    w = np.clip(weight, 0, 1)[:, None]
    out: Array = color * (1 - w) + other * w
    return out
