"""Looks at every frame of a recording: face, landmarks, sharpness, and what is wrong with it.

A frame that cannot be used is not an error; it carries the reason. Thresholds are on measures of
the networks (docs/tracking.md says how they were found).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.detector import Detection, FaceDetector
from cap4d_core.tracking.eyeball import CLOSED_BELOW, eye_openness
from cap4d_core.tracking.landmarks import (
    FaceLandmarks,
    LandmarkNetwork,
    Region,
    cut_region,
    region_of_detection,
)
from cap4d_core.tracking.silhouette import DistanceField
from cap4d_core.tracking.video_input import RecordedCamera

MIN_SCORE = 0.5
# Disagreement between a crop and its mirror image: nothing to rely on.
MAX_ASYMMETRY = 0.03
# Face crops below the first are unusable, below the second they are flagged (pixels).
MIN_FACE_PX, SMALL_FACE_PX = 48.0, 110.0
# Variance of the Laplacian relative to that of the picture, at the network's resolution.
BLURRED, SOFT = 0.003, 0.006
MAX_ROLL_DEG = 60.0
_CROP_PX = 192
# Videos: look for faces anew every so many frames, to notice others.
_DETECT_EVERY = 15
# An upright face is found with a higher score than this; others are tried upside down.
_SURE_DETECTION = 0.8


@dataclass
class Observed:
    """One frame of one camera.

    landmarks is None without a face. flags are remarks; problem is the reason why the frame is left
    out, None for usable frames. outline: edge of the person, where a matte was made.
    """

    camera: int
    timestep: int
    name: str
    landmarks: FaceLandmarks | None = None
    num_faces: int = 0
    sharpness: float = 0.0
    openness: float = 0.0
    flags: list[str] = field(default_factory=list)
    problem: str | None = None
    outline: DistanceField | None = None

    @property
    def face_box(self) -> tuple[float, float, float, float] | None:
        """(x0, y0, x1, y1) around the landmarks."""
        if self.landmarks is None:
            return None
        low = self.landmarks.points[:468, :2].min(axis=0)
        high = self.landmarks.points[:468, :2].max(axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @property
    def eyes_closed(self) -> bool:
        """Whether both eyes are closed."""
        return self.landmarks is not None and self.openness < CLOSED_BELOW


class FaceObserver:
    """Finds the face of the subject in photos, and follows it through videos."""

    def __init__(self, settings: TrackingSettings, device: str | torch.device = "cpu") -> None:
        self.settings = settings
        self._detector = FaceDetector(device, settings.networks)
        self._network = LandmarkNetwork(device, settings.networks)

    def observe(
        self, camera: RecordedCamera, index: int, continuous: bool
    ) -> Iterator[tuple[Observed, NDArray[np.uint8]]]:
        """Observations of all frames of a camera, with their pictures.

        Args:
            camera: the frames.
            index: its number.
            continuous: frames follow each other, so a face is near where it was.
        """
        previous: FaceLandmarks | None = None
        since_detection = 0
        count = 0
        for timestep, name, image in camera.frames():
            seen = Observed(index, timestep, name)
            follow = continuous and previous is not None and since_detection < _DETECT_EVERY
            detections: list[Detection] = []
            if not follow:
                detections = self._detector.detect(image)
                count = len(detections)
                since_detection = 0
            since_detection += 1
            seen.num_faces = max(count, 1 if follow else 0)
            found = self._find(image, detections, previous if continuous else None)
            if found is None and follow:
                detections = self._detector.detect(image)
                seen.num_faces = count = len(detections)
                found = self._find(image, detections, None)
            self._judge(seen, found, image, detections)
            previous = found if seen.problem is None else None
            yield seen, image

    def _find(
        self,
        image: NDArray[np.uint8],
        detections: list[Detection],
        previous: FaceLandmarks | None,
    ) -> FaceLandmarks | None:
        if previous is not None:
            # One look suffices when the place is known from the frame before.
            result = self._network.predict(image, previous.next_region(), passes=1)
            jump = abs(np.log(result.next_region().side / previous.next_region().side))
            if result.score >= MIN_SCORE and result.asymmetry <= MAX_ASYMMETRY and jump < 0.3:
                return result
        if not detections:
            return None
        face = self._choose(detections, (image.shape[0], image.shape[1]), previous)
        return self._network.predict(image, region_of_detection(face))

    def _choose(
        self,
        detections: list[Detection],
        image_size: tuple[int, int],
        previous: FaceLandmarks | None,
    ) -> Detection:
        """The subject's face: where it was before, else by the rule of the settings."""
        centers = np.array([np.mean([d.box[:2], d.box[2:]], axis=0) for d in detections])
        if previous is not None:
            gap = np.linalg.norm(centers - previous.region.center, axis=1)
            nearest = int(gap.argmin())
            if gap[nearest] < 0.5 * previous.region.side:
                return detections[nearest]
        rule = self.settings.face
        if rule == "left":
            return detections[int(centers[:, 0].argmin())]
        if rule == "right":
            return detections[int(centers[:, 0].argmax())]
        height, width = image_size
        off_center = np.linalg.norm(centers - [width / 2, height / 2], axis=1) / max(image_size)
        if rule == "central":
            return detections[int(off_center.argmin())]
        size = np.array([d.side for d in detections])
        return detections[int((size * (1.0 - 0.5 * off_center)).argmax())]

    def _judge(
        self,
        seen: Observed,
        found: FaceLandmarks | None,
        image: NDArray[np.uint8],
        detections: list[Detection],
    ) -> None:
        """Fills in measures, flags and the problem."""
        if found is None:
            seen.problem = "no face found"
            return
        seen.landmarks = found
        seen.sharpness = sharpness(image, found.region)
        seen.openness = float(eye_openness(found.points).max())
        roll = np.degrees(found.next_region().angle)
        side = found.region.side / 1.5
        if seen.num_faces > 1:
            seen.flags.append(f"{seen.num_faces} faces; the {self.settings.face} one is tracked")
        if seen.eyes_closed:
            seen.flags.append("eyes closed")
        if seen.sharpness < SOFT:
            seen.flags.append("not sharp")
        if side < SMALL_FACE_PX:
            seen.flags.append(f"small face ({side:.0f} px)")
        if side < MIN_FACE_PX:
            seen.problem = f"face too small ({side:.0f} px; at least {MIN_FACE_PX:.0f} are needed)"
        elif self._is_upside_down(image, found, detections):
            seen.problem = "face upside down; turn the picture"
        elif found.score < MIN_SCORE:
            seen.problem = f"no clear face (confidence {found.score:.2f}): hidden or turned away"
        elif abs(roll) > MAX_ROLL_DEG:
            seen.problem = f"face lies on its side ({roll:.0f} degrees); turn the picture"
        elif found.asymmetry > MAX_ASYMMETRY:
            seen.problem = "landmarks uncertain: face hidden, blurred or turned away"
        elif seen.sharpness < BLURRED:
            seen.problem = f"blurred (sharpness {seen.sharpness:.4f}, at least {BLURRED})"

    def _is_upside_down(
        self, image: NDArray[np.uint8], found: FaceLandmarks, detections: list[Detection]
    ) -> bool:
        """Whether an unsure face is a sure one after half a turn."""
        doubtful = found.score < 0.99 or found.asymmetry > 0.018
        sure = any(d.score > _SURE_DETECTION for d in detections)
        if not doubtful or (sure and found.score > MIN_SCORE):
            return False
        region = found.region
        turned = Region(region.center, region.side, region.angle + np.pi)
        other = self._network.predict(image, turned)
        return other.score > 0.9 and other.asymmetry < 0.6 * found.asymmetry


def sharpness(image: NDArray[np.uint8], region: Region) -> float:
    """Variance of the Laplacian of a face relative to the variance of its brightness."""
    crop = cut_region(image, region, _CROP_PX)[32:-32, 32:-32]
    grey = cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = float(cv2.Laplacian(grey, cv2.CV_32F).var())
    return detail / max(float(grey.var()), 1.0)
