"""Eye rotation from the irises.

The centre of an iris lies on the eyeball of the fitted head where the line of sight through it
meets the sphere of the pupils. The lids tell how far the fitted eye is off in the picture; the iris
is corrected by that, because a millimetre beside the eye would count as five degrees of gaze.

The network draws irises towards the camera when the head is turned away, on photos as on
renderings, and plays movements down, vertical ones most. That is taken back as far as the noise
allows: vertical gaze stays too small.

Conventions: as in cap4d_core.tracking.landmark_fit. The head model turns both eyes alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from cap4d_core.tracking.eyeball import (
    CLOSED_BELOW,
    EYELIDS,
    IRIS_CENTERS,
    direction_angles,
    direction_on_eyeball,
    eye_openness,
    eye_rotation,
)
from cap4d_core.tracking.landmark_fit import LandmarkFit, LandmarkFitter

Array = NDArray[np.float64]

_FLIP = np.array([1.0, -1.0, -1.0])
# Share of the head's turn and tilt (yaw, pitch) that is missing in the gaze; share of a movement
# that is found.
TOWARDS_CAMERA, RESPONSE = np.array([0.2, 0.35]), np.array([0.75, 0.5])
# What is found is uncertain, more so on turned heads (error doubled at the given angle), and gaze
# far from straight ahead is rare.
_PRIOR_RAD, _ERROR_RAD = np.deg2rad([20.0, 10.0]), np.deg2rad([4.0, 7.0])
_DOUBLE_ERROR_RAD = np.deg2rad(30.0)
_LIMIT_RAD = np.deg2rad(35.0)
_SMOOTHING_S = 0.04
# Eyes whose lids are seen less than this say nothing.
_MIN_SEEN = 0.2


@dataclass(frozen=True)
class Gaze:
    """eye_rot (T, 3) rotation vectors; openness (T,): height by width of the more open eye."""

    eye_rot: Array
    openness: Array


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
    _, _, camera, pixels = fitter.camera_points(fit)
    visible = fitter.visibility(fit, camera)
    turned = fitter.sight_angles(fit)
    frames = len(fit.expr)
    openness = np.zeros(frames)
    total, weight = np.zeros((frames, 2)), np.zeros((frames, 2))
    for o, (t, c) in enumerate(zip(fitter.frame, fitter.camera, strict=True)):
        open_by = eye_openness(fitter.points[o])
        openness[t] = max(openness[t], float(open_by.max()))
        for eye, lids in enumerate(EYELIDS):
            seen = float(visible[o, lids].mean())
            if open_by[eye] < CLOSED_BELOW or seen < _MIN_SEEN:
                continue
            beside = (fitter.pixels[o, lids] - pixels[o, lids]).mean(axis=0)
            iris = fitter.points[o, IRIS_CENTERS[eye], :2] - beside
            origin, ray = _sight(fitter, fit, t, c, iris)
            found = direction_angles(direction_on_eyeball(origin, ray, centers[eye], radii[eye]))
            found = found - direction_angles(pupils[eye] - centers[eye])
            found = (found + TOWARDS_CAMERA * turned[o]) / RESPONSE
            error = _ERROR_RAD * (1.0 + (turned[o, 0] / _DOUBLE_ERROR_RAD) ** 2)
            total[t] += seen * found / error**2
            weight[t] += seen / error**2
    known = weight[:, 0] > 0
    angles = total / (weight + 1.0 / _PRIOR_RAD**2)
    if smooth and known.any():
        times = np.arange(frames)
        for axis in range(2):
            # Closed eyes keep the gaze of the neighbouring frames.
            angles[:, axis] = np.interp(times, times[known], angles[known, axis])
        sigma = _SMOOTHING_S * (fps or 30.0)
        angles = gaussian_filter1d(angles, sigma, axis=0, mode="nearest")
    size = np.linalg.norm(angles, axis=1, keepdims=True)
    angles = angles * np.minimum(1.0, _LIMIT_RAD / np.maximum(size, 1e-9))
    return Gaze(eye_rotation(angles), openness)


def _sight(
    fitter: LandmarkFitter, fit: LandmarkFit, t: int, c: int, pixel: Array
) -> tuple[Array, Array]:
    """Camera position and unit direction of sight through a pixel, in the head's own frame."""
    rotation = fit.extr[c, :3, :3]
    ray = np.array([*((pixel - fitter.center[c]) / fit.focal[c]), 1.0])
    direction = fit.rotation[t].T @ ((rotation.T @ ray) * _FLIP)
    position = (-rotation.T @ fit.extr[c, :3, 3]) * _FLIP
    origin = fit.rotation[t].T @ (position - fit.tra[t])
    return origin, direction / np.linalg.norm(direction)
