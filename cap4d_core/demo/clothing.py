"""Clothing: a body around neck and shoulders, and what distinguishes garments at the neck.

Conventions: millimetres while building; longitude 0 is in front, +pi/2 at the subject's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy, attachments, fields

Array = NDArray[np.float64]

AXIS_Z = -42.0  # of the neck


@dataclass(frozen=True)
class Garment:
    """What a subject wears.

    kind: one of KINDS. pattern: one of PATTERNS. second: (3,) linear albedo of pattern, hood lining
    or inner shirt. period: of the pattern, mm.
    """

    kind: str
    pattern: str
    second: Array
    period: float


KINDS = ("crew", "v_neck", "shirt", "turtleneck", "hoodie")
PATTERNS = ("plain", "stripes", "checks", "yoke")


def _radius(height: Array, direction: Array, clearance: float) -> Array:
    """Distance (N,) from the neck's axis to the skin, plus clearance, at heights and directions."""
    at = np.clip(height, -170.0, None)
    origin = np.stack([np.zeros(len(at)), at, np.full(len(at), AXIS_Z)], -1)
    r = np.full(len(at), 130.0)
    for _ in range(30):
        r -= 0.85 * (anatomy.head_distance(origin + r[:, None] * direction) - clearance)
    return r


def body(
    skin: Array,
    color: Array,
    neckline: float,
    garment: Garment,
    rng: np.random.Generator,
) -> attachments.Attachment:
    """A band around the neck that widens to the shoulders.

    Args:
        skin: (V,3) rest vertices in metres.
        color: (3,) linear albedo.
        neckline: how far below the default the front of the collar sits, mm.
        garment: its kind moves the neckline, its pattern is painted.
        rng: for the weave.
    """
    rows, cols = (22, 72) if garment.pattern == "plain" else (44, 144)
    lon = 2 * np.pi * (np.arange(cols) + 0.5) / cols
    s = np.linspace(0, 1, rows)
    front = 0.5 + 0.5 * np.cos(lon)
    top = -113.0 - (14.0 + neckline) * front
    if garment.kind == "v_neck":
        away = np.minimum(lon, 2 * np.pi - lon)
        top -= 24.0 * np.clip(1 - away / 0.75, 0, 1) + 3.0 * front
    elif garment.kind == "turtleneck":
        top = -101.0 - 9.0 * front
    elif garment.kind == "hoodie":
        top = -119.0 - (16.0 + neckline) * front
    ss, tt = np.meshgrid(s, lon, indexing="ij")
    y = top[None] * (1 - ss) + (-265.0 + 62.0 * np.abs(np.sin(tt)) ** 2) * ss
    direction = np.stack([np.sin(tt), np.zeros_like(tt), np.cos(tt)], -1).reshape(-1, 3)
    # Rays that are the same, or each other's mirror image, are followed once.
    height = np.where(y > -170.0, np.arange(rows)[:, None], -1)
    mirror = np.minimum(np.arange(cols), cols - 1 - np.arange(cols))
    _, first, copy = np.unique(
        (height * cols + mirror).ravel(), return_index=True, return_inverse=True
    )
    r = _radius(y.ravel()[first], direction[first], 2.2)[copy.ravel()]
    widen = np.clip((ss.ravel() - 0.10) / 0.90, 0, 1)
    lateral = np.abs(np.sin(tt)).ravel()
    r = r + widen**1.1 * (30.0 + 125.0 * lateral**2)
    # The hem stands off the skin and curls in.
    r += np.where(ss.ravel() == 0, -1.6, 1.4 * np.exp(-(((ss.ravel() - 0.05) / 0.05) ** 2)))
    if garment.kind == "turtleneck":
        below = np.clip((top[None] - y).ravel() / 26.0, 0, 1.5)
        r += 3.2 * np.exp(-(((below - 0.45) / 0.40) ** 2))
    p = np.stack([np.zeros(y.size), y.ravel(), np.full(y.size, AXIS_Z)], -1) + (
        r[:, None] * direction
    )
    weave = 1.0 + 0.05 * rng.standard_normal((rows, cols, 1))
    trim = {"crew": 0.82, "v_neck": 0.78, "turtleneck": 1.0, "shirt": 0.95, "hoodie": 0.9}
    rim = np.where(ss[..., None] < 0.13, trim[garment.kind], 1.0)
    share = _pattern(garment, p, (top[None] - y).ravel()).reshape(rows, cols, 1)
    col = (color * (1 - share) + garment.second * share) * weave * rim
    if garment.kind == "shirt":
        # The buttoned edge in front.
        col = col * (1 - 0.30 * np.exp(-(((p[:, 0] - 7.0) / 2.5) ** 2)) * (p[:, 2] > 0)).reshape(
            rows, cols, 1
        )
    col = np.clip(col, 0.004, 0.95).reshape(-1, 3)
    return _attach(p, attachments.grid_faces(rows, cols, True), col, skin)


def _pattern(garment: Garment, p: Array, below: Array) -> Array:
    """Share of the second colour (N,) at points; below: distance under the neckline (mm)."""

    def bars(v: Array) -> Array:
        phase = np.abs((v / garment.period) % 1.0 - 0.5) * 2
        return fields.smoothstep(phase, 0.42, 0.58)

    if garment.pattern == "stripes":
        return bars(below)
    if garment.pattern == "checks":
        return 0.5 * bars(below) + 0.5 * bars(np.arctan2(p[:, 0], p[:, 2] - AXIS_Z) * 75.0)
    if garment.pattern == "yoke":
        return fields.smoothstep(below, 30.0, 33.0)
    return np.zeros(len(p))


