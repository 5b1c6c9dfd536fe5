"""Temporal stability: trembling of the shape and flicker of the colours.

Measures of consecutive frames, each with its source:

    landmark_jitter         median size of the second difference of landmarks: what trembles changes
                            direction at every frame, what moves does not
    acceleration_error      mean size of the difference to the true second differences (Kanazawa et
                            al. 2019)
    color_flicker           median second difference of the colours of places on the head
    warping_error           mean squared change of those colours from frame to frame (Lai et al.
                            2018; the head model takes the place of optical flow)

JOD, which CAP4D reports, is not among them: FovVideoVDP, which defined it, may not be used
commercially, and its successor ColorVideoVDP needs torchvision.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.evaluation.surface import SurfaceColors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stability:
    """Figures of a sequence; None where nothing could be measured, with the reason in `absent`.

    Pixels per frame squared; colours in levels of 255 (flicker) and squared in 0..1 (warping).
    """

    landmark_jitter: float | None = None
    acceleration_error: float | None = None
    color_flicker: float | None = None
    warping_error: float | None = None

    def to_dict(self) -> dict[str, float]:
        """The figures there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def landmark_jitter(landmarks: list[Array | None]) -> float | None:
    """Median second difference of landmarks (N, 2) of consecutive frames, pixels.

    Frames without landmarks leave out the three places in time that they take part in.
    """
    sizes = _second_difference_sizes(landmarks)
    return None if sizes is None else float(np.median(sizes))


def acceleration_error(landmarks: list[Array | None], truth: list[Array | None]) -> float | None:
    """Mean difference of the second differences of landmarks to the true ones, pixels."""
    apart = [
        None if found is None or true is None else found - true
        for found, true in zip(landmarks, truth, strict=True)
    ]
    sizes = _second_difference_sizes(apart)
    return None if sizes is None else float(np.mean(sizes))


def _second_difference_sizes(values: list[Array | None]) -> Array | None:
    """(K, N) lengths of the second differences where three frames in a row have values."""
    found = []
    for before, this, after in zip(values, values[1:], values[2:], strict=False):
        if before is not None and this is not None and after is not None:
            found.append(np.linalg.norm(after - 2 * this + before, axis=-1))
    return np.stack(found) if found else None


def color_flicker(surface: SurfaceColors) -> float | None:
    """Median absolute second difference of surface colours over consecutive frames, levels of 255.

    Args:
        surface: (T, P) places in consecutive frames.
    """
    colors, seen = surface.colors, surface.visible
    change = (colors[2:] - 2 * colors[1:-1] + colors[:-2]).abs()
    valid = seen[2:] & seen[1:-1] & seen[:-2]
    if not bool(valid.any()):
        return None
    return 255 * float(torch.median(change[valid]))


def warping_error(surface: SurfaceColors) -> float | None:
    """Mean squared change of surface colours between consecutive frames, colours in 0..1."""
    change = (surface.colors[1:] - surface.colors[:-1]).square()
    valid = surface.visible[1:] & surface.visible[:-1]
    return float(change[valid].mean()) if bool(valid.any()) else None


def measure_stability(
    landmarks: list[Array | None],
    surface: SurfaceColors | None,
    true_landmarks: list[Array | None] | None = None,
) -> Stability:
    """All measures of consecutive frames.

    Args:
        landmarks: per frame, None where none were found.
        surface: colours of places on the head in all frames; None = leave the colours out.
        true_landmarks: of true pictures of the same frames.
    """
    return Stability(
        landmark_jitter=landmark_jitter(landmarks),
        acceleration_error=(
            None if true_landmarks is None else acceleration_error(landmarks, true_landmarks)
        ),
        color_flicker=None if surface is None else color_flicker(surface),
        warping_error=None if surface is None else warping_error(surface),
    )
