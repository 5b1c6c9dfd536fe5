"""Albedo of skin and eyes, painted into the UV atlas.

Conventions: linear RGB in 0..1; image row 0 is v = 1. Everything is painted as a function of the
undeformed head (mm), so that a freckle sits on the same spot whatever the identity and expression.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from cap4d_core.demo import fields, hair, head
from cap4d_core.geometry.mesh_rasterizer import rasterize

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


@dataclass(frozen=True)
class Texels:
    """Filled texels of the atlas and what lies under them (N = their number)."""

    size: int
    index: NDArray[np.int64]  # (N,) flat texel
    nearest: NDArray[np.int64]  # (size*size,) flat texel whose colour an empty one takes
    p: Array  # (N,3) mm
    part: NDArray[np.int64]  # 0 skin, 1 eye +x, 2 eye -x
    disc: Array  # (N,2) unit disc on eyes
    lip: Array  # signed loop number at the lips (99 elsewhere), see `topology.Skin`
    lid: Array
    lid_side: Array
    visibility: Array


@lru_cache(maxsize=2)
def texels(size: int) -> Texels:
    """Rasterise the demo head's atlas at size x size."""
    h = head.build_demo_head()
    uv = torch.from_numpy(h.corner_uv.reshape(-1, 2)).float()
    corners = torch.stack([1 - 2 * uv[:, 0], 2 * uv[:, 1] - 1, torch.ones(len(uv))], -1)[None]
    ids = torch.arange(len(uv)).reshape(-1, 3)
    fragments = rasterize(corners, ids, (size, size))
    face = fragments.face_index[0].numpy().ravel()
    bary = fragments.barycentrics[0].numpy().reshape(-1, 3).astype(np.float64)
    full = np.where(face >= 0)[0]
    f, b = face[full], bary[full][:, :, None]
    tri = h.faces[f]
    num_skin_faces = len(h.faces) - 2 * len(h.eye_disc)
    eye_faces = len(h.eye_disc)
    part = np.where(f < num_skin_faces, 0, np.where(f < num_skin_faces + eye_faces, 1, 2))
    disc = np.zeros((len(f), 2))
    eye = part > 0
    disc[eye] = (h.eye_disc[(f[eye] - num_skin_faces) % eye_faces] * b[eye]).sum(1)
    pts = h.points

    def at(values: Array) -> Array:
        out: Array = (values[tri] * b[..., 0]).sum(1)
        return out

    # Loop numbers mean nothing across their outermost loop: clip before interpolating.
    lip, lid = np.minimum(pts.lip_ring, 5).astype(float), np.minimum(pts.lid_ring, 5).astype(float)
    empty = np.ones(size * size, bool)
    empty[full] = False
    nearest = distance_transform_edt(
        empty.reshape(size, size), return_distances=False, return_indices=True
    )
    flat = (nearest[0] * size + nearest[1]).ravel()
    return Texels(
        size,
        full,
        flat.astype(np.int64),
        (pts.p[tri] * b).sum(1),
        part,
        disc,
        at(lip),
        at(lid),
        at(pts.lid_side),
        at(h.visibility),
    )


def noise(p: Array, wavelength: float, rng: np.random.Generator, octaves: int = 1) -> Array:
    """Smooth noise of points (N,3), about unit variance."""
    out = np.zeros(len(p))
    gain = 1.0
    norm = 0.0
    for _ in range(octaves):
        k = rng.standard_normal((5, 3))
        k *= (2 * np.pi / wavelength) / np.linalg.norm(k, axis=1, keepdims=True)
        phase = rng.uniform(0, 2 * np.pi, 5)
        out += gain * np.sin(p @ k.T + phase).sum(1) * 0.63
        norm += gain * gain
        gain *= 0.6
        wavelength *= 0.47
    scaled: Array = out / np.sqrt(norm)
    return scaled


def _mix(color: Array, other: Array, weight: Array) -> Array:
    w = np.clip(weight, 0, 1)[:, None]
    out: Array = color * (1 - w) + other * w
    return out


def _lip_rise(x: Array) -> Array:
    """How much higher the lip line lies at x than in the middle (mm)."""
    out: Array = 1.1 * np.clip(np.abs(x) / 26.0, 0, 1.1) ** 2
    return out


