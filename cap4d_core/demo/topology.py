"""Vertices and triangles of the demo head: FLAME's counts, its own connectivity.

Conventions: millimetres here (the files are written in metres); triangles counter-clockwise seen
from outside.
Vertex order: skin 0..3930, eyeball at +x 3931..4476, eyeball at -x 4477..5022.

Skin vertices live on the sphere of directions around `anatomy.CENTRE`: loops along lids, lips, ears
and neck are fixed, all others are relaxed (Lloyd) to a wanted spacing, and the convex hull of the
directions is their Delaunay triangulation. The mouth slit is held open in direction space only, so
that upper and lower lip touch in 3D but never share a vertex. Loops inside the openings give lids
and lips thickness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from cap4d_core.demo import anatomy
from cap4d_core.demo.point_relaxation import middle_points, relax, seed_points, spacing_table
from cap4d_core.demo.skin_loops import (
    MOUTH_X,
    SLIT,
    close_slit,
    ear_loops,
    eye_directions,
    from_gnomonic,
    gnomonic,
    lid_opening,
    lip_line,
    neck_loops,
    offset_loop,
    slit,
    unit,
)

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_SKIN = 3931
NUM_EYE = 546
NUM_VERTICES = NUM_SKIN + 2 * NUM_EYE
LOWER_LIP_VERTEX = 3533
LID_RINGS = (-2, -1, 0, 1, 2, 3)
LID_RING_OFFSET = {-2: -3.0, -1: -1.6, 0: 0.0, 1: 1.7, 2: 3.7, 3: 6.2}
LIP_RINGS = (-3, -2, -1, 0, 1, 2, 3)
LIP_RING_SCALE = {-3: -3.9, -2: -2.7, -1: -1.4, 0: 0.0, 1: 2.2, 2: 4.6, 3: 7.6}
NUM_LID = 40
NUM_LIP = 48


@dataclass(frozen=True)
class Skin:
    """The skin mesh with the tags that the deformation bases need.

    Attributes:
        vertices: (3931,3) mm.
        faces: (F,3).
        chart: (3931,3) unit directions with the mouth slit held open.
        lip_side: (3931,) +1 for vertices at or above the lip line, -1 below.
        lip_ring: (3931,) -3..-1 inner loops of the mouth, 0 lip line, 1.. loops outwards, 99
            elsewhere.
        lid_ring: (3931,) the same for the lids.
        lid_side: (3931,) +1 upper lid, -1 lower lid, 0 corners, for vertices with a lid_ring.
        lid_coord: (3931,2) eye-local (a, b) mm in the opening's frame of lid vertices (a outwards).
        neck_ring: (3931,) bool, the open edge at the bottom.
    """

    vertices: Array
    faces: Ints
    chart: Array
    lip_side: Array
    lip_ring: Ints
    lid_ring: Ints
    lid_side: Array
    lid_coord: Array
    neck_ring: NDArray[np.bool_]


def build_skin(seed: int = 7) -> Skin:
    """Build the skin mesh (deterministic)."""
    mirror = np.array([-1.0, 1.0, 1.0])
    fixed: list[Array] = []
    ring_of: list[tuple[str, int, Array]] = []  # kind, ring, 2D coordinates

    opening = lid_opening(NUM_LID)
    for sx in (1, -1):
        for ring in LID_RINGS:
            ab = offset_loop(opening, LID_RING_OFFSET[ring])
            if ring < 0:  # shrink about the middle instead: offsets would cross at the corners
                ab = opening * (1.0 + LID_RING_OFFSET[ring] / np.array([9.0, 5.2]) * 0.9)
                ab[:, 1] += 0.06 * (opening[:, 0] - ab[:, 0])
            d = eye_directions(ab)
            fixed.append(d if sx > 0 else d * mirror)
            ring_of.append(("lid+" if sx > 0 else "lid-", ring, opening if ring < 0 else ab))

    t = 2 * np.pi * np.arange(NUM_LIP) / NUM_LIP
    x0 = MOUTH_X * np.cos(t) * (1.0 - 0.0 * t)
    y0 = np.sign(np.round(np.sin(t), 12)) * slit(x0)
    for ring in LIP_RINGS:
        s = LIP_RING_SCALE[ring]
        if ring < 0:
            f = 1.0 + s / SLIT
            xr, yr = x0 * (1.0 + s / 14.0 * 0.25), y0 * f
        else:
            loop = offset_loop(np.stack([x0, y0], -1), s)
            xr, yr = loop[:, 0], loop[:, 1]
        xr[np.abs(np.cos(t)) < 1e-9] = 0.0
        fixed.append(from_gnomonic(xr, lip_line(xr) + yr))
        ring_of.append(
            ("lip", ring, np.stack([x0 if ring < 0 else xr, np.sign(np.round(np.sin(t), 12))], -1))
        )
    ear = ear_loops(38)
    for e in (ear, ear * mirror):
        fixed.append(e)
        ring_of.append(("ear", 0, np.zeros((len(e), 2))))
    # Rows of the neck are laid out by height.
    for ring, loop in enumerate(neck_loops(40)):
        fixed.append(loop)
        ring_of.append(("neck", ring, np.zeros((len(loop), 2))))
    fixed_dirs = np.concatenate(fixed)

    table = spacing_table()
    need = NUM_SKIN - len(fixed_dirs)
    middle = middle_points(table, loop)
    if (need - len(middle)) % 2:
        middle = np.delete(middle, len(middle) // 2, axis=0)
    num_free = (need - len(middle)) // 2
    free = seed_points(table, fixed_dirs, loop, num_free, seed)
    chart = relax(fixed_dirs, free, middle, table, 36)

    faces = ConvexHull(chart).simplices.astype(np.int64)
    corner = chart[faces]
    flip = (np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]) * corner.sum(1)).sum(
        1
    ) < 0
    faces[flip] = faces[flip][:, ::-1]

    n = len(chart)
    lip_ring = np.full(n, 99, dtype=np.int64)
    lid_ring = np.full(n, 99, dtype=np.int64)
    lid_coord = np.zeros((n, 2))
    lip_coord = np.zeros((n, 2))
    neck_ring = np.zeros(n, bool)
    hole = np.zeros(n, dtype=np.int64)  # id of the opening whose innermost loop a vertex is on
    k = 0
    for idx, (kind, ring, ab) in enumerate(ring_of):
        sel = slice(k, k + len(fixed[idx]))
        if kind.startswith("lid"):
            lid_ring[sel], lid_coord[sel] = ring, ab
            hole[sel] = (1 if kind == "lid+" else 2) * (ring == LID_RINGS[0])
        elif kind == "lip":
            lip_ring[sel], lip_coord[sel] = ring, ab
            hole[sel] = 3 * (ring == LIP_RINGS[0])
        elif kind == "neck" and ring == 0:
            neck_ring[sel] = True
            hole[sel] = 4
        k += len(fixed[idx])
    h = hole[faces]
    faces = faces[~((h[:, 0] > 0) & (h[:, 0] == h[:, 1]) & (h[:, 1] == h[:, 2]))]

    true = close_slit(chart)
    vertices = anatomy.raycast(true)
    gx, gy = gnomonic(chart)
    lip_side = np.where(gy >= lip_line(gx), 1.0, -1.0)
    in_lip = lip_ring < 99
    lip_side[in_lip] = lip_coord[in_lip, 1]
    _smooth_rim(vertices, lip_ring == 0)
    _place_inner_lips(vertices, lip_ring, lip_coord)
    _place_inner_lids(vertices, lid_ring, lid_coord)
    side = np.zeros(n)
    in_lid = lid_ring < 99
    tilt = 0.075 * lid_coord[:, 0] - 0.4
    side[in_lid] = np.sign(np.round(lid_coord[in_lid, 1] - tilt[in_lid], 6))

    # The lip vertex that places the mouth must sit at its fixed index.
    lower = np.where((lip_ring == 0) & (lip_coord[:, 1] < 0) & (np.abs(lip_coord[:, 0]) < 1e-6))[0][
        0
    ]
    perm = np.arange(n)
    perm[[lower, LOWER_LIP_VERTEX]] = perm[[LOWER_LIP_VERTEX, lower]]
    return Skin(
        vertices[perm],
        perm[faces],
        chart[perm],
        lip_side[perm],
        lip_ring[perm],
        lid_ring[perm],
        side[perm],
        lid_coord[perm],
        neck_ring[perm],
    )


def _smooth_rim(v: Array, rim: NDArray[np.bool_]) -> None:
    """Even out the depth of the lip line, a narrow groove that rays meet unevenly (in place)."""
    idx = np.where(rim)[0]
    radius = np.linalg.norm(v[idx] - anatomy.CENTRE, axis=1)
    smooth = radius
    for _ in range(6):
        smooth = 0.5 * smooth + 0.25 * (np.roll(smooth, 1) + np.roll(smooth, -1))
    # Upper and lower rim share the line, so they share the depth.
    smooth = 0.5 * (smooth + np.roll(smooth[::-1], 1))
    v[idx] = anatomy.CENTRE + (v[idx] - anatomy.CENTRE) * (smooth / radius)[:, None]


def _place_inner_lips(v: Array, ring: Ints, coord: Array) -> None:
    """Fold the loops inside the lip line back into the mouth (in place)."""
    rim = np.where(ring == 0)[0]
    depth = {-1: (2.2, 0.5), -2: (5.0, 1.8), -3: (8.5, 4.0)}
    for r, (back, spread) in depth.items():
        idx = np.where(ring == r)[0]
        taper = np.sqrt(np.clip(1.0 - (coord[idx, 0] / MOUTH_X) ** 2, 0.0, 1.0))
        v[idx] = v[rim] + np.stack(
            [
                -0.10 * back * np.sign(v[rim, 0]) * (np.abs(v[rim, 0]) > 15),
                coord[idx, 1] * spread * taper,
                -back * (0.35 + 0.65 * taper),
            ],
            -1,
        )


def _place_inner_lids(v: Array, ring: Ints, coord: Array) -> None:
    """Lid margins: from the outer edge back to the eyeball, then behind the lid (in place)."""
    for sx in (1.0, -1.0):
        centre = anatomy.EYE_CENTRE * np.array([sx, 1, 1])
        rim = np.where((ring == 0) & (np.sign(v[:, 0]) == sx))[0]
        for r, radius in ((-1, anatomy.EYE_RADIUS + 0.1), (-2, anatomy.EYE_RADIUS - 0.9)):
            idx = np.where((ring == r) & (np.sign(v[:, 0]) == sx))[0]
            q = v[rim] - centre
            if r == -2:
                q = q + np.stack([0.9 * np.sign(q[:, 0]), 1.6 * np.sign(q[:, 1]), 0 * q[:, 0]], -1)
            v[idx] = centre + radius * unit(q)