def _attach(
    p: Array, faces: NDArray[np.int64], colors: Array, skin: Array
) -> attachments.Attachment:
    idx, w = attachments.bind(1e-3 * p, skin)
    return attachments.Attachment(
        1e-3 * p, faces, colors, attachments.CLOTH, idx, w, False, np.zeros(len(p), bool)
    )


def shirt_collar(
    skin: Array, color: Array, neckline: float, rng: np.random.Generator
) -> attachments.Attachment:
    """A stand around the neck that folds over and ends in two points in front.

    Args:
        skin: (V,3) rest vertices in metres.
        color: (3,) linear albedo.
        neckline: as in `body`.
        rng: for the weave.
    """
    rows, cols = 12, 97
    edge = 0.10 + 0.004 * neckline  # half opening in front (radians)
    lon = np.linspace(edge, 2 * np.pi - edge, cols)
    front = 0.5 + 0.5 * np.cos(lon)
    base = -113.0 - (14.0 + neckline) * front
    away = np.minimum(lon, 2 * np.pi - lon)
    point = np.exp(-(((away - edge) / 0.34) ** 2))
    # Up inside, over the fold, down outside to the points.
    up = np.linspace(0, 1, 5)
    down = np.linspace(0, 1, rows - 5)
    rise = 15.0 - 3.0 * front
    fold = 19.0 + 15.0 * point + 0.5 * rise
    y = np.concatenate(
        [base + up[:, None] * rise, base + rise - 0.6 - down[:, None] * fold], axis=0
    )
    # Buttoned at the base; the stand opens upwards, the points downwards.
    gap = np.concatenate([0.05 + 0.15 * up, 0.20 + 0.24 * down])[:, None]
    tt = np.pi + (lon - np.pi)[None] * (np.pi - gap) / (np.pi - edge)
    direction = np.stack([np.sin(tt), np.zeros_like(tt), np.cos(tt)], -1).reshape(-1, 3)
    r = _radius(y.ravel(), direction, 3.2).reshape(rows, cols)
    spread = np.concatenate([np.zeros(5), 2.2 + 4.0 * down])[:, None]
    # It keeps its own width where the neck recedes, and lies on the shoulders.
    r = r + spread + np.maximum(0, (base[None] - y) / 18.0) * (6.0 + 16.0 * np.sin(lon) ** 2)
    p = np.stack([np.zeros(y.size), y.ravel(), np.full(y.size, AXIS_Z)], -1)
    p = p + r.reshape(-1, 1) * direction
    weave = 1.0 + 0.03 * rng.standard_normal((rows, cols, 1))
    shade = np.where(np.arange(rows) < 4, 0.72, 1.04)[:, None, None]
    col = np.clip(color * weave * shade, 0.004, 0.95).reshape(-1, 3)
    return _attach(p, attachments.grid_faces(rows, cols, False), col, skin)


def hood(
    skin: Array, color: Array, lining: Array, neckline: float, rng: np.random.Generator
) -> attachments.Attachment:
    """A hood lying on the shoulders: a thick roll, high behind and open in front.

    Args:
        skin: (V,3) rest vertices in metres.
        color: (3,) linear albedo outside.
        lining: (3,) linear albedo inside.
        neckline: as in `body`.
        rng: for creases.
    """
    rows, cols = 16, 80
    lon = 2 * np.pi * (np.arange(cols) + 0.5) / cols
    front = 0.5 + 0.5 * np.cos(lon)
    thick = 7.0 + 11.0 * (1 - front) ** 0.8
    centre_y = -121.0 - (19.0 + neckline) * front - 0.55 * thick
    flat = np.stack([np.sin(lon), np.zeros(cols), np.cos(lon)], -1)
    r = _radius(centre_y, flat, 2.0) + 0.85 * thick + 2.0
    turn = 2 * np.pi * np.arange(rows) / rows
    crease = 1 + 0.06 * np.sin(5 * lon + rng.uniform(0, 6.28))[None] * np.cos(turn)[:, None]
    rr = r[None] + thick * crease * np.cos(turn)[:, None]
    y = centre_y[None] + 1.1 * thick * crease * np.sin(turn)[:, None]
    p = flat[None] * rr[..., None]
    p = (p + np.array([0.0, 0.0, AXIS_Z])).reshape(-1, 3)
    p[:, 1] = y.ravel()
    inside = fields.smoothstep(-np.cos(turn), 0.1, 0.5)[:, None, None]
    weave = 1.0 + 0.04 * rng.standard_normal((rows, cols, 1))
    col = np.clip((color * (1 - inside) + lining * inside) * weave, 0.004, 0.95).reshape(-1, 3)
    faces = attachments.grid_faces(rows + 1, cols, True) % (rows * cols)
    return _attach(p, faces, col, skin)


def wear(
    garment: Garment, color: Array, neckline: float, skin: Array, rng: np.random.Generator
) -> list[attachments.Attachment]:
    """Everything a garment is made of.

    Args:
        garment: what.
        color: (3,) linear albedo.
        neckline: how far below the default the front of the collar sits, mm.
        skin: (V,3) rest vertices in metres.
        rng: for weave and creases.
    """
    parts = [body(skin, color, neckline, garment, rng)]
    if garment.kind == "shirt":
        parts.append(shirt_collar(skin, color, neckline, rng))
    elif garment.kind == "hoodie":
        parts.append(hood(skin, color, garment.second, neckline, rng))
    return parts
