"""What lies under each texel of the demo atlas, and where on a face each kind of paint goes.

Conventions: millimetres of the undeformed head; one entry per filled texel, float32. Nothing here
depends on the subject, so it is computed once per atlas size and process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from cap4d_core.demo import fields, hair, head
from cap4d_core.geometry.mesh_rasterizer import rasterize

Floats = NDArray[np.floating[Any]]  # float32 where kept
Ints = NDArray[np.int64]

# Weights below this change no byte of a picture.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Texels:
    """Filled texels of the atlas and what lies under them (N = their number).

    size: side of the atlas. source (size*size,): the filled texel whose colour a texel takes.
    x, y, z (N,): point on the undeformed head. part (N,): 0 skin, 1 eye +x, 2 eye -x. disc (N,2):
    unit disc on eyes. lip, lid, lid_side (N,): signed loop numbers, see `topology.Skin`, 5 and more
    elsewhere. visibility (N,): ambient visibility at rest.
    """

    size: int
    source: Ints
    x: Floats
    y: Floats
    z: Floats
    part: Ints
    disc: Floats
    lip: Floats
    lid: Floats
    lid_side: Floats
    visibility: Floats


@dataclass(frozen=True)
class Zone:
    """Texels that one kind of paint reaches: index (M,) into the filled ones, weight (M,)."""

    index: Ints
    weight: Floats


@dataclass(frozen=True)
class Zones:
    """Where on a face each kind of paint goes; front (N,) is 1 on the face, 0 behind."""

    front: Floats
    red: Zone
    under_eye: Zone
    lid_skin: Zone
    fold: Zone
    forehead_lines: Zone
    freckles: Zone
    beard: Zone
    lips: Zone
    seam: Zone
    inner_lips: Ints
    nostrils: Zone
    make_up: Zone
    lashes: Zone
    upper_lashes: NDArray[np.bool_]  # of the zone of lashes
    lid_margin: Ints
    eye_corner: Zone
    crease: Zone
    brows: Ints
    lower_face: Ints  # what a beard may cover
    shade: Floats  # of every texel
    eyes: tuple[Ints, Ints]


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

    def at(values: NDArray[np.float64]) -> Floats:
        return (values[tri] * b[..., 0]).sum(1).astype(np.float32)

    # Loop numbers mean nothing across their outermost loop: clip before interpolating.
    lip, lid = np.minimum(pts.lip_ring, 5).astype(float), np.minimum(pts.lid_ring, 5).astype(float)
    filled = np.full(size * size, -1, np.int64)
    filled[full] = np.arange(len(full))
    nearest = distance_transform_edt(
        (filled < 0).reshape(size, size), return_distances=False, return_indices=True
    )
    source = filled[(nearest[0] * size + nearest[1]).ravel()]
    return Texels(
        size,
        source,
        at(pts.p[:, 0]),
        at(pts.p[:, 1]),
        at(pts.p[:, 2]),
        part.astype(np.int64),
        disc.astype(np.float32),
        at(lip),
        at(lid),
        at(pts.lid_side),
        at(h.visibility),
    )


def lip_rise(x: Floats) -> Floats:
    """How much higher the lip line lies at x than in the middle (mm)."""
    out: Floats = 1.1 * np.clip(np.abs(x) / 26.0, 0, 1.1) ** 2
    return out


def lip_mask(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Soft masks of the upper and lower lip's red in front view (mm)."""
    a = np.abs(x)
    end = 26.0
    t = np.clip(1 - a / end, 0, 1)
    bow = 0.6 + 1.15 * np.exp(-(((a - 6.0) / 4.0) ** 2)) - 0.5 * np.exp(-((a / 3.0) ** 2))
    top = -45.4 + 7.6 * t**0.62 + bow * np.clip(3 * t, 0, 1)
    bottom = -46.2 - 10.8 * np.clip(1 - (a / end) ** 2, 0, 1) ** 0.85
    soft = 0.9
    y = y - lip_rise(x)
    upper = fields.smoothstep(top - y, -soft, soft) * (y > -46.3) * (a < end + 1)
    lower = fields.smoothstep(y - bottom, -soft, soft) * (y <= -46.3) * (a < end + 1)
    return upper, lower


def _zone(weight: Floats) -> Zone:
    index = np.where(weight > _NOTHING)[0]
    return Zone(index, weight[index].astype(np.float32))


