"""Smooth noise of points: waves are drawn first and evaluated anywhere.

Conventions: points in mm; values have about unit variance. float32, since it colours textures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class Noise:
    """Sums of five plane waves per octave.

    Args:
        wavelength: of the first octave, mm.
        rng: draws directions and phases.
        octaves: each 0.47 times as long and 0.6 times as strong as the one before.
    """

    def __init__(self, wavelength: float, rng: np.random.Generator, octaves: int = 1) -> None:
        waves, phases, gains = [], [], []
        gain = 1.0
        for _ in range(octaves):
            k = rng.standard_normal((5, 3))
            k *= (2 * np.pi / wavelength) / np.linalg.norm(k, axis=1, keepdims=True)
            waves.append(k)
            phases.append(rng.uniform(0, 2 * np.pi, 5))
            gains.append(np.full(5, gain))
            gain *= 0.6
            wavelength *= 0.47
        strength = np.concatenate(gains)
        norm = np.sqrt((strength**2).sum() / 5)
        self.waves = np.concatenate(waves).astype(np.float32)
        self.phases = np.concatenate(phases).astype(np.float32)
        self.gains = (0.63 * strength / norm).astype(np.float32)

    def at(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Values (N,) at points."""
        out = np.zeros(len(x), np.float32)
        x, y, z = (np.asarray(v, np.float32) for v in (x, y, z))
        for (kx, ky, kz), phase, gain in zip(self.waves, self.phases, self.gains, strict=True):
            wave = x * kx
            wave += y * ky
            wave += z * kz
            wave += phase
            np.sin(wave, out=wave)
            wave *= gain
            out += wave
        return out
