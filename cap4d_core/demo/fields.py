"""Building blocks of the deformation bases: tagged vertices, bumps, ramps, smooth noise.

Conventions: millimetres and the frame of `anatomy`; functions take points of the undeformed head
(N,3) and return displacements (N,3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy, topology

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Points:
    """All head vertices with what the fields need to know about them."""

    p: Array  # (V,3)
    skin: NDArray[np.bool_]
    lip_side: Array  # +1 upper, -1 lower
    lip_ring: NDArray[np.int64]
    lid_ring: NDArray[np.int64]
    lid_side: Array  # +1 upper, -1 lower, 0 corners

    @property
    def x(self) -> Array:
        """(V,) mm."""
        return self.p[:, 0]

    @property
    def y(self) -> Array:
        """(V,) mm."""
        return self.p[:, 1]

    @property
    def z(self) -> Array:
        """(V,) mm."""
        return self.p[:, 2]


def gather(skin: topology.Skin, eyes: Array) -> Points:
    """Points for a skin mesh followed by the eyeball vertices (2*546,3)."""
    e = len(eyes)
    return Points(
        np.concatenate([skin.vertices, eyes]),
        np.arange(len(skin.vertices) + e) < len(skin.vertices),
        np.concatenate([skin.lip_side, np.ones(e)]),
        np.concatenate([skin.lip_ring, np.full(e, 99)]),
        np.concatenate([skin.lid_ring, np.full(e, 99)]),
        np.concatenate([skin.lid_side, np.zeros(e)]),
    )


def smoothstep(x: Array, lo: float | Array, hi: float | Array) -> Array:
    """Cubic ramp from 0 at lo to 1 at hi."""
    t = np.clip((x - lo) / (np.asarray(hi) - np.asarray(lo)), 0.0, 1.0)
    out: Array = t * t * (3 - 2 * t)
    return out


def bump(p: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    """Gaussian bump (N,)."""
    square = sum(((p[..., k] - centre[k]) / radii[k]) ** 2 for k in range(3))
    out: Array = np.exp(-square)
    return out


def both(
    p: Array, centre: tuple[float, ...], radii: tuple[float, ...], move: tuple[float, ...]
) -> Array:
    """A bump at centre and its mirror image, moving by `move` and its mirror image."""
    return one(p, centre, radii, move, 1.0) + one(p, centre, radii, move, -1.0)


def one(
    p: Array,
    centre: tuple[float, ...],
    radii: tuple[float, ...],
    move: tuple[float, ...],
    side: float,
) -> Array:
    """The same on one side only (+1: the subject's left)."""
    s = np.array([side, 1.0, 1.0])
    return bump(p, tuple(np.asarray(centre) * s), radii)[:, None] * (np.asarray(move) * s)


def mid(
    p: Array, centre: tuple[float, ...], radii: tuple[float, ...], move: tuple[float, ...]
) -> Array:
    """A bump on the midline."""
    return bump(p, centre, radii)[:, None] * np.asarray(move)


def random_fields(
    p: Array, num: int, rng: np.random.RandomState, amplitude: float, wavelength: float
) -> Array:
    """Smooth seeded vector fields (num,N,3) of the given RMS (mm) and wavelength (mm)."""
    out = np.empty((num, len(p), 3))
    for k in range(num):
        waves = rng.randn(4, 3) * 2 * np.pi / wavelength
        phase, a = rng.uniform(0, 2 * np.pi, 4), rng.randn(4, 3)
        # Sums written out: threads of BLAS cost more than they bring at these sizes.
        f = np.zeros((3, len(p)))
        for w, shift, direction in zip(waves, phase, a, strict=True):
            wave = np.cos(p[:, 0] * w[0] + p[:, 1] * w[1] + p[:, 2] * w[2] + shift)
            f += direction[:, None] * wave
        out[k] = f.T * (amplitude / np.sqrt((f * f).sum(0).mean()))
    return out


def eye_local(p: Array, side: float) -> Array:
    """Eye-centred coordinates with +a outwards."""
    return (p - anatomy.EYE_CENTRE * np.array([side, 1, 1])) * np.array([side, 1, 1])


def lid_free(pts: Points) -> Array:
    """0 on and around the lids, 1 elsewhere."""
    out = np.ones(len(pts.p))
    for side in (1.0, -1.0):
        q = eye_local(pts.p, side)
        out *= smoothstep(np.hypot(q[:, 0] / 19.0, q[:, 1] / 14.0), 0.9, 1.5)
    return out
