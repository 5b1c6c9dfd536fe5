"""The sculpted head as a signed distance function.

Conventions: millimetres, +x towards the subject's left, +y up, +z out of the face; mirror symmetric in x.
Negative inside. The head is a smooth union of some forty ellipsoids and tapered capsules placed at
anthropometric averages (head height 225, width 152, length 194, pupil distance 64). Everything here is
analytic and written for this project; no scan, no statistical face model enters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Rays that define the surface start here; the head is star-shaped about this point up to the ears.
CENTRE = np.array([0.0, 4.0, -30.0])
EYE_CENTRE = np.array([32.0, 22.0, 36.5])
EYE_RADIUS = 12.6
LID_RADIUS = EYE_RADIUS + 1.25
STOMION = np.array([0.0, -46.0, 66.0])
MOUTH_HALF_WIDTH = 25.0
MOUTH_CORNER = np.array([25.0, -45.6, 54.5])
CHIN = np.array([0.0, -76.0, 62.0])
NOSE_TIP = np.array([0.0, -13.0, 84.0])
EAR_CENTRE = np.array([78.0, 6.0, -44.0])


def smooth_union(a: Array, b: Array, k: float) -> Array:
    """Union of two distances with a fillet of width k (polynomial blend)."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - h * h * k * 0.25


def smooth_cut(a: Array, b: Array, k: float) -> Array:
    """a without b, with a fillet of width k."""
    return -smooth_union(-a, b, k)


