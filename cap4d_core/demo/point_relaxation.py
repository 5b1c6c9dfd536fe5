"""Free vertices of the skin: seeded by wanted density, relaxed on the sphere of directions.

Conventions: see `cap4d_core.demo.topology`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, cKDTree

from cap4d_core.demo import anatomy
from cap4d_core.demo.skin_loops import MOUTH_X, SLIT, from_gnomonic, gnomonic, lip_line, unit

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def relax(fixed: Array, free: Array, middle: Array, radius: object, iterations: int) -> Array:
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
        c = unit(centre)
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
        middle, free = unit(middle), unit(free)
    return np.concatenate([fixed, middle, free, free * mirror])


def spacing_table() -> Array:
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


def _tilt(d: Array) -> float:
    """Angle of a direction in the midplane: 0 in front, growing over the crown."""
    a = float(np.arctan2(d[1], d[2]))
    return a if d[2] > 0 else a % (2 * np.pi)


def middle_points(table: Array, loop: Array) -> Array:
    """Free directions on the midline: throat to lower lip, upper lip over the crown to the nape."""
    lower = from_gnomonic(np.zeros(1), np.array([-46.0 - SLIT - 7.6 - 3.0]))[0]
    upper = from_gnomonic(np.zeros(1), np.array([-46.0 + SLIT + 7.6 + 3.0]))[0]
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


def seed_points(table: Array, fixed: Array, neck: Array, num: int, seed: int) -> Array:
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
    eye = unit(anatomy.EYE_CENTRE + np.array([-0.7, 0, 12.0]) - anatomy.CENTRE)
    e = d / np.maximum((d @ eye)[:, None], 1e-3) - eye
    ok &= ~((d @ eye > 0.5) & ((e[:, 0] / 0.225) ** 2 + (e[:, 1] / 0.135) ** 2 < 1))
    gx, gy = gnomonic(d)
    dy = np.abs(gy - lip_line(gx))
    ok &= ~((d[:, 2] > 0.2) & ((gx / (MOUTH_X + 9.5)) ** 2 + (dy / (SLIT + 9.5)) ** 2 < 1))
    d, h = d[ok], h[ok]
    weight = h**-2.0
    key = rng.uniform(size=len(d)) ** (1.0 / (weight / weight.max()))
    pick = np.argsort(-key, kind="stable")[: 4 * num]
    # Greedy thinning keeps the random start even, then fill up.

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
