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

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_SKIN = 3931
NUM_EYE = 546
NUM_VERTICES = NUM_SKIN + 2 * NUM_EYE
LOWER_LIP_VERTEX = 3533
NECK_HEIGHTS = (-172.0, -158.0, -143.0, -127.0)

# The mouth in the plane z = STOMION z seen from CENTRE (gnomonic coordinates).
_PLANE = float(anatomy.STOMION[2] - anatomy.CENTRE[2])
MOUTH_X = 28.4
_SLIT = 5.5
_SLIT_REACH = 30.0


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


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def lip_line(x: Array) -> Array:
    """Height of the lip line in gnomonic coordinates at gnomonic x."""
    return -46.0 - 5.1 * np.clip(np.abs(x) / MOUTH_X, 0.0, 1.3) ** 2


def _slit(x: Array) -> Array:
    return _SLIT * np.sqrt(np.clip(1.0 - (x / MOUTH_X) ** 2, 0.0, 1.0))


def gnomonic(d: Array) -> tuple[Array, Array]:
    """Directions (N,3) in front of CENTRE to coordinates in the plane of the lips (mm)."""
    z = np.maximum(d[:, 2], 1e-3)
    return _PLANE * d[:, 0] / z, anatomy.CENTRE[1] + _PLANE * d[:, 1] / z


def from_gnomonic(x: Array, y: Array) -> Array:
    """Inverse of `gnomonic`."""
    return _unit(np.stack([x, y - anatomy.CENTRE[1], np.full_like(x, _PLANE)], -1))


def close_slit(d: Array) -> Array:
    """Directions with the mouth held open to the true directions (lips together)."""
    x, y = gnomonic(d)
    dy = y - lip_line(x)
    gap, reach = _slit(x), _SLIT_REACH
    new = np.where(
        np.abs(dy) < reach, np.maximum(np.abs(dy) - gap, 0.0) * reach / (reach - gap), np.abs(dy)
    )
    front = (d[:, 2] > 0.2) & (np.abs(x) < MOUTH_X)
    out = from_gnomonic(x, lip_line(x) + np.sign(dy) * new)
    return np.where(front[:, None], out, d)


# --- fixed loops ------------------------------------------------------------------------------


def _lid_opening(num: int) -> Array:
    """Eye opening (num,2), counter-clockwise from the outer corner; a outwards, b up."""
    t = 2 * np.pi * np.arange(num) / num
    a = np.where(np.cos(t) > 0, 13.4, 15.2) * np.cos(t)
    up = 5.0 * np.sin(np.clip(t, 0, np.pi)) ** 0.92 * (1 - 0.10 * np.cos(t))
    down = 5.6 * np.abs(np.sin(np.clip(t, np.pi, 2 * np.pi))) ** 1.05 * (1 + 0.15 * np.cos(t))
    tilt = 0.075 * a - 0.4
    return np.stack([a, np.where(t <= np.pi, up, -down) + tilt], -1)


def _offset_loop(loop: Array, distance: Array | float) -> Array:
    """Move a closed counter-clockwise 2D loop along its outward normals."""
    tangent = np.roll(loop, -1, 0) - np.roll(loop, 1, 0)
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], -1)
    return loop + np.asarray(distance)[..., None] * _unit(normal)


def _eye_directions(ab: Array) -> Array:
    """Directions of points (a,b) above the eyeball at +x."""
    z = np.sqrt(np.maximum(anatomy.LID_RADIUS**2 - (ab**2).sum(-1), 16.0))
    p = anatomy.EYE_CENTRE + np.stack([ab[:, 0], ab[:, 1], z], -1)
    return _unit(p - anatomy.CENTRE)


