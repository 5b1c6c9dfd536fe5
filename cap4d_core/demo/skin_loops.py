"""Loops of vertices along mouth, lids, ears and neck, as directions from `anatomy.CENTRE`.

The mouth slit is held open in direction space; `close_slit` maps to the true directions.

Conventions: see `cap4d_core.demo.topology`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# The mouth in the plane z = STOMION z seen from CENTRE (gnomonic coordinates).
_PLANE = float(anatomy.STOMION[2] - anatomy.CENTRE[2])
MOUTH_X = 28.4
SLIT = 5.5
_SLIT_REACH = 30.0
NECK_HEIGHTS = (-172.0, -158.0, -143.0, -127.0)


def unit(v: Array) -> Array:
    """Vectors scaled to length one."""
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def lip_line(x: Array) -> Array:
    """Height of the lip line in gnomonic coordinates at gnomonic x."""
    return -46.0 - 5.1 * np.clip(np.abs(x) / MOUTH_X, 0.0, 1.3) ** 2


def slit(x: Array) -> Array:
    """Half height of the held-open mouth at gnomonic x."""
    return SLIT * np.sqrt(np.clip(1.0 - (x / MOUTH_X) ** 2, 0.0, 1.0))


def gnomonic(d: Array) -> tuple[Array, Array]:
    """Directions (N,3) in front of CENTRE to coordinates in the plane of the lips (mm)."""
    z = np.maximum(d[:, 2], 1e-3)
    return _PLANE * d[:, 0] / z, anatomy.CENTRE[1] + _PLANE * d[:, 1] / z


def from_gnomonic(x: Array, y: Array) -> Array:
    """Inverse of `gnomonic`."""
    return unit(np.stack([x, y - anatomy.CENTRE[1], np.full_like(x, _PLANE)], -1))


def close_slit(d: Array) -> Array:
    """Directions with the mouth held open to the true directions (lips together)."""
    x, y = gnomonic(d)
    dy = y - lip_line(x)
    gap, reach = slit(x), _SLIT_REACH
    new = np.where(
        np.abs(dy) < reach, np.maximum(np.abs(dy) - gap, 0.0) * reach / (reach - gap), np.abs(dy)
    )
    front = (d[:, 2] > 0.2) & (np.abs(x) < MOUTH_X)
    out = from_gnomonic(x, lip_line(x) + np.sign(dy) * new)
    return np.where(front[:, None], out, d)


def lid_opening(num: int) -> Array:
    """Eye opening (num,2), counter-clockwise from the outer corner; a outwards, b up."""
    t = 2 * np.pi * np.arange(num) / num
    a = np.where(np.cos(t) > 0, 13.4, 15.2) * np.cos(t)
    up = 5.0 * np.sin(np.clip(t, 0, np.pi)) ** 0.92 * (1 - 0.10 * np.cos(t))
    down = 5.6 * np.abs(np.sin(np.clip(t, np.pi, 2 * np.pi))) ** 1.05 * (1 + 0.15 * np.cos(t))
    tilt = 0.075 * a - 0.4
    return np.stack([a, np.where(t <= np.pi, up, -down) + tilt], -1)


def offset_loop(loop: Array, distance: Array | float) -> Array:
    """Move a closed counter-clockwise 2D loop along its outward normals."""
    tangent = np.roll(loop, -1, 0) - np.roll(loop, 1, 0)
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], -1)
    return loop + np.asarray(distance)[..., None] * unit(normal)


def eye_directions(ab: Array) -> Array:
    """Directions of points (a,b) above the eyeball at +x."""
    z = np.sqrt(np.maximum(anatomy.LID_RADIUS**2 - (ab**2).sum(-1), 16.0))
    p = anatomy.EYE_CENTRE + np.stack([ab[:, 0], ab[:, 1], z], -1)
    return unit(p - anatomy.CENTRE)


def ear_loops(num: int) -> Array:
    """Directions (2*num,3) just inside and just outside the ear's outline as seen from CENTRE."""
    axis = unit(anatomy.EAR_CENTRE + np.array([4.0, 2.0, -2.0]) - anatomy.CENTRE)
    e1 = unit(np.cross([0.0, 1.0, 0.0], axis))
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


def neck_loops(num: int) -> list[Array]:
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
