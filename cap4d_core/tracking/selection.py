"""Which frames become reference images.

Rule: the first reference is the most frontal of the sharp frames with open eyes. Then, again and
again, the frame that differs most from all chosen ones, in head pose (relative to the camera) and
expression; blurred frames and closed eyes count as less different. It stops at the limit, and in
videos when everything left repeats something chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# One unit of difference: 20 degrees of head turn, or an expression of this length.
_ANGLE_DEG, _EXPRESSION = 20.0, 4.0
# Videos: frames closer than this to a chosen one repeat it. From every other one an avatar that is
# fitted on a video alone learns something.
MIN_DIFFERENCE = 0.02
# Sharp enough to be first: this share of the median sharpness.
_SHARP_SHARE = 0.7


@dataclass(frozen=True)
class Candidate:
    """A usable frame: camera index, timestep, yaw and pitch in degrees, expression, sharpness."""

    camera: int
    timestep: int
    yaw_deg: float
    pitch_deg: float
    expr: Array
    sharpness: float
    eyes_closed: bool = False


def select_references(
    candidates: list[Candidate], limit: int, min_difference: float = 0.0
) -> list[int]:
    """Indices into `candidates`, in the order of the rule above.

    Args:
        candidates: usable frames.
        limit: how many at most.
        min_difference: stop when no frame differs by more than this from all chosen ones.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("no frames to select references from")
    features = np.stack(
        [
            np.array([c.yaw_deg / _ANGLE_DEG, c.pitch_deg / _ANGLE_DEG, *(c.expr / _EXPRESSION)])
            for c in candidates
        ]
    )
    sharpness = np.array([c.sharpness for c in candidates])
    typical = max(float(np.median(sharpness)), 1e-9)
    quality = np.clip(sharpness / typical, 0.3, 1.0)
    closed = np.array([c.eyes_closed for c in candidates])
    quality = np.where(closed, 0.3 * quality, quality)
    turned = np.hypot([c.yaw_deg for c in candidates], [c.pitch_deg for c in candidates])
    unfit = (sharpness < _SHARP_SHARE * typical) | closed
    chosen = [int(np.lexsort((turned, unfit))[0])]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(limit, len(candidates)):
        last = features[chosen[-1]]
        distance = np.minimum(distance, np.linalg.norm(features - last, axis=1))
        distance[chosen] = -1.0
        gain = np.where(distance >= 0, distance * quality, -1.0)
        best = int(gain.argmax())
        if gain[best] < min_difference:
            break
        chosen.append(best)
    return chosen