def _ear_loops(num: int) -> Array:
    """Directions (2*num,3) just inside and just outside the ear's outline as seen from CENTRE."""
    axis = _unit(anatomy.EAR_CENTRE + np.array([4.0, 2.0, -2.0]) - anatomy.CENTRE)
    e1 = _unit(np.cross([0.0, 1.0, 0.0], axis))
    e2 = np.cross(axis, e1)
    phi = 2 * np.pi * np.arange(num) / num
    side = np.cos(phi)[:, None] * e1 + np.sin(phi)[:, None] * e2

    def at(angle: Array) -> Array:
        return np.cos(angle)[:, None] * axis + np.sin(angle)[:, None] * side

    lo, hi = np.full(num, 0.02), np.full(num, 0.62)
    for _ in range(9):
        mid = 0.5 * (lo + hi)
        hit = np.abs(anatomy.ear_distance(anatomy.raycast(at(mid), steps=40))) < 0.4
        lo, hi = np.where(hit, mid, lo), np.where(hit, hi, mid)
    # A slightly smoothed outline; the inner loop stays on the helix, the outer one on the skull.
    edge = (lo + 0.5 * (np.roll(lo, 1) + np.roll(lo, -1))) / 2
    edge = np.minimum(edge, lo + 0.01)
    return np.concatenate([at(edge - 0.015), at(edge + 0.03)])


def _neck_loops(num: int) -> list[Array]:
    """Directions of level loops around the neck, alternating by half a step."""
    lon = np.pi * np.arange(2 * num) / num
    lat = np.linspace(-1.53, -0.6, 60)
    la, lo = np.meshgrid(lat, lon, indexing="ij")
    d = np.stack([np.cos(la) * np.sin(lo), np.sin(la), np.cos(la) * np.cos(lo)], -1)
    height = anatomy.raycast(d.reshape(-1, 3), steps=48)[:, 1].reshape(la.shape)
    loops = []
    for ring, level in enumerate(NECK_HEIGHTS):
        # The highest crossing, so that loops are nested even where the surface bulges.
        cross = len(lat) - 1 - np.argmax(height[::-1] < level, axis=0)
        k = np.arange(2 * num)
        y0, y1 = height[cross, k], height[np.minimum(cross + 1, len(lat) - 1), k]
        at = lat[cross] + np.clip((level - y0) / np.maximum(y1 - y0, 1e-6), 0, 1) * (
            lat[1] - lat[0]
        )
        pick = np.arange(ring % 2, 2 * num, 2)
        c, o = at[pick], lon[pick]
        loops.append(np.stack([np.cos(c) * np.sin(o), np.sin(c), np.cos(c) * np.cos(o)], -1))
    return loops


