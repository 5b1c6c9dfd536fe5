"""The sculpted head as a signed distance function.

Conventions: millimetres, +x towards the subject's left, +y up, +z out of the face; mirror symmetric
in x. Negative inside. The head is a smooth union of some forty ellipsoids and tapered capsules
placed at anthropometric averages (head height 225, width 152, length 194, pupil distance 64).
Everything here is analytic and written for this project; no scan, no statistical face model enters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Rays that define the surface start here; the head is star-shaped about this point up to the ears.
CENTRE = np.array([0.0, 4.0, -30.0])
EYE_CENTRE = np.array([32.0, 22.0, 36.0])
EYE_RADIUS = 13.0
LID_RADIUS = EYE_RADIUS + 1.25
STOMION = np.array([0.0, -46.0, 66.0])
MOUTH_HALF_WIDTH = 25.0
MOUTH_CORNER = np.array([25.0, -45.6, 54.5])
CHIN = np.array([0.0, -76.0, 62.0])
NOSE_TIP = np.array([0.0, -13.0, 84.0])
EAR_CENTRE = np.array([72.5, 3.0, -42.0])


def smooth_union(a: Array, b: Array, k: float) -> Array:
    """Union of two distances with a fillet of width k (polynomial blend)."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - h * h * k * 0.25


def smooth_cut(a: Array, b: Array, k: float) -> Array:
    """A without b, with a fillet of width k."""
    return -smooth_union(-a, b, k)


