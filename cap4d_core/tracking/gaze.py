"""Eye rotation from the irises, and which eyes are open.

The centre of an iris lies on the eyeball of the fitted head where the line of sight through it
meets the sphere of the pupils. Eye corners tell how far the fitted eye is off in the picture; the
iris is corrected by that, because a millimetre beside the eye would count as five degrees of gaze.

Conventions: as in cap4d_core.tracking.landmark_fit. The head model turns both eyes alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.landmark_fit import LandmarkFit, LandmarkFitter
from cap4d_core.tracking.landmark_topology import contour_points

Array = NDArray[np.float64]

_FLIP = np.array([1.0, -1.0, -1.0])
_IRIS_CENTERS = (468, 473)
_LIDS = (contour_points("left_eye"), contour_points("right_eye"))
# Corners and middles of the lids: outer, inner, pairs of upper and lower lid.
_CORNERS = ((33, 133), (263, 362))
_LID_PAIRS = (((159, 145), (160, 144), (158, 153)), ((386, 374), (387, 373), (385, 380)))
# Below this height relative to its width an eye is closed and its iris a guess.
CLOSED_BELOW = 0.10
# Gaze further from straight ahead is played down, and impossible beyond the limit.
_PRIOR_RAD, _ERROR_RAD = np.deg2rad(20.0), np.deg2rad(4.0)
_LIMIT_RAD = np.deg2rad(35.0)
_SMOOTHING_S = 0.04


@dataclass(frozen=True)
class Gaze:
    """eye_rot (T, 3) rotation vectors; openness (T,): height by width of the more open eye."""

    eye_rot: Array
    openness: Array


def eye_openness(points: Array) -> Array:
    """(2,) height of each eye relative to its width, from landmarks (478, 2 or 3)."""
    result = []
    for corners, pairs in zip(_CORNERS, _LID_PAIRS, strict=True):
        width = np.linalg.norm(points[corners[0]] - points[corners[1]])
        height = np.mean([np.linalg.norm(points[a] - points[b]) for a, b in pairs])
        result.append(height / max(width, 1e-6))
    return np.array(result)


def estimate_gaze(
    fitter: LandmarkFitter, fit: LandmarkFit, smooth: bool, fps: float | None = None
) -> Gaze:
    """Estimates the eye rotation of every frame.

    Args:
        fitter: holds the landmarks.
        fit: fitted heads.
        smooth: consecutive frames: fill gaps and filter over time.
        fps: their rate.
    """
    model = fitter.model
    centers, pupils, _ = model.eyes(fit.shape)
    radii = np.linalg.norm(pupils - centers, axis=1)
    ahead = (pupils - centers) / radii[:, None]
    _, _, camera, pixels = fitter.camera_points(fit)
    visible = fitter.visibility(fit, camera)
    total, weight = np.zeros((fit.expr.shape[0], 2)), np.zeros(fit.expr.shape[0])
    openness = np.zeros(fit.expr.shape[0])
    for o, (t, c) in enumerate(zip(fitter.frame, fitter.camera, strict=True)):
        open_by = eye_openness(fitter.points[o])
        openness[t] = max(openness[t], float(open_by.max()))
        extr, center = fit.extr[c], fitter.center[c]
        for eye in range(2):
            lids = _LIDS[eye]
            seen = float(visible[o, lids].mean())
            if open_by[eye] < CLOSED_BELOW or seen < 0.2:
                continue
            beside = (fitter.pixels[o, lids] - pixels[o, lids]).mean(axis=0)
            iris = fitter.points[o, _IRIS_CENTERS[eye], :2] - beside
            ball = extr[:3, :3] @ ((fit.rotation[t] @ centers[eye] + fit.tra[t]) * _FLIP)
            ball = ball + extr[:3, 3]
            ray = np.array([*((iris - center) / fit.focal[c]), 1.0])
            ray /= np.linalg.norm(ray)
            along = ray @ ball
            inside = radii[eye] ** 2 - (ball @ ball - along**2)
            # A ray that misses the sphere touches its rim.
            point = ray * (along - np.sqrt(max(inside, 0.0)))
            direction = (extr[:3, :3].T @ (point - ball)) * _FLIP
            direction = fit.rotation[t].T @ direction
            direction /= np.linalg.norm(direction)
            total[t] += seen * (_angles(direction) - _angles(ahead[eye]))
            weight[t] += seen
    known = weight > 0
    angles = np.zeros_like(total)
    share = _PRIOR_RAD**2 / (_PRIOR_RAD**2 + _ERROR_RAD**2)
    angles[known] = share * total[known] / weight[known, None]
    if smooth and known.any():
        frames = np.arange(len(angles))
        for axis in range(2):
            # Closed eyes keep the gaze of the neighbouring frames.
            angles[:, axis] = np.interp(frames, frames[known], angles[known, axis])
        sigma = _SMOOTHING_S * (fps or 30.0)
        angles = gaussian_filter1d(angles, sigma, axis=0, mode="nearest")
    size = np.linalg.norm(angles, axis=1, keepdims=True)
    angles = angles * np.minimum(1.0, _LIMIT_RAD / np.maximum(size, 1e-9))
    # Yaw about +y first, then pitch: Ry(yaw) Rx(-pitch) applied to the direction straight ahead.
    eye_rot = Rotation.from_euler("YX", np.stack([angles[:, 0], -angles[:, 1]], axis=1))
    return Gaze(eye_rot.as_rotvec(), openness)


def _angles(direction: Array) -> Array:
    """Yaw (to +x) and pitch (to +y) of a direction in the head's frame, radians."""
    x, y, z = direction
    return np.array([np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))])