def ellipsoid(
    p: Array, centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> Array:
    """Approximate distance to an ellipsoid (exact on its surface)."""
    r = np.asarray(radii)
    q = (p - np.asarray(centre)) / r
    k0 = np.sqrt((q * q).sum(-1))
    k1 = np.sqrt(((q / r) ** 2).sum(-1))
    return k0 * (k0 - 1.0) / np.maximum(k1, 1e-9)


def capsule(
    p: Array,
    a: tuple[float, float, float],
    b: tuple[float, float, float],
    ra: float,
    rb: float,
) -> Array:
    """Distance to a capsule from a to b whose radius runs from ra to rb."""
    pa = p - np.asarray(a)
    ba = np.asarray(b) - np.asarray(a)
    t = np.clip((pa @ ba) / (ba @ ba), 0.0, 1.0)
    return np.sqrt(((pa - t[..., None] * ba) ** 2).sum(-1)) - (ra + (rb - ra) * t)


def _ear(p: Array) -> Array:
    """A shell-shaped ear, flared backwards, with helix rim, antihelix, concha and lobe."""
    c, s = np.cos(0.50), np.sin(0.50)
    q = p - EAR_CENTRE
    # Turn about y so that the back edge of the ear stands off the skull; lean the top backwards.
    x, z = c * q[:, 0] + s * q[:, 2], -s * q[:, 0] + c * q[:, 2]
    y = q[:, 1]
    ct, st = np.cos(0.16), np.sin(0.16)
    y, z = ct * y - st * z, st * y + ct * z
    q = np.stack([x, y, z], -1)
    disc = ellipsoid(q, (0.0, 3.0, -3.0), (5.5, 29.0, 17.5))
    lobe = ellipsoid(q, (-1.0, -23.0, 3.0), (4.5, 9.0, 7.5))
    d = smooth_union(disc, lobe, 6.0)
    d = smooth_cut(d, ellipsoid(q, (8.0, 5.0, -2.0), (8.0, 22.0, 12.0)), 3.0)
    d = smooth_union(d, capsule(q, (1.0, -8.0, -8.0), (1.0, 16.0, -3.0), 3.2, 2.2), 3.0)
    d = smooth_cut(d, ellipsoid(q, (6.5, -5.0, 2.5), (7.5, 9.0, 6.0)), 3.0)
    return smooth_union(d, ellipsoid(q, (2.0, -6.0, 11.5), (3.0, 5.0, 3.5)), 3.0)


def head_distance(points: Array) -> Array:
    """Signed distance (approximate, mm) of points (N,3) to the skin; both halves are mirror images."""
    p = points.copy()
    p[:, 0] = np.sqrt(p[:, 0] ** 2 + 0.09)  # a soft |x| keeps the midline free of creases
    u = smooth_union
    d = ellipsoid(p, (0, 50, -37), (74, 84, 95))
    d = u(d, ellipsoid(p, (0, 58, -8), (60, 56, 68)), 24)
    # Mid-face, cheeks, jaw.
    d = u(d, ellipsoid(p, (0, -6, -4), (63, 58, 60)), 22)
    d = u(d, ellipsoid(p, (0, -40, 16), (46, 44, 43)), 20)
    d = u(d, capsule(p, (46, -46, -16), (16, -76, 40), 15, 12), 26)
    d = u(d, ellipsoid(p, (0, -77, 49), (17, 13, 14)), 14)
    d = u(d, ellipsoid(p, (48, 2, 24), (18, 13, 22)), 18)
    d = u(d, ellipsoid(p, (34, -26, 34), (20, 24, 20)), 20)
    d = u(d, ellipsoid(p, (0, -42, 40), (29, 22, 25)), 14)
    # Neck and the start of the shoulders.
    d = u(d, capsule(p, (0, -40, -42), (0, -200, -48), 53, 57), 18)
    d = u(d, capsule(p, (0, -196, -52), (120, -228, -52), 42, 40), 50)
    d = u(d, capsule(p, (14, -185, 4), (52, -60, -50), 7, 9), 16)
    # Brow, eye sockets, nose.
    d = u(d, capsule(p, (10, 37, 53.5), (44, 39, 38), 8.5, 7), 14)
    d = smooth_cut(d, ellipsoid(p, (31, 21.5, 58), (19, 13, 15)), 11)
    d = smooth_cut(d, ellipsoid(p, (17, 18, 58), (7, 12, 10)), 8)
    d = u(d, capsule(p, (0, 30, 51), (0, -8, 70), 6.5, 6.5), 12)
    d = u(d, ellipsoid(p, (0, -13.5, 74), (9, 8, 10)), 7)
    d = u(d, ellipsoid(p, (12.0, -17.0, 64.5), (6.0, 6.8, 9.0)), 5)
    d = u(d, capsule(p, (0, -23, 65), (0, -19, 77), 4, 4), 4)
    d = smooth_cut(d, ellipsoid(p, (6.4, -23.0, 71.0), (3.2, 3.4, 5.5)), 3)
    # Lids lie on the eyeball.
    d = u(d, ellipsoid(p, tuple(EYE_CENTRE), (LID_RADIUS,) * 3), 4.5)
    d = u(d, capsule(p, (17.0, 20.3, 43.5), (22, 21, 46), 2.0, 2.0), 4)
    # Lips, philtrum, fold below the lower lip.
    d = smooth_cut(d, capsule(p, (0, -27, 72.5), (0, -37, 73.5), 3.0, 3.5), 4)
    d = u(d, capsule(p, (0, -42.3, 65.2), (7, -41.3, 65.3), 4.2, 4.3), 4)
    d = u(d, capsule(p, (7, -41.3, 65.3), (25, -45.0, 53.5), 4.3, 1.6), 4)
    d = u(d, capsule(p, (0, -51.2, 63.8), (10, -50.8, 63.0), 5.2, 5.0), 4)
    d = u(d, capsule(p, (10, -50.8, 63.0), (25, -46.4, 53.0), 5.0, 1.6), 4)
    d = smooth_cut(d, ellipsoid(p, (0, -62.5, 71), (17, 5, 9)), 7)
    return u(d, _ear(p), 4)


def raycast(directions: Array, offset: float = 0.0, start: float = 290.0) -> Array:
    """Outermost points of the skin along unit directions (N,3) from CENTRE; offset thickens it (mm)."""
    t = np.full(len(directions), start)
    for step in range(70):
        # The blends shorten distances, the ellipsoids are only near-exact: under-relax at first.
        t = t - (0.75 if step < 60 else 0.9) * (head_distance(CENTRE + t[:, None] * directions) - offset)
    return CENTRE + t[:, None] * directions


def normals(points: Array, h: float = 0.35) -> Array:
    """Unit outward gradient of the distance at points (N,3)."""
    g = np.stack(
        [head_distance(points + e) - head_distance(points - e) for e in np.eye(3) * h], -1
    )
    return g / np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), 1e-12)


def occlusion(points: Array, normal: Array) -> Array:
    """Ambient visibility in 0..1 from distances sampled along the normals."""
    dark = np.zeros(len(points))
    for reach, weight in ((2.0, 0.30), (5.0, 0.26), (11.0, 0.24), (22.0, 0.20)):
        gap = head_distance(points + reach * normal)
        dark += weight * np.clip(1.0 - gap / reach, 0.0, 1.0)
    return np.clip(1.0 - dark, 0.0, 1.0)