def lip_mask(x: Array, y: Array) -> tuple[Array, Array]:
    """Soft masks of the upper and lower lip's red in front view (mm)."""
    a = np.abs(x)
    end = 26.0
    t = np.clip(1 - a / end, 0, 1)
    bow = 0.6 + 1.15 * np.exp(-(((a - 6.0) / 4.0) ** 2)) - 0.5 * np.exp(-((a / 3.0) ** 2))
    top = -45.4 + 7.6 * t**0.62 + bow * np.clip(3 * t, 0, 1)
    bottom = -46.2 - 10.8 * np.clip(1 - (a / end) ** 2, 0, 1) ** 0.85
    soft = 0.9
    y = y - _lip_rise(x)
    upper = fields.smoothstep(top - y, -soft, soft) * (y > -46.3) * (a < end + 1)
    lower = fields.smoothstep(y - bottom, -soft, soft) * (y <= -46.3) * (a < end + 1)
    return upper, lower


def paint(face: Face, size: int, rng: np.random.Generator) -> Array:
    """Paint the atlas.

    Returns:
        (size, size, 3) linear albedo.
    """
    t = texels(size)
    x, y, z = t.p.T
    a = np.abs(x)
    m = np.stack([a, y, z], -1)
    front = fields.smoothstep(z, 5.0, 30.0)
    c = np.tile(face.skin, (len(t.p), 1))
    c *= (1 + 0.032 * noise(t.p, 60.0, rng, 2) + 0.012 * noise(t.p, 7.0, rng, 2))[:, None]

    def bump(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Array:
        return fields.bump(m, (cx, cy, cz), (rx, ry, rz))

    red = (
        bump(38, -12, 40, 15, 15, 22)
        + 0.55 * bump(0, -14, 78, 12, 11, 16)
        + 0.5 * bump(76, 3, -42, 18, 34, 22)
    )
    red = red + 0.35 * bump(0, -76, 60, 13, 11, 20)
    c *= 1 + np.clip(red * face.blush, 0, 1.2)[:, None] * np.array([0.10, -0.17, -0.14])
    # Thin, cooler skin below the eyes and on the lids.
    c *= 1 - (0.16 + 0.18 * face.age) * bump(29, 9.5, 46, 12, 5, 18)[:, None] * np.array(
        [0.7, 1.0, 0.8]
    )
    c *= 1 - 0.10 * bump(31, 29, 48, 17, 7, 20)[:, None] * np.array([0.6, 1.0, 1.0])
    # Folds: nasolabial, forehead, corners of the eyes.
    fold = (
        np.exp(-(((a - (15.5 + 0.42 * (-y - 20))) / 1.7) ** 2))
        * fields.smoothstep(-y, 18.0, 26.0)
        * (1 - fields.smoothstep(-y, 36.0, 46.0))
        * front
    )
    lines = sum(
        np.exp(-(((y - h0 - 0.002 * x**2 - 1.2 * np.sin(x / 13 + h0)) / 1.0) ** 2))
        for h0 in (57.0, 66.0, 75.5)
    )
    lines = lines * np.clip(1 - (a / 42) ** 2, 0, 1) * front
    c *= 1 - ((0.05 + 0.22 * face.age) * fold + 0.13 * face.age**1.5 * lines)[:, None] * np.array(
        [0.7, 1.0, 1.0]
    )
    # Freckles.
    if face.freckles > 0:
        spots = rng.uniform([-55, -40, 20], [55, 45, 80], (240, 3))
        w = np.zeros(len(t.p))
        near = np.where(front * (y > -45) * (y < 50) > 0.2)[0]
        for sx, sy, _ in spots:
            r = rng.uniform(0.5, 1.1)
            w[near] = np.maximum(
                w[near], np.exp(-((x[near] - sx) ** 2 + (y[near] - sy) ** 2) / (2 * r * r))
            )
        zone = bump(26, 0, 55, 34, 22, 50) * front
        c = _mix(c, face.skin * np.array([0.62, 0.48, 0.40]), face.freckles * w * zone)
    # Moles.
    for _ in range(int(rng.integers(0, 4))):
        mx, my = rng.uniform(-50, 50), rng.uniform(-80, 60)
        c = _mix(c, face.skin * 0.30, 0.85 * np.exp(-((x - mx) ** 2 + (y - my) ** 2) / 1.6) * front)
    # Beard shadow.
    if face.stubble > 0:
        jaw = fields.smoothstep(-(y + 0.30 * a), 22.0, 40.0) * (
            1 - fields.smoothstep(-y, 96.0, 112.0)
        )
        jaw = np.maximum(jaw, bump(0, -32, 68, 26, 6.5, 22)) * fields.smoothstep(z, -38.0, -15.0)
        jaw *= 1 - bump(40, -18, 36, 16, 18, 26)
        grain = 0.8 + 0.15 * noise(t.p, 6.0, rng, 2)
        c = _mix(c, face.brow * 0.8 + face.skin * 0.2, face.stubble * jaw * grain * 0.75)
    # Lips.
    upper, lower = lip_mask(x, y)
    zone = (z > 38) & (t.part == 0)
    mask = np.where(zone, upper + lower, 0.0)
    mask = np.where(t.lip < 0.4, np.where(zone, 1.0, mask), mask)
    lip_color = face.lips * (1 + 0.07 * np.sin(1.9 * x + 2 * noise(t.p, 9.0, rng)))[:, None]
    lip_color = np.where((y - _lip_rise(x) > -46.3)[:, None], lip_color * 0.88, lip_color)
    c = _mix(c, lip_color, mask * face.lip_strength)
    seam = np.exp(-((np.minimum(t.lip, 5) / 0.55) ** 2)) * zone
    c *= 1 - 0.55 * (seam * (t.lip > -0.8))[:, None]
    c = np.where((t.lip < -0.5)[:, None] & zone[:, None], face.lips * 0.42, c)
    # Nostrils.
    c *= 1 - 0.86 * (bump(6.0, -23.0, 69.5, 3.6, 2.5, 5.5))[:, None] * np.array([0.92, 1.0, 1.0])
    # Lids: lash line, waterline, make-up, crease.
    is_up = t.lid_side > 0.15
    near_lid = t.lid < 4.5
    make_up = np.exp(-(((t.lid - 0.9) / 1.1) ** 2)) * is_up * near_lid
    c = _mix(c, face.shadow, face.shadow_strength * make_up)
    lash = np.exp(-(np.abs(t.lid / np.where(t.lid > 0, 0.62, 0.5)) ** 3)) * near_lid
    c = _mix(
        c, np.array([0.012, 0.010, 0.010]), lash * np.where(is_up, face.lashes, 0.35 * face.lashes)
    )
    margin = near_lid & (t.lid < -0.45) & (t.part == 0)
    c = np.where(margin[:, None], face.skin * np.array([0.85, 0.52, 0.48]), c)
    inner = bump(16.5, 20.5, 44, 2.6, 2.2, 6.0) * (t.part == 0)
    c = _mix(c, 0.5 * face.skin + np.array([0.25, 0.10, 0.09]), 0.6 * inner)
    crease = (
        np.exp(-(((t.lid - 1.75) / 0.30) ** 2))
        * is_up
        * near_lid
        * fields.smoothstep(14.5 - np.abs(a - 32), 0, 5)
    )
    c *= 1 - 0.38 * crease[:, None] * np.array([0.8, 1.0, 1.0])
    c = _paint_brows(c, face, x, y, z, t, rng)
    # The scalp takes the hair's colour under the hair, softly across the hairline, so that hair
    # looks rooted.
    if face.scalp is not None and face.hair_style is not None:
        q = t.p - hair.ORIGIN
        line = hair.hairline(np.arctan2(q[:, 0], q[:, 2]), face.hair_style)
        strands = 2.5 * noise(m * np.array([1.0, 0.12, 0.12]), 4.0, rng, 2)
        root = fields.smoothstep(y - line + strands, -4.5, 3.5) * (t.part == 0) * (z + 0.0 * y < 70)
        root *= 1 - bump(76, 3, -44, 10, 30, 18) * (a > 70)
        c = _mix(c, face.scalp, 0.88 * root)
    c *= np.where(t.part == 0, 0.42 + 0.58 * t.visibility, 1.0)[:, None]
    for part, side in ((1, 1.0), (2, -1.0)):
        sel = t.part == part
        c[sel] = _eye(face, t.disc[sel], side, rng)
    image = np.zeros((size * size, 3))
    image[t.index] = np.clip(c, 0.002, 0.98)
    return image[t.nearest].reshape(size, size, 3)


def _paint_brows(
    c: Array, face: Face, x: Array, y: Array, z: Array, t: Texels, rng: np.random.Generator
) -> Array:
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
    body = np.exp(-(np.abs(d) ** 3)) * ends * (z > 10) * (t.part == 0)
    # Hairs lean outwards and up near the nose, along the brow at its tail.
    lean = a - (0.9 - 0.9 * np.clip(s, 0, 1)) * (y - line)
    hairs = 0.68 + 0.32 * np.sin(lean * 3.4 + 2.0 * noise(t.p, 6.0, rng)) * (
        0.7 + 0.3 * noise(t.p, 3.0, rng)
    )
    return _mix(c, face.brow, face.brow_density * body * np.clip(hairs, 0.2, 1.0))


def _eye(face: Face, disc: Array, side: float, rng: np.random.Generator) -> Array:
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
