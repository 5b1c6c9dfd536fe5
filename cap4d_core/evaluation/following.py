"""Does a driven avatar do what its driver does?

Pictures of the driven head are tracked again, by the landmarks and the fit of the built-in tracker
with the driver's camera, frame by frame without smoothing; then head pose, expression and gaze are
compared with those that drove it. Expressions are compared as places: the mean distance of the 468
landmarks on the head model, without pose (the coefficients themselves are not unique). Distances
like these between pose and expression coefficients are known as APD and AED.

The tracker errs, too. Where true pictures of the performance exist, its errors on them are the best
an avatar can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import Tracking
from cap4d_core.tracking.gaze import estimate_gaze
from cap4d_core.tracking.landmark_fit import Camera, LandmarkFitter, Observation
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.landmarks import FaceLandmarks

Array = NDArray[np.float64]

# A shape has to be told from expressions.
MIN_FRAMES = 3


@dataclass(frozen=True)
class FollowingError:
    """Errors (K,) of K tracked frames; frames: their positions in the sequence.

    pose_deg: angle between head rotations; expression_mm: mean distance of landmarks on the head,
    expression_percent of the size of its face; gaze_deg: angle between eye rotations.
    motion_mm (K,): distance of the driver's landmarks from their mean over the frames: the size of
    what is to be followed.
    """

    frames: list[int]
    pose_deg: Array
    expression_mm: Array
    expression_percent: Array
    gaze_deg: Array
    motion_mm: Array

    def of_frame(self, position: int) -> dict[str, float]:
        """Errors of one frame; empty if it was not tracked."""
        if position not in self.frames:
            return {}
        k = self.frames.index(position)
        names = ("pose_deg", "expression_mm", "expression_percent", "gaze_deg")
        return {f"{name}_error": float(getattr(self, name)[k]) for name in names}

    def summary(self) -> dict[str, Any]:
        """Means over the frames."""
        names = ("pose_deg", "expression_mm", "expression_percent", "gaze_deg")
        means = {f"{name}_error": float(getattr(self, name).mean()) for name in names}
        return {
            "num_frames": len(self.frames),
            **means,
            "driver_motion_mm": float(self.motion_mm.mean()),
        }


def following_error(
    model: LandmarkModel,
    driving: Tracking,
    views: Sequence[ViewParameters],
    found: Sequence[FaceLandmarks | None],
    size: int,
) -> FollowingError | None:
    """Tracks pictures of a driven head again and compares with the driver.

    Args:
        model: landmarks of the head model.
        driving: what drove it; frame `views[i].timestep_id` drove picture i, seen by camera 0.
        views: of the pictures, crops of that camera.
        found: landmarks in every picture, pixels of the crop; None where there are none.
        size: side of the crops.

    Returns:
        None with fewer than 3 frames with landmarks.
    """
    frames = [i for i, landmarks in enumerate(found) if landmarks is not None]
    if len(frames) < MIN_FRAMES:
        return None
    observations = []
    for k, i in enumerate(frames):
        landmarks = found[i]
        assert landmarks is not None  # by construction
        x0, y0, x1, _ = views[i].crop_box
        points = landmarks.points * ((x1 - x0) / size)
        points[:, :2] += [x0, y0]
        observations.append(Observation(k, 0, points))
    first = views[0]
    camera = Camera(
        first.resolution, (first.fx + first.fy) / 2, 0.0, np.asarray(first.extr, np.float64),
        (first.cx, first.cy),
    )  # fmt: skip
    fitter = LandmarkFitter(model, [camera], observations, len(frames))
    fit = fitter.fit()
    gaze = estimate_gaze(fitter, fit, smooth=False)

    rows = [int(views[i].timestep_id or 0) for i in frames]
    own = model.points(fit.shape, fit.expr)
    driver = model.points(fit.shape, np.asarray(driving.expr[rows], np.float64))
    distance = np.linalg.norm(own - driver, axis=-1).mean(1)
    return FollowingError(
        frames=frames,
        pose_deg=_angle(Rotation.from_matrix(fit.rotation), driving.rot[rows]),
        expression_mm=1e3 * distance,
        expression_percent=100 * distance / model.face_size,
        gaze_deg=_angle(Rotation.from_rotvec(gaze.eye_rot), driving.eye_rot[rows]),
        motion_mm=1e3 * np.linalg.norm(driver - driver.mean(0), axis=-1).mean(1),
    )


def _angle(found: Rotation, expected: NDArray[Any]) -> Array:
    """(K,) degrees between rotations and rotation vectors (K, 3)."""
    other = Rotation.from_rotvec(np.asarray(expected, np.float64))
    return np.degrees((found * other.inv()).magnitude())