@lru_cache(maxsize=2)
def zones(size: int) -> Zones:
    """Where paint goes in an atlas of size x size."""
    t = texels(size)
    x, y, z = (v.astype(np.float64) for v in (t.x, t.y, t.z))
    lip, lid = t.lip.astype(np.float64), t.lid.astype(np.float64)
    a = np.abs(x)
    m = np.stack([a, y, z]).T
    front = fields.smoothstep(z, 5.0, 30.0)
    skin = t.part == 0

    def bump(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Floats:
        return fields.bump(m, (cx, cy, cz), (rx, ry, rz))

    red = (
        bump(38, -12, 40, 15, 15, 22)
        + 0.55 * bump(0, -14, 78, 12, 11, 16)
        + 0.5 * bump(76, 3, -42, 18, 34, 22)
        + 0.35 * bump(0, -76, 60, 13, 11, 20)
    )
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
    beard = fields.smoothstep(-(y + 0.30 * a), 22.0, 40.0) * (
        1 - fields.smoothstep(-y, 96.0, 112.0)
    )
    beard = np.maximum(beard, bump(0, -32, 68, 26, 6.5, 22)) * fields.smoothstep(z, -38.0, -15.0)
    beard *= 1 - bump(40, -18, 36, 16, 18, 26)

    mouth = (z > 38) & skin
    upper, lower = lip_mask(x, y)
    lips = np.where(mouth, upper + lower, 0.0)
    lips = np.where(lip < 0.4, np.where(mouth, 1.0, lips), lips)
    seam = np.exp(-((np.minimum(lip, 5) / 0.55) ** 2)) * mouth * (lip > -0.8)

    is_up, near_lid = t.lid_side > 0.15, lid < 4.5
    lashes = _zone(np.exp(-(np.abs(lid / np.where(lid > 0, 0.62, 0.5)) ** 3)) * near_lid)
    crease = (
        np.exp(-(((lid - 1.75) / 0.30) ** 2))
        * is_up
        * near_lid
        * fields.smoothstep(14.5 - np.abs(a - 32), 0, 5)
    )
    return Zones(
        front=front.astype(np.float32),
        red=_zone(red),
        under_eye=_zone(bump(29, 9.5, 46, 12, 5, 18)),
        lid_skin=_zone(bump(31, 29, 48, 17, 7, 20)),
        fold=_zone(fold),
        forehead_lines=_zone(lines * np.clip(1 - (a / 42) ** 2, 0, 1) * front),
        freckles=_zone(bump(26, 0, 55, 34, 22, 50) * front * (y > -45) * (y < 50)),
        beard=_zone(beard),
        lips=_zone(lips),
        seam=_zone(seam),
        inner_lips=np.where((lip < -0.5) & mouth)[0],
        nostrils=_zone(bump(6.0, -23.0, 69.5, 3.6, 2.5, 5.5)),
        make_up=_zone(np.exp(-(((lid - 0.9) / 1.1) ** 2)) * is_up * near_lid),
        lashes=lashes,
        upper_lashes=is_up[lashes.index],
        lid_margin=np.where(near_lid & (lid < -0.45) & skin)[0],
        eye_corner=_zone(bump(16.5, 20.5, 44, 2.6, 2.2, 6.0) * skin),
        crease=_zone(crease),
        brows=np.where((a > 9) & (a < 51) & (y > 12) & (y < 68) & (z > 10) & skin)[0],
        lower_face=np.where((y < 20) & (y > -130) & (z > -45) & skin)[0],
        shade=np.where(skin, 0.42 + 0.58 * t.visibility, 1.0).astype(np.float32),
        eyes=(np.where(t.part == 1)[0], np.where(t.part == 2)[0]),
    )


@lru_cache(maxsize=64)
def above_hairline(size: int, style: hair.HairStyle) -> tuple[Ints, Floats]:
    """Texels that a style's hair may colour, and how far above its hairline they lie (mm)."""
    t = texels(size)
    x, y, z = (v.astype(np.float64) for v in (t.x, t.y, t.z))
    lon = np.arctan2(x - hair.ORIGIN[0], z - hair.ORIGIN[2])
    above = y - hair.hairline(lon, style)
    # Strands reach 11 mm below it.
    index = np.where((above > -16.0) & (t.part == 0) & (z < 70))[0]
    return index, above[index].astype(np.float32)
