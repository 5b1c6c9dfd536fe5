"""Points and surfaces: alignment of point sets, closest points on a mesh."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Array = NDArray[np.float64]


def align_similarity(source: Array, target: Array, weights: Array) -> tuple[float, Array, Array]:
    """Weighted least-squares similarity (Umeyama 1991): target = scale R source + t.

    Args:
        source: (N, 3).
        target: (N, 3).
        weights: (N,).

    Returns:
        Scale, rotation (3, 3) and translation (3,).
    """
    share = weights / weights.sum()
    source_mean, target_mean = share @ source, share @ target
    a, b = source - source_mean, target - target_mean
    u, values, vt = np.linalg.svd((b * share[:, None]).T @ a)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((values * sign).sum() / (share @ (a * a).sum(1)))
    return scale, rotation, target_mean - scale * rotation @ source_mean


def closest_on_surface(
    points: Array,
    vertices: Array,
    faces: NDArray[np.int64],
    allowed: NDArray[np.int64] | None = None,
    neighbours: int = 6,
) -> tuple[NDArray[np.int64], Array, Array]:
    """Closest points on a mesh.

    Only triangles at the nearest vertices are looked at, which is exact for points near a mesh of
    well-shaped triangles.

    Args:
        points: (N, 3).
        vertices: (V, 3).
        faces: (F, 3).
        allowed: triangles that may be chosen; None = all.
        neighbours: nearest vertices to look at.

    Returns:
        Face index (N,), barycentrics (N, 3) and the points (N, 3).
    """
    around: list[list[int]] = [[] for _ in range(len(vertices))]
    for face in np.arange(len(faces)) if allowed is None else allowed:
        for vertex in faces[face]:
            around[vertex].append(int(face))
    used = np.array([v for v in range(len(vertices)) if around[v]])
    _, nearest = cKDTree(vertices[used]).query(points, k=neighbours)
    index = np.zeros(len(points), np.int64)
    barycentrics, placed = np.zeros((len(points), 3)), np.zeros((len(points), 3))
    for number, point in enumerate(points):
        candidates = np.unique([f for v in used[nearest[number]] for f in around[v]])
        weights = _closest_barycentrics(point, vertices[faces[candidates]])
        spots = (vertices[faces[candidates]] * weights[..., None]).sum(1)
        best = int(np.linalg.norm(spots - point, axis=1).argmin())
        index[number], barycentrics[number] = candidates[best], weights[best]
        placed[number] = spots[best]
    return index, barycentrics, placed


def _closest_barycentrics(point: Array, triangles: Array) -> Array:
    """Barycentrics (F, 3) of the closest point of every triangle (F, 3, 3) to one point."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    ab, ac, ap = b - a, c - a, point - a
    d00, d01, d11 = (ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1)
    d20, d21 = (ap * ab).sum(1), (ap * ac).sum(1)
    denominator = np.maximum(d00 * d11 - d01 * d01, 1e-30)
    v = (d11 * d20 - d01 * d21) / denominator
    w = (d00 * d21 - d01 * d20) / denominator
    inside = np.stack([1 - v - w, v, w], axis=1)
    # Outside, the closest point lies on one of the three edges.
    best, best_distance = inside.copy(), np.where((inside >= 0).all(1), 0.0, np.inf)
    for first, second in ((0, 1), (1, 2), (2, 0)):
        start, edge = triangles[:, first], triangles[:, second] - triangles[:, first]
        along = ((point - start) * edge).sum(1) / np.maximum((edge * edge).sum(1), 1e-30)
        along = np.clip(along, 0.0, 1.0)
        distance = np.linalg.norm(start + along[:, None] * edge - point, axis=1)
        weights = np.zeros_like(inside)
        weights[:, first], weights[:, second] = 1 - along, along
        closer = distance < best_distance
        best[closer], best_distance[closer] = weights[closer], distance[closer]
    return best