def _spacing(p: Array) -> Array:
    """Wanted edge length (mm) at surface points."""
    x, y, z = np.abs(p[:, 0]), p[:, 1], p[:, 2]

    def near(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Array:
        return np.exp(-(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2))

    face = 1.0 / (1.0 + np.exp(-(z - 12.0) / 7.0)) / (1.0 + np.exp((y - 62.0) / 9.0))
    face = face / (1.0 + np.exp(-(y + 92.0) / 7.0))
    h = 11.5 - 6.6 * face
    h -= 2.6 * near(32, 22, 42, 24, 20, 26) * face
    h -= 2.4 * near(0, -44, 62, 33, 16, 24) * face
    h -= 2.7 * near(0, -14, 68, 18, 16, 20) * face
    h -= 1.6 * near(0, 14, 60, 16, 22, 20) * face
    h -= 2.0 * near(20, 34, 50, 26, 13, 20) * face
    h -= 7.8 * near(76, 3, -44, 30, 36, 25)
    h -= 3.0 * np.exp(-(((y + 95) / 22) ** 2)) * np.clip((z + 30) / 60, 0, 1) * (1 - face)
    return np.maximum(h, 2.0)


def _relax(fixed: Array, free: Array, middle: Array, radius: object, iterations: int) -> Array:
    """Lloyd relaxation of directions; free (x > 0) are mirrored, middle stay at x = 0."""
    mirror = np.array([-1.0, 1.0, 1.0])
    nf, nm = len(free), len(middle)
    for _ in range(iterations):
        points = np.concatenate([fixed, middle, free, free * mirror])
        tri = ConvexHull(points).simplices
        corner = points[tri]
        centre = corner.mean(1)
        area = np.linalg.norm(
            np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1
        )
        c = _unit(centre)
        h = _lookup(radius, c)
        weight = area * h**-4.0
        total = np.zeros(len(points))
        move = np.zeros((len(points), 3))
        for k in range(3):
            np.add.at(total, tri[:, k], weight)
            np.add.at(move, tri[:, k], weight[:, None] * centre)
        target = move / total[:, None]
        base = len(fixed)
        middle = target[base : base + nm] * np.array([0.0, 1.0, 1.0])
        one, two = target[base + nm : base + nm + nf], target[base + nm + nf :] * mirror
        free = 0.5 * (one + two)
        free[:, 0] = np.maximum(free[:, 0], 0.012)
        middle, free = _unit(middle), _unit(free)
    return np.concatenate([fixed, middle, free, free * mirror])


def _angular_table() -> Array:
    """Wanted spacing / radius on a latitude-longitude grid of directions (for fast look-up)."""
    lat = np.linspace(-np.pi / 2, np.pi / 2, 61)
    lon = np.linspace(-np.pi, np.pi, 97)
    la, lo = np.meshgrid(lat, lon, indexing="ij")
    d = np.stack([np.cos(la) * np.sin(lo), np.sin(la), np.cos(la) * np.cos(lo)], -1).reshape(-1, 3)
    p = anatomy.raycast(d, steps=36)
    radius = np.linalg.norm(p - anatomy.CENTRE, axis=1)
    table: Array = (_spacing(p) / radius).reshape(61, 97)
    return table


def _lookup(table: object, d: Array) -> Array:
    grid = np.asarray(table)
    r = (np.arcsin(np.clip(d[:, 1], -1, 1)) + np.pi / 2) / np.pi * (grid.shape[0] - 1)
    c = (np.arctan2(d[:, 0], d[:, 2]) + np.pi) / (2 * np.pi) * (grid.shape[1] - 1)
    i = np.clip(r.astype(int), 0, grid.shape[0] - 2)
    j = np.clip(c.astype(int), 0, grid.shape[1] - 2)
    fr, fc = r - i, c - j
    value: Array = (
        grid[i, j] * (1 - fr) * (1 - fc)
        + grid[i + 1, j] * fr * (1 - fc)
        + grid[i, j + 1] * (1 - fr) * fc
        + grid[i + 1, j + 1] * fr * fc
    )
    return value


LID_RINGS = (-2, -1, 0, 1, 2, 3)
LID_RING_OFFSET = {-2: -3.0, -1: -1.6, 0: 0.0, 1: 1.7, 2: 3.7, 3: 6.2}
LIP_RINGS = (-3, -2, -1, 0, 1, 2, 3)
LIP_RING_SCALE = {-3: -3.9, -2: -2.7, -1: -1.4, 0: 0.0, 1: 2.2, 2: 4.6, 3: 7.6}
NUM_LID = 40
NUM_LIP = 48


def build_skin(seed: int = 7) -> Skin:
    """Build the skin mesh (deterministic)."""
    mirror = np.array([-1.0, 1.0, 1.0])
    fixed: list[Array] = []
    ring_of: list[tuple[str, int, Array]] = []  # kind, ring, 2D coordinates

    opening = _lid_opening(NUM_LID)
    for sx in (1, -1):
        for ring in LID_RINGS:
            ab = _offset_loop(opening, LID_RING_OFFSET[ring])
            if ring < 0:  # shrink about the middle instead: offsets would cross at the corners
                ab = opening * (1.0 + LID_RING_OFFSET[ring] / np.array([9.0, 5.2]) * 0.9)
                ab[:, 1] += 0.06 * (opening[:, 0] - ab[:, 0])
            d = _eye_directions(ab)
            fixed.append(d if sx > 0 else d * mirror)
            ring_of.append(("lid+" if sx > 0 else "lid-", ring, opening if ring < 0 else ab))

    t = 2 * np.pi * np.arange(NUM_LIP) / NUM_LIP
    x0 = MOUTH_X * np.cos(t) * (1.0 - 0.0 * t)
    y0 = np.sign(np.round(np.sin(t), 12)) * _slit(x0)
    for ring in LIP_RINGS:
        s = LIP_RING_SCALE[ring]
        if ring < 0:
            f = 1.0 + s / _SLIT
            xr, yr = x0 * (1.0 + s / 14.0 * 0.25), y0 * f
        else:
            loop = _offset_loop(np.stack([x0, y0], -1), s)
            xr, yr = loop[:, 0], loop[:, 1]
        xr[np.abs(np.cos(t)) < 1e-9] = 0.0
        fixed.append(from_gnomonic(xr, lip_line(xr) + yr))
        ring_of.append(
            ("lip", ring, np.stack([x0 if ring < 0 else xr, np.sign(np.round(np.sin(t), 12))], -1))
        )
    ear = _ear_loops(38)
    for e in (ear, ear * mirror):
        fixed.append(e)
        ring_of.append(("ear", 0, np.zeros((len(e), 2))))
    # Rows of the neck are laid out by height.
    for ring, loop in enumerate(_neck_loops(40)):
        fixed.append(loop)
        ring_of.append(("neck", ring, np.zeros((len(loop), 2))))
    fixed_dirs = np.concatenate(fixed)

    table = _angular_table()
    need = NUM_SKIN - len(fixed_dirs)
    middle = _middle_points(table, loop)
    if (need - len(middle)) % 2:
        middle = np.delete(middle, len(middle) // 2, axis=0)
    num_free = (need - len(middle)) // 2
    free = _seed_points(table, fixed_dirs, loop, num_free, seed)
    chart = _relax(fixed_dirs, free, middle, table, 36)

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


def _tilt(d: Array) -> float:
    """Angle of a direction in the midplane: 0 in front, growing over the crown."""
    a = float(np.arctan2(d[1], d[2]))
    return a if d[2] > 0 else a % (2 * np.pi)


def _middle_points(table: Array, loop: Array) -> Array:
    """Free directions on the midline: throat to lower lip, upper lip over the crown to the nape."""
    lower = from_gnomonic(np.zeros(1), np.array([-46.0 - _SLIT - 7.6 - 3.0]))[0]
    upper = from_gnomonic(np.zeros(1), np.array([-46.0 + _SLIT + 7.6 + 3.0]))[0]
    a_lo, a_up = np.arctan2(lower[1], lower[2]), np.arctan2(upper[1], upper[2])
    out: list[Array] = []
    for start, end in (
        (a_lo, _tilt(loop[np.argmax(loop[:, 2])]) + 0.06),
        (a_up, _tilt(loop[np.argmin(loop[:, 2])]) - 0.06),
    ):
        sign, a = np.sign(end - start), start
        while (end - a) * sign > 0:
            d = np.array([0.0, np.sin(a), np.cos(a)])
            out.append(d)
            a += sign * float(_lookup(table, d[None])[0])
    return np.array(out)


def _seed_points(table: Array, fixed: Array, neck: Array, num: int, seed: int) -> Array:
    """Random free directions with x > 0, by wanted density, clear of loops and openings."""
    rng = np.random.RandomState(seed)
    m = 60000
    z = rng.uniform(-1, 1, m)
    a = rng.uniform(0, np.pi, m)
    r = np.sqrt(1 - z * z)
    d = np.stack([r * np.sin(a), z, r * np.cos(a)], -1)
    h = _lookup(table, d)
    # Below the neck loop there is no surface.
    lon = np.arctan2(d[:, 0], d[:, 2])
    order = np.argsort(np.arctan2(neck[:, 0], neck[:, 2]))
    edge = np.interp(
        lon, np.arctan2(neck[order, 0], neck[order, 2]), neck[order, 1], period=2 * np.pi
    )
    ok = (d[:, 1] > edge + 0.05) & (d[:, 0] > 0.4 * h)
    # Openings with their loops: an ellipse around the eye, the lips' band.
    eye = _unit(anatomy.EYE_CENTRE + np.array([-0.7, 0, 12.0]) - anatomy.CENTRE)
    e = d / np.maximum((d @ eye)[:, None], 1e-3) - eye
    ok &= ~((d @ eye > 0.5) & ((e[:, 0] / 0.225) ** 2 + (e[:, 1] / 0.135) ** 2 < 1))
    gx, gy = gnomonic(d)
    dy = np.abs(gy - lip_line(gx))
    ok &= ~((d[:, 2] > 0.2) & ((gx / (MOUTH_X + 9.5)) ** 2 + (dy / (_SLIT + 9.5)) ** 2 < 1))
    d, h = d[ok], h[ok]
    weight = h**-2.0
    key = rng.uniform(size=len(d)) ** (1.0 / (weight / weight.max()))
    pick = np.argsort(-key, kind="stable")[: 4 * num]
    # Greedy thinning keeps the random start even, then fill up.
    from scipy.spatial import cKDTree

    cand, hc = d[pick], h[pick]
    tree = cKDTree(cand)
    alive = np.ones(len(cand), bool)
    chosen: list[int] = []
    for i in range(len(cand)):
        if not alive[i]:
            continue
        chosen.append(i)
        if len(chosen) == num:
            break
        alive[tree.query_ball_point(cand[i], 0.55 * hc[i])] = False
    if len(chosen) < num:
        rest = np.setdiff1d(np.arange(len(cand)), chosen)[: num - len(chosen)]
        chosen.extend(int(v) for v in rest)
    return cand[np.array(chosen)]


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
            v[idx] = centre + radius * _unit(q)


def build_eye(side: float) -> tuple[Array, Ints, Array]:
    """One eyeball: vertices (546,3) mm, faces, and per-corner coordinates (F,3,2) in the unit disc.

    The disc magnifies the front of the eye; its centre is the pupil, its rim the back pole.
    """
    rows, cols = 16, 34
    # Rings gather at the front, where iris and limbus are seen.
    phi = np.pi * (np.arange(1, rows + 1) / (rows + 1)) ** 1.35
    theta = 2 * np.pi * np.arange(cols) / cols
    pp, tt = np.meshgrid(phi, theta, indexing="ij")
    ring = np.stack([np.sin(pp) * np.cos(tt), np.sin(pp) * np.sin(tt), np.cos(pp)], -1).reshape(
        -1, 3
    )
    v = np.concatenate([[[0, 0, 1.0]], ring, [[0, 0, -1.0]]])
    v = v * (1.0 + 0.055 * np.exp(-(((1 - v[:, 2:3]) / 0.09) ** 2)))  # cornea
    centre = anatomy.EYE_CENTRE * np.array([side, 1, 1])
    v = centre + anatomy.EYE_RADIUS * v

    def vid(r: int, c: int) -> int:
        return 1 + r * cols + c % cols

    def disc(r: float, c: float) -> list[float]:
        rho = ((r + 1) / (rows + 1)) ** 0.85
        return [rho * np.cos(2 * np.pi * c / cols), rho * np.sin(2 * np.pi * c / cols)]

    faces: list[list[int]] = []
    uv: list[list[list[float]]] = []
    for c in range(cols):
        faces.append([0, vid(0, c), vid(0, c + 1)])
        uv.append([[0.0, 0.0], disc(0, c), disc(0, c + 1)])
    for r in range(rows - 1):
        for c in range(cols):
            faces += [
                [vid(r, c), vid(r + 1, c), vid(r + 1, c + 1)],
                [vid(r, c), vid(r + 1, c + 1), vid(r, c + 1)],
            ]
            uv += [
                [disc(r, c), disc(r + 1, c), disc(r + 1, c + 1)],
                [disc(r, c), disc(r + 1, c + 1), disc(r, c + 1)],
            ]
    for c in range(cols):
        faces.append([vid(rows - 1, c), NUM_EYE - 1, vid(rows - 1, c + 1)])
        uv.append([disc(rows - 1, c), disc(rows, c + 0.5), disc(rows - 1, c + 1)])
    return v, np.array(faces, dtype=np.int64), np.array(uv)
