"""Meshes that are not part of the head model but move with it: mouth interior, hair, clothing.

Conventions: metres, the rest pose of the unshaped head; triangles counter-clockwise from outside,
both sides
are drawn. A vertex follows a weighted set of three skin vertices: their change by identity always,
their change by expression if `follows`, and the jaw's rotation if `on_jaw`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cap4d_core.demo import fields

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# Materials, index into `rendering.MATERIALS`.
SKIN, EYE, HAIR, TOOTH, FLESH, CLOTH, FRAME, METAL = range(8)


@dataclass(frozen=True)
class Attachment:
    """A mesh bound to the head.

    Attributes:
        vertices: (N,3) metres. faces: (M,3).
        colors: (N,3) linear albedo. material: one of the constants above.
        binding: (N,3) skin vertex ids. weights: (N,3) summing to one.
        follows: whether expressions move it. on_jaw: (N,) bool.
    """

    vertices: Array
    faces: Ints
    colors: Array
    material: int
    binding: Ints
    weights: Array
    follows: bool
    on_jaw: NDArray[np.bool_]


def bind(points: Array, skin: Array) -> tuple[Ints, Array]:
    """The three nearest skin vertices (N,3) and inverse-distance weights (N,3)."""
    distance, index = cKDTree(skin).query(points, k=3)
    w = 1.0 / (distance + 1e-3)
    return index.astype(np.int64), w / w.sum(1, keepdims=True)


def grid_faces(rows: int, cols: int, closed: bool) -> Ints:
    """Triangles of a row-major grid of vertices; rows go down, columns to +x in front."""
    c = np.arange(cols if closed else cols - 1)
    r = np.arange(rows - 1)
    rr, cc = np.meshgrid(r, c, indexing="ij")
    nxt = (cc + 1) % cols
    a, b = rr * cols + cc, rr * cols + nxt
    d, e = a + cols, b + cols
    a, b, d, e = (v.ravel() for v in (a, b, d, e))
    return np.concatenate([np.stack([a, d, e], -1), np.stack([a, e, b], -1)])


def _arch(
    half_angle: float,
    cols: int,
    width: float,
    front: float,
    depth: float,
    heights: Array,
    lean: Array,
) -> Array:
    """A band (rows*cols,3) mm along a dental arch; heights and lean per row."""
    t = np.linspace(-half_angle, half_angle, cols)
    x, z = width * np.sin(t), front - depth * (1 - np.cos(t))
    rows = [
        np.stack([x * (1 - 0.015 * k), np.full(cols, y), z + dz], -1)
        for k, (y, dz) in enumerate(zip(heights, lean, strict=True))
    ]
    return np.concatenate(rows)


def mouth_interior(skin: Array, jaw_unit_ids: Ints, tooth: Array, gum: Array) -> list[Attachment]:
    """Upper and lower teeth with gums, and a tongue.

    Args:
        skin: (V,3) rest vertices in metres.
        jaw_unit_ids: three skin vertices that carry the mouth's identity (lip centre and corners).
        tooth: (3,) albedo of the teeth.
        gum: (3,) albedo of the gums.
    """
    out: list[Attachment] = []
    cols = 85
    for upper in (True, False):
        if upper:
            heights, lean = (
                np.array([-30.0, -38.0, -39.4, -44.8, -49.2, -50.0]),
                np.array([-3.0, -0.8, 0.0, 0.9, 0.7, -1.2]),
            )
            band = _arch(1.25, cols, 25.0, 58.0, 33.0, heights, lean)
        else:
            heights, lean = (
                np.array([-49.4, -50.0, -53.4, -57.2, -58.4, -66.0]),
                np.array([-1.2, 0.2, 0.6, 0.0, -0.6, -3.0]),
            )
            band = _arch(1.22, cols, 23.0, 55.0, 31.0, heights, lean)
        t = np.linspace(-1.25, 1.25, cols)
        # Tooth borders narrow towards the back, with a slight scallop.
        per = np.abs((np.abs(t) / (0.165 if upper else 0.125)) ** 0.92 % 1.0 - 0.5) * 2
        gap = np.clip((per - 0.78) / 0.22, 0, 1) ** 2
        shade = (0.45 + 0.55 * np.cos(0.9 * t) ** 2)[None, :, None]
        rows = len(heights)
        is_gum = ((np.arange(rows) <= 1) if upper else (np.arange(rows) >= 4))[:, None, None]
        col = np.where(is_gum, gum, tooth * (1 - 0.45 * gap[None, :, None])) * shade
        col = col * (0.72 if upper else 0.62)
        band = band.reshape(rows, cols, 3)
        inner = ~is_gum[..., 0]
        band[..., 2] -= 0.5 * gap[None] * inner
        edge = 4 if upper else 1
        band[edge, :, 1] += (0.5 if upper else -0.4) * gap
        out.append(
            _piece(
                band.reshape(-1, 3),
                grid_faces(rows, cols, False),
                col.reshape(-1, 3),
                TOOTH,
                jaw_unit_ids,
                not upper,
            )
        )
    # A dark bag behind the teeth, so that nobody looks into the skull.
    u, v = np.meshgrid(np.linspace(0.02, 1, 9), np.linspace(0, 2 * np.pi, 25)[:-1], indexing="ij")
    polar = 0.5 * np.pi * u
    bag = np.stack(
        [
            27.0 * np.sin(polar) * np.cos(v),
            -46.0 + np.where(v < np.pi, 19.0, 27.0) * np.sin(polar) * np.sin(v),
            46.0 - 40.0 * np.cos(polar),
        ],
        -1,
    ).reshape(-1, 3)
    dark = np.tile(gum * 0.06, (len(bag), 1))
    out.append(_piece(bag, grid_faces(9, 24, True), dark, CLOTH, jaw_unit_ids, False))
    # Tongue: a flattened dome on the floor of the mouth.
    u, v = np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 2 * np.pi, 25)[:-1], indexing="ij")
    x = 18.0 * u * np.cos(v)
    z = 25.0 + 23.0 * u * np.sin(v)
    y = -55.5 - 6.0 * u**2 - 1.2 * np.exp(-((x / 2.5) ** 2)) * (1 - u)
    p = np.stack([x, y, z], -1)
    depth = fields.smoothstep(z, 10.0, 52.0)[..., None]
    tongue = gum * np.array([1.0, 0.85, 0.9]) * (0.20 + 0.60 * depth)
    faces = grid_faces(12, 24, True)
    out.append(_piece(p.reshape(-1, 3), faces, tongue.reshape(-1, 3), FLESH, jaw_unit_ids, True))
    return out


def _piece(
    p_mm: Array, faces: Ints, colors: Array, material: int, ids: Ints, on_jaw: bool
) -> Attachment:
    n = len(p_mm)
    return Attachment(
        1e-3 * p_mm,
        faces,
        colors,
        material,
        np.tile(ids, (n, 1)),
        np.full((n, 3), 1 / 3),
        False,
        np.full(n, on_jaw),
    )