def ellipsoid(
    p: Array, centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> Array:
    """Approximate distance to an ellipsoid (exact on its surface)."""
    # Column by column: fast on points stored by columns, and no threads of BLAS for small sums.
    near, far = np.zeros(len(p)), np.zeros(len(p))
    for k in range(3):
        q = (p[:, k] - centre[k]) / radii[k]
        w = q / radii[k]
        near += q * q
        far += w * w
    k0, k1 = np.sqrt(near), np.sqrt(far)
    out: Array = k0 * (k0 - 1.0) / np.maximum(k1, 1e-9)
    return out


def capsule(
    p: Array,
    a: tuple[float, float, float],
    b: tuple[float, float, float],
    ra: float,
    rb: float,
) -> Array:
    """Distance to a capsule from a to b whose radius runs from ra to rb."""
    axis = [b[k] - a[k] for k in range(3)]
    rel = [p[:, k] - a[k] for k in range(3)]
    along = rel[0] * axis[0] + rel[1] * axis[1] + rel[2] * axis[2]
    t = np.clip(along / sum(c * c for c in axis), 0.0, 1.0)
    square = sum((r - t * c) ** 2 for r, c in zip(rel, axis, strict=True))
    out: Array = np.sqrt(square) - (ra + (rb - ra) * t)
    return out


def ear_distance(p: Array) -> Array:
    """Distance to an ear, flared backwards, with helix, antihelix, concha and lobe."""
    c, s = np.cos(0.38), np.sin(0.38)
    q = p * np.where(p[:, :1] < 0, [-1.0, 1, 1], 1.0) - EAR_CENTRE
    # Turn about y so that the back edge of the ear stands off the skull; lean the top backwards.
    x, z = c * q[:, 0] + s * q[:, 2], -s * q[:, 0] + c * q[:, 2]
    y = q[:, 1]
    ct, st = np.cos(0.16), np.sin(0.16)
    y, z = ct * y - st * z, st * y + ct * z
    q = np.stack([x, y, z]).T
    disc = ellipsoid(q, (0.0, 3.0, -3.0), (6.5, 28.0, 16.5))
    lobe = ellipsoid(q, (-1.0, -22.0, 4.0), (5.0, 9.0, 7.5))
    d = smooth_union(disc, lobe, 8.0)
    d = smooth_cut(d, ellipsoid(q, (8.5, 6.0, -1.5), (8.0, 20.5, 11.5)), 3.5)
    d = smooth_union(d, capsule(q, (1.2, -9.0, -8.0), (1.2, 15.0, -2.5), 3.0, 2.2), 4.0)
    d = smooth_cut(d, ellipsoid(q, (6.0, -4.0, 3.5), (8.5, 8.5, 6.0)), 3.0)
    return smooth_union(d, ellipsoid(q, (2.0, -5.0, 11.5), (3.5, 5.5, 4.0)), 4.0)


def head_distance(points: Array) -> Array:
    """Signed distance (approximate, mm) of points (N,3) to the mirror-symmetric skin."""
    p = np.array(points, order="F")
    p[:, 0] = np.sqrt(p[:, 0] ** 2 + 0.09)  # a soft |x| keeps the midline free of creases
    u = smooth_union
    d = ellipsoid(p, (0, 50, -37), (74, 84, 95))
    d = u(d, ellipsoid(p, (0, 56, -10), (63, 58, 70)), 24)
    # Mid-face, cheeks, jaw.
    d = u(d, ellipsoid(p, (0, -8, -6), (64, 60, 60)), 22)
    d = u(d, ellipsoid(p, (0, -40, 14), (43, 46, 44)), 22)
    d = u(d, capsule(p, (43, -42, -14), (10, -76, 42), 14, 12), 30)
    d = u(d, ellipsoid(p, (0, -77, 48), (16, 13, 14.5)), 16)
    d = u(d, ellipsoid(p, (44, 0, 24), (19, 15, 22)), 26)
    d = u(d, ellipsoid(p, (32, -26, 32), (21, 26, 21)), 24)
    d = u(d, ellipsoid(p, (0, -42, 38), (30, 22, 26)), 16)
    # Neck and the start of the shoulders.
    d = u(d, capsule(p, (0, -36, -44), (0, -200, -50), 47, 52), 34)
    d = u(d, ellipsoid(p, (0, -232, -50), (84, 56, 64)), 50)
    d = u(d, capsule(p, (50, -48, -45), (18, -190, 0), 7, 9), 24)
    d = u(d, ellipsoid(p, (0, -122, 2), (9, 14, 9)), 16)
    # Brow, eye sockets, nose.
    d = u(d, capsule(p, (13, 37, 51.5), (43, 40, 38), 7.0, 5.8), 24)
    d = smooth_cut(d, ellipsoid(p, (32, 22, 57), (18, 11, 10.5)), 14)
    d = smooth_cut(d, ellipsoid(p, (17, 18, 58), (6.5, 11, 6.5)), 11)
    d = u(d, capsule(p, (0, 34, 50.5), (0, -7, 68), 6.2, 6.2), 17)
    d = u(d, ellipsoid(p, (0, -6, 61.5), (11, 16, 12)), 17)
    d = u(d, ellipsoid(p, (19, 2, 49.5), (9, 15, 8)), 14)
    d = u(d, ellipsoid(p, (0, -12.5, 73), (9.0, 7.6, 10.5)), 9)
    d = u(d, ellipsoid(p, (10.6, -16.5, 65.0), (5.8, 6.4, 8.5)), 8)
    d = u(d, capsule(p, (0, -22, 64), (0, -18.5, 76), 4, 4.2), 5)
    d = smooth_cut(d, ellipsoid(p, (6.0, -22.8, 70.0), (3.2, 3.2, 5.5)), 3)
    # Lids lie on the eyeball.
    d = u(d, ellipsoid(p, tuple(EYE_CENTRE), (LID_RADIUS,) * 3), 5.5)
    d = u(d, capsule(p, (16.8, 20.0, 43.0), (22, 21, 46), 1.8, 2.0), 5)
    # Lips, philtrum, fold below the lower lip.
    d = smooth_cut(d, capsule(p, (0, -27, 72.8), (0, -37, 73.8), 3.0, 3.5), 5)
    upper = u(
        capsule(p, (0, -41.2, 65.2), (7, -40.3, 65.3), 5.2, 5.4),
        capsule(p, (7, -40.3, 65.3), (27.0, -43.9, 51.0), 5.4, 2.6),
        4,
    )
    lower = u(
        capsule(p, (0, -52.4, 63.4), (10, -51.8, 62.4), 6.4, 6.2),
        capsule(p, (10, -51.8, 62.4), (27.0, -45.3, 50.6), 6.2, 2.6),
        4,
    )
    d = u(d, u(upper, lower, 0.8), 5)
    d = smooth_cut(d, ellipsoid(p, (0, -63.0, 71), (20, 5, 9)), 9)
    return u(d, ear_distance(p), 4)


def rays(directions: Array) -> tuple[Array, Array]:
    """Origins and unit directions (N,3) of the rays of directions on the sphere around CENTRE.

    Rays start at CENTRE; below the chin their origin slides down the neck while they flatten, so
    that they meet the neck squarely instead of grazing it.
    """
    d = directions
    lat = np.arcsin(np.clip(d[:, 1], -1.0, 1.0))
    t = np.clip((np.radians(-38.0) - lat) / np.radians(47.0), 0.0, 1.0) ** 1.25
    origin = CENTRE + t[:, None] * np.array([0.0, -180.0, -10.0])
    new = lat * (1 - t) + np.radians(-8.0) * t
    flat = d[:, [0, 2]] / np.maximum(np.hypot(d[:, 0], d[:, 2]), 1e-9)[:, None]
    turned = np.stack([np.cos(new) * flat[:, 0], np.sin(new), np.cos(new) * flat[:, 1]], -1)
    return origin, np.where((t > 0)[:, None], turned, d)


def raycast(directions: Array, offset: float = 0.0, steps: int = 64) -> Array:
    """Outermost skin points (N,3) on the rays of directions (N,3); offset thickens it (mm)."""
    origin, d = rays(directions)
    t = np.full(len(directions), 175.0)
    for _ in range(steps):
        # The ellipsoid distances are only near-exact: under-relax.
        t = t - 0.8 * (head_distance(origin + t[:, None] * d) - offset)
    return origin + t[:, None] * d


def normals(points: Array, h: float = 0.35) -> Array:
    """Unit outward gradient of the distance at points (N,3)."""
    g = np.stack([head_distance(points + e) - head_distance(points - e) for e in np.eye(3) * h], -1)
    return g / np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), 1e-12)


def occlusion(points: Array, normal: Array) -> Array:
    """Ambient visibility in 0..1 from distances sampled along the normals."""
    dark = np.zeros(len(points))
    for reach, weight in ((2.0, 0.30), (5.0, 0.26), (11.0, 0.24), (22.0, 0.20)):
        gap = head_distance(points + reach * normal)
        dark += weight * np.clip(1.0 - gap / reach, 0.0, 1.0)
    return np.clip(1.0 - dark, 0.0, 1.0)
