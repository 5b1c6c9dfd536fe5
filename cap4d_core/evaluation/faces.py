"""Face landmarks of pictures under comparison, and distances between them.

Landmarks come from the tracker's own network (`cap4d_core.tracking.landmarks`): the same 468 mesh
points and 10 iris points in true and rendered pictures. Their mean distance is the average keypoint
distance (AKD) of the literature on reenactment (Siarohin et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.tracking.detector import FaceDetector
from cap4d_core.tracking.landmarks import FaceLandmarks, LandmarkNetwork, region_of_detection

Array = NDArray[np.float64]

# As in the tracker: below this the network doubts that there is a face; above this much
# disagreement with the mirror image the landmarks are a guess.
MIN_SCORE = 0.5
MAX_ASYMMETRY = 0.03


@dataclass(frozen=True)
class FaceReading:
    """landmarks (478, 2) in pixels, None where there are none; absent: why then."""

    landmarks: Array | None
    absent: str = ""


@dataclass(frozen=True)
class KeypointDistance:
    """Mean distance of landmarks: pixels, and percent of the size of the face.

    The size is the geometric mean of the sides of the box around the true landmarks (Bulat and
    Tzimiropoulos 2017), which a turned head changes less than the distance of the eyes.
    """

    pixels: float
    percent: float


class FaceReader:
    """Finds the largest face of a picture and its landmarks."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._detector = FaceDetector(device)
        self._network = LandmarkNetwork(device)

    def find(self, image: NDArray[np.uint8]) -> tuple[FaceLandmarks | None, str]:
        """Landmarks of a picture (H, W, 3) uint8, or None and the reason."""
        faces = self._detector.detect(image)
        if not faces:
            return None, "no face found"
        found = self._network.predict(
            image, region_of_detection(max(faces, key=lambda face: face.side))
        )
        if found.score < MIN_SCORE:
            return None, f"no clear face (confidence {found.score:.2f})"
        if found.asymmetry > MAX_ASYMMETRY:
            return None, f"landmarks uncertain (disagreement {found.asymmetry:.3f})"
        return found, ""

    def read(self, image: NDArray[np.uint8]) -> FaceReading:
        """As `find`, in the plane of the picture."""
        found, absent = self.find(image)
        return FaceReading(None if found is None else found.points[:, :2], absent)


def keypoint_distance(found: Array, truth: Array) -> KeypointDistance:
    """Average keypoint distance of landmarks (N, 2) to true ones."""
    if found.shape != truth.shape:
        raise ValueError(f"{found.shape} landmarks against {truth.shape}")
    pixels = float(np.linalg.norm(found - truth, axis=1).mean())
    width, height = truth.max(axis=0) - truth.min(axis=0)
    return KeypointDistance(pixels, 100 * pixels / float(np.sqrt(width * height)))
