"""Beards and moustaches as a shell over the skin that moves with it.

Conventions: millimetres while building. The shell is the skin's own mesh from the ears down to the
throat, with its edges halved until none is long, lifted along the normals. Refined vertices stay on
the skin's triangles, so the shell follows every expression exactly. Where a style has no hair the
shell lies below the skin, which gives a natural edge. Regions are signed distances (mm), positive
inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import attachments, fields, head
from cap4d_core.demo.noise import Noise

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

LONGEST_EDGE = 4.2
_NEVER = -50.0


@dataclass(frozen=True)
class BeardStyle:
    """Shape of a beard; lengths in mm.

    length: on cheeks and jaw, 0 without. moustache: on the upper lip, 0 without. chin: further
    length at the chin. drop: how far the chin's hair hangs. cheek: how far above the usual line the
    cheeks are covered. width: half width of a chin beard, None for one up to the ears.
    sideburns: joined to the hair. tips: how far the moustache's ends hang beside the mouth.
    """

    name: str
    length: float
    moustache: float
    chin: float = 0.0
    drop: float = 0.0
    cheek: float = 0.0
    width: float | None = None
    sideburns: bool = True
    tips: float = 0.0


STYLES: dict[str, BeardStyle] = {
    s.name: s
    for s in (
        BeardStyle("stubble", 0.9, 0.9),
        BeardStyle("short_boxed", 3.0, 2.8, chin=1.5, cheek=-5.0),
        BeardStyle("full", 7.0, 5.0, chin=6.0, drop=8.0),
        BeardStyle("bushy", 11.0, 6.5, chin=8.0, drop=16.0, cheek=4.0),
        BeardStyle("long", 9.0, 6.0, chin=10.0, drop=42.0, cheek=1.0),
        BeardStyle("chin_strap", 3.0, 0.0, chin=1.5, cheek=-22.0),
        BeardStyle("goatee", 3.5, 3.0, chin=4.0, drop=4.0, width=24.0, sideburns=False, tips=26.0),
        BeardStyle("van_dyke", 4.0, 3.4, chin=7.0, drop=14.0, width=12.0, sideburns=False),
        BeardStyle("moustache", 0.0, 4.5, sideburns=False, tips=3.0),
        BeardStyle("horseshoe", 0.0, 4.0, sideburns=False, tips=34.0),
        BeardStyle("walrus", 0.0, 7.0, sideburns=False, tips=8.0),
        BeardStyle("mutton_chops", 8.0, 4.5, cheek=6.0, tips=6.0),
    )
}


# How common each style is among those who have one.
SHARES = np.array([0.16, 0.16, 0.14, 0.08, 0.07, 0.05, 0.10, 0.06, 0.06, 0.04, 0.04, 0.04])


@dataclass(frozen=True)
class _Mesh:
    """The refined lower face: p, normal (N,3) mm; faces; binding and weights as in `Attachment`."""

    p: Array
    normal: Array
    faces: Ints
    binding: Ints
    weights: Array


def _refine(faces: Ints, rows: Array, points: Array) -> tuple[Ints, Array]:
    """Halve long edges once; rows (N,B) are the vertices as weights of B points (B,3)."""
    p = rows @ points
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    keys, inverse = np.unique(edges[:, 0] * len(rows) + edges[:, 1], return_inverse=True)
    unique = np.stack([keys // len(rows), keys % len(rows)], -1)
    long = np.linalg.norm(p[unique[:, 0]] - p[unique[:, 1]], axis=1) > LONGEST_EDGE
    middle = np.full(len(unique), -1)
    middle[long] = len(rows) + np.arange(long.sum())
    halves = 0.5 * (rows[unique[long, 0]] + rows[unique[long, 1]])
    out: list[tuple[int, int, int]] = []
    split = middle[inverse.reshape(3, -1).T]
    for tri, mid in zip(faces.tolist(), split.tolist(), strict=True):
        # Turn the triangle so that cases differ by the number of split edges only.
        count = sum(m >= 0 for m in mid)
        turn = 0
        if count == 1:
            turn = next(k for k in range(3) if mid[k] >= 0)
        elif count == 2:
            turn = next(k for k in range(3) if mid[(k + 2) % 3] < 0)
        a, b, c = (tri[(turn + k) % 3] for k in range(3))
        ab, bc, ca = (mid[(turn + k) % 3] for k in range(3))
        if count == 0:
            out.append((a, b, c))
        elif count == 1:
            out += [(a, ab, c), (ab, b, c)]
        elif count == 2:
            out += [(ab, b, bc), (a, ab, bc), (a, bc, c)]
        else:
            out += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.array(out, dtype=np.int64), np.concatenate([rows, halves])


@lru_cache(maxsize=1)
def _mesh() -> _Mesh:
    """The part of the skin that any style may cover (the same for everybody)."""
    h = head.build_demo_head()
    pts = h.points
    x, y, z = np.abs(pts.x), pts.y, pts.z
    wanted = pts.skin & (y > -125) & (z > -40)
    wanted &= y < np.maximum(16 - 0.9 * np.maximum(66 - x, 0), -20)
    wanted &= pts.lip_ring >= 0
    skin_faces = h.faces[pts.skin[h.faces].all(1)]
    picked = skin_faces[wanted[skin_faces].all(1)]
    base, local = np.unique(picked, return_inverse=True)
    faces, rows = local.reshape(-1, 3).astype(np.int64), np.eye(len(base))
    for _ in range(4):
        faces, rows = _refine(faces, rows, pts.p[base])
    # No vertex leaves its triangle of the skin: three weights are all there are.
    order = np.sort(np.argpartition(-rows, 3, axis=1)[:, :3], 1)
    weights = np.take_along_axis(rows, order, 1)
    normal = rows @ head.vertex_normals(pts.p, h.faces)[base]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return _Mesh(rows @ pts.p[base], normal, faces, base[order], weights)


def _lip_margin(a: Array, y: Array) -> Array:
    """Distance outside the red of the lips in front view (about mm)."""
    t = np.clip(1 - a / 26.0, 0, 1)
    top = -44.6 + 7.8 * t**0.62
    bottom = -45.4 - 11.4 * np.clip(1 - (a / 26.0) ** 2, 0, 1) ** 0.85
    return np.maximum(np.maximum(y - top, bottom - y), 1.5 * (a - 27.0))


def moustache_inside(style: BeardStyle, p: Array) -> Array:
    """Distance inside the moustache of points (N,3)."""
    if style.moustache <= 0:
        return np.full(len(p), _NEVER)
    a, y = np.abs(p[:, 0]), p[:, 1]
    top = -25.0 - 0.42 * np.maximum(a - 9.0, 0) - y
    body = np.minimum(top, np.minimum(27.0 - a, y + 47.0))
    ends = np.minimum(np.minimum(a - 23.5, 31.0 - a), np.minimum(y + 44.0 + style.tips, -36.0 - y))
    return np.minimum(np.maximum(body, ends), p[:, 2] - 38.0)


def beard_inside(style: BeardStyle, p: Array) -> Array:
    """Distance inside the beard without moustache of points (N,3)."""
    if style.length <= 0:
        return np.full(len(p), _NEVER)
    a, y, z = np.abs(p[:, 0]), p[:, 1], p[:, 2]
    neck = y + 87.0 + 0.43 * z
    if style.width is not None:
        taper = style.width - 0.12 * np.maximum(-y - 70, 0)
        patch = np.minimum(-57.0 - y, 5.5 - a)  # below the lower lip
        chin = np.minimum(taper - a, -64.0 - y)
        return np.minimum(np.maximum(chin, np.minimum(patch, 6.0)), np.minimum(neck, z - 25.0))
    line = -44.0 + 0.62 * (a - 28.0) + style.cheek
    jaw = np.minimum(line - y, z + 27.0)
    if style.name == "mutton_chops":
        jaw = np.minimum(jaw, a - 21.0)
    elif style.cheek > -12:
        # Bare beside the lower lip, with a tuft in the middle.
        hollow = 5.0 - np.hypot((a - 13.0) / 1.3, y + 60.0)
        jaw = np.minimum(jaw, np.maximum(-hollow, _NEVER))
    else:
        jaw = np.minimum(jaw, np.maximum(-66.0 - y, a - 30.0))
    if style.sideburns:
        side = np.minimum(np.minimum(z + 27.0, -4.0 - z), np.minimum(a - 52.0, 14.0 - y))
        jaw = np.maximum(jaw, side)
    return np.minimum(jaw, neck)


def coverage(style: BeardStyle, p: Array, ragged: Array) -> Array:
    """How densely points (N,3) are covered, 0..1; ragged (N,) about unit variance."""
    beard = fields.smoothstep(beard_inside(style, p) + 1.1 * ragged, -1.5, 5.5)
    lip = fields.smoothstep(moustache_inside(style, p) + 0.5 * ragged, -1.2, 2.4)
    bare = fields.smoothstep(_lip_margin(np.abs(p[:, 0]), p[:, 1]), -0.4, 1.6)
    return np.maximum(beard, lip) * bare


def build_beard(
    style: BeardStyle, color: Array, skin_color: Array, rng: np.random.Generator
) -> attachments.Attachment:
    """The shell of one subject's beard.

    Args:
        style: its shape.
        color: (3,) linear albedo of the hair.
        skin_color: (3,) what shines through where it is thin.
        rng: strands.
    """
    mesh = _mesh()
    p, n = mesh.p, mesh.normal
    y, z = p[:, 1], p[:, 2]
    waves = [Noise(w, rng, 2) for w in (9.0, 4.5, 7.0)]
    # Strands run down and outwards: noise that is short across and long along them.
    across = p[:, 0] + 0.35 * np.sign(p[:, 0]) * (y + 60.0)
    coarse = waves[0].at(1.6 * across, 0.45 * y, 0.45 * z)
    fine = waves[1].at(1.8 * across, 0.5 * y, 0.5 * z)
    cover = coverage(style, p, waves[2].at(p[:, 0], y, z).astype(np.float64))
    lip = moustache_inside(style, p)
    on_lip = fields.smoothstep(lip, -1.0, 3.0)
    chin = fields.bump(p, (0, -84, 52), (30, 22, 34))
    beard = style.length + style.chin * chin
    tall = beard * (1 - on_lip) + style.moustache * on_lip
    rough = 1 / (1 + 0.08 * tall)  # long hair lies in locks, it does not stand on end
    tall = tall * (1 + rough * (0.14 * coarse + 0.10 * fine)) + 0.2 * fine
    height = cover * (np.maximum(tall, 0.3) + 0.7) - 0.7
    down = np.array([0.0, -1.0, 0.18])
    hang = style.drop * fields.bump(p, (0, -84, 52), (26, 20, 30)) * cover
    fall = 0.35 * np.maximum(height, 0) * (1 - 0.5 * on_lip)
    q = p + height[:, None] * n + (hang * (1 + 0.08 * coarse) + fall)[:, None] * down
    tone = 1.0 + 0.22 * coarse + 0.24 * fine
    tone = tone * (0.80 + 0.20 * fields.smoothstep(height, 0.5, 6.0))
    hair = np.clip(color * tone[:, None], 0.003, 0.95)
    dense = fields.smoothstep(cover, 0.05, 0.45)[:, None]
    dense = dense * (0.75 if style.name == "stubble" else 1.0)
    colors = hair * dense + skin_color * (1 - dense)
    shown = ~(height < -0.25)[mesh.faces].all(1)
    used, faces = np.unique(mesh.faces[shown], return_inverse=True)
    return attachments.Attachment(
        1e-3 * q[used],
        faces.reshape(-1, 3).astype(np.int64),
        colors[used],
        attachments.HAIR,
        mesh.binding[used],
        mesh.weights[used],
        True,
        np.zeros(len(used), bool),
    )
