"""The UV atlas of the demo head and the template meshes that carry it.

Conventions: (u, v) in [0, 1]^2, v up, every non-degenerate triangle counter-clockwise, no overlaps.
Skin is cut
open from the nape to the crown and flattened by a convex-combination map (Tutte 1963; Floater
1997): with positive weights and a convex border no triangle can flip, whatever the weights, so they
are free to give the face the lion's share of the area. Eyeballs and mouth half-spheres are discs in
a strip above.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.sparse.linalg import spsolve

from cap4d_core.demo import fields, topology

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

SKIN_TOP = 0.795
DISC_RADIUS = 0.093
DISC_CENTRES = {
    "eye_left": (0.105, 0.898),
    "eye_right": (0.305, 0.898),
    "mouth_upper": (0.565, 0.898),
    "mouth_lower": (0.795, 0.898),
}
# Stretch of the middle of the chart: (from, to, gain).
WIDEN_U = (0.29, 0.71, 3.6)
WIDEN_V = (0.16, 0.64, 2.7)
NUM_MOUTH = 200


def _widen(t: Array, low: float, high: float, gain: float) -> Array:
    """A monotone map of [0,1] onto itself, about `gain` times steeper from low to high."""
    x = np.linspace(0.0, 1.0, 401)
    slope = 1.0 + (gain - 1.0) * fields.smoothstep(x, low - 0.12, low + 0.08) * (
        1 - fields.smoothstep(x, high - 0.08, high + 0.12)
    )
    y = np.concatenate([[0.0], np.cumsum(0.5 * (slope[1:] + slope[:-1]))])
    out: Array = np.interp(t, x, y / y[-1])
    return out


def _border_loops(faces: Ints) -> list[Ints]:
    """Closed border loops in the direction of the triangles."""
    e = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    n = int(faces.max()) + 1
    key, rev = e[:, 0] * n + e[:, 1], e[:, 1] * n + e[:, 0]
    border = e[~np.isin(key, rev)]
    nxt = dict(zip(border[:, 0].tolist(), border[:, 1].tolist(), strict=True))
    loops = []
    while nxt:
        start = min(nxt)
        loop, cur = [], start
        while cur in nxt:
            loop.append(cur)
            cur = nxt.pop(cur)
        loops.append(np.array(loop))
    return loops


def _cut(skin: topology.Skin) -> tuple[Ints, Ints, list[int]]:
    """Cut from the nape to the crown.

    Returns:
        faces on the cut mesh, the original vertex of every cut-mesh vertex, the seam path (nape
        first).
    """
    v, f = skin.vertices, skin.faces
    n = len(v)
    e = np.unique(np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1), axis=0)
    middle = 0.5 * (np.abs(v[e[:, 0], 0]) + np.abs(v[e[:, 1], 0]))
    cost = np.linalg.norm(v[e[:, 0]] - v[e[:, 1]], axis=1) * (1.0 + 0.5 * middle)
    graph = coo_matrix((cost, (e[:, 0], e[:, 1])), shape=(n, n)).tocsr()
    ring = np.where(skin.neck_ring)[0]
    start = ring[np.argmin(v[ring, 2] + 0.2 * np.abs(v[ring, 0]))]
    tip = np.argmin(((v - np.array([0, 122.0, -82.0])) ** 2).sum(1))
    _, pred = dijkstra(graph, directed=False, indices=start, return_predecessors=True)
    path = [int(tip)]
    while path[-1] != start:
        path.append(int(pred[path[-1]]))
    path = path[::-1]
    # Triangles left of the path get copies of its vertices. Walk the fan around each path vertex.
    faces = f.copy()
    origin = list(range(n))
    half = {
        (int(a), int(b)): t
        for t, tri in enumerate(f)
        for a, b in zip(tri, np.roll(tri, -1), strict=True)
    }
    on_path = set(pairwise(path)) | set(pairwise(path[::-1]))
    for i, p in enumerate(path[:-1]):
        copy = len(origin)
        origin.append(p)
        nxt = path[i + 1]
        # Left of the path is the triangle that has the path's edge in its own direction.
        t: int | None = half.get((p, nxt))
        edge = (p, nxt)
        while t is not None:
            tri = f[t].tolist()
            faces[t][tri.index(p)] = copy
            k = tri.index(p)
            third = tri[(k + 2) % 3] if tri[(k + 1) % 3] == edge[1] else tri[(k + 1) % 3]
            if (p, third) in on_path:
                break
            edge = (p, third)
            t = half.get((p, third))
    return faces, np.array(origin), path


def skin_uv(skin: topology.Skin) -> Array:
    """Per-corner coordinates (F,3,2) of the skin in [0,1]^2."""
    faces, origin, path = _cut(skin)
    p = skin.vertices[origin]
    n = len(p)
    loops = sorted(_border_loops(faces), key=len, reverse=True)
    outer = loops[0]
    tip = int(np.where(outer == path[-1])[0][0])
    outer = np.roll(
        outer, -tip
    )  # starts at the crown, runs with the triangles: surface on the left
    step = np.linalg.norm(p[outer] - np.roll(p[outer], -1, 0), axis=1)
    neck = skin.neck_ring[origin[outer]]
    first, last = int(np.argmax(neck)), len(neck) - 1 - int(np.argmax(neck[::-1]))
    uv = np.zeros((n + len(loops) - 1, 2))

    def along(count: int, lengths: Array, *corners: tuple[float, float]) -> Array:
        """Count points along a polyline of corners, spaced by the lengths."""
        s = np.concatenate([[0.0], np.cumsum(lengths)])[:count] / lengths.sum()
        c = np.array(corners)
        leg = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(c, axis=0), axis=1))])
        return np.stack([np.interp(s * leg[-1], leg, c[:, k]) for k in range(2)], -1)

    # Counter-clockwise in UV: crown, left seam edge down, neck left to right, right seam edge up.
    uv[outer[: first + 1]] = along(first + 1, step[:first], (0.5, 1.0), (0.0, 1.0), (0.0, 0.0))
    uv[outer[first : last + 1]] = along(last - first + 1, step[first:last], (0.0, 0.0), (1.0, 0.0))
    uv[outer[last:]] = along(len(outer) - last, step[last:], (1.0, 0.0), (1.0, 1.0), (0.5, 1.0))

    filled = [faces]
    for k, loop in enumerate(loops[1:]):
        filled.append(np.stack([np.roll(loop, -1), loop, np.full(len(loop), n + k)], -1))
    every = np.concatenate(filled)
    fixed = np.zeros(len(uv), bool)
    fixed[outer] = True
    q = np.concatenate([p, np.array([p[loop].mean(0) for loop in loops[1:]])])
    uv = _convex_map(every, q, fixed, uv)
    out: Array = uv[faces]
    out[..., 0] = _widen(out[..., 0], *WIDEN_U)
    out[..., 1] = _widen(out[..., 1], *WIDEN_V)
    return out


def _convex_map(faces: Ints, p: Array, fixed: NDArray[np.bool_], uv: Array) -> Array:
    """Free vertices at positive combinations of neighbours, towards equal length ratios."""
    n = len(p)
    e = np.unique(
        np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1), axis=0
    )
    i, j = np.concatenate([e[:, 0], e[:, 1]]), np.concatenate([e[:, 1], e[:, 0]])
    want = np.maximum(np.linalg.norm(p[e[:, 0]] - p[e[:, 1]], axis=1), 0.8)
    weight = 1.0 / want
    free, held = np.where(~fixed)[0], np.where(fixed)[0]
    for _ in range(12):
        w = coo_matrix((np.concatenate([weight, weight]), (i, j)), shape=(n, n)).tocsr()
        total = np.asarray(w.sum(1)).ravel()[free]
        a = coo_matrix((total, (range(len(free)), range(len(free))))) - w[free][:, free]
        uv = uv.copy()
        uv[free] = spsolve(a.tocsc(), w[free][:, held] @ uv[held])
        ratio = np.linalg.norm(uv[e[:, 0]] - uv[e[:, 1]], axis=1) / want
        ratio /= np.exp(np.log(np.maximum(ratio, 1e-12)).mean())
        weight = weight * np.clip(ratio, 0.05, 20.0) ** 0.5
        weight = np.clip(weight / np.exp(np.log(weight).mean()), 1e-3, 1e3)
    return uv


def mouth_half_sphere(lip: Array, jaw: Array, pitch: float = 0.0) -> tuple[Array, Ints, Array]:
    """Half-sphere of a mouth: vertices (200,3), faces (340,3), unit-disc corners (340,3,2).

    Placed by the lower lip vertex and the jaw joint (same units as the input), turned about the jaw
    by pitch.
    """
    lat = np.linspace(-np.pi / 2, np.pi / 2, 20)[:10]
    lon = np.linspace(0, 2 * np.pi, 20)
    la, lo = np.meshgrid(lat, lon, indexing="ij")
    ball = np.stack([np.cos(la) * np.cos(lo), -np.cos(la) * np.sin(lo), -np.sin(la)], -1).reshape(
        -1, 3
    )
    d = lip - jaw
    length = float(np.linalg.norm(d))
    ez = d / length
    ex = np.cross([0, 1.0, 0], ez)
    ex /= np.linalg.norm(ex)
    ey = np.cross(ez, ex)
    unit = length / np.linalg.norm(d) * (0.005 if length < 1 else 5.0)
    rel = 0.25 * length * ball @ np.stack([ex, ey, ez]) + 0.75 * d - unit * ez
    c, s = np.cos(pitch), np.sin(pitch)
    v = rel @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]).T + jaw
    faces: list[list[int]] = []
    uv: list[list[list[float]]] = []

    def disc(i: int, j: int) -> list[float]:
        angle = 2 * np.pi * j / 19
        return [i / 9 * np.cos(angle), -i / 9 * np.sin(angle)]

    for i in range(9):
        for j in range(20):
            k = (j + 1) % 20
            faces.append([20 * i + j, 20 * (i + 1) + k, 20 * (i + 1) + j])
            uv.append([disc(i, j), disc(i + 1, k), disc(i + 1, j)])
            if i > 0:
                faces.append([20 * i + j, 20 * i + k, 20 * (i + 1) + k])
                uv.append([disc(i, j), disc(i, k), disc(i + 1, k)])
    return v, np.array(faces, dtype=np.int64), np.array(uv)


def place_disc(uv: Array, name: str) -> Array:
    """Unit-disc coordinates into their place in the atlas."""
    out: Array = np.asarray(DISC_CENTRES[name]) + DISC_RADIUS * uv
    return out


def place_skin(uv: Array) -> Array:
    """Skin coordinates in [0,1]^2 into their place in the atlas."""
    out: Array = np.array([0.004, 0.004]) + uv * np.array([0.992, SKIN_TOP - 0.004])
    return out


def write_obj(path: Path, vertices: Array, faces: Ints, corner_uv: Array, name: str) -> None:
    """Write triangles `v/vt` with coinciding texture coordinates merged."""
    flat = np.round(corner_uv.reshape(-1, 2), 6)
    unique, inverse = np.unique(flat, axis=0, return_inverse=True)
    index = np.stack([faces + 1, inverse.reshape(-1, 3) + 1], -1).reshape(len(faces), 6)
    lines = ["# procedural head", f"o {name}"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"vt {u:.6f} {v:.6f}" for u, v in unique.tolist()]
    lines.append("s 0")
    lines += ["f {}/{} {}/{} {}/{}".format(*row) for row in index.tolist()]
    path.write_text("\n".join(lines) + "\n")
