"""478 face landmarks: dense mesh points, refined lips and eye lids, and both irises.

The network (attention mesh, Grishchenko et al. 2020) looks at an upright square crop of one face.
It is run twice per picture, the second time on a crop placed by the first result, and on the
mirrored crop too: the mean of both is steadier than either.

Conventions: pictures are (H, W, 3) uint8 RGB. Points are (478, 3): x, y in pixels with (0, 0) at
the outer corner of the first pixel; z in pixels too, smaller is nearer, about zero at the middle of
the head. Point numbers are those of the MediaPipe face mesh; 468-472 are the iris at the left of an
upright picture (centre first), 473-477 the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.tracking.detector import Detection
from cap4d_core.tracking.face_models import load_face_model
from cap4d_core.tracking.landmark_topology import MIRRORED

NUM_LANDMARKS = 478
LEFT_EYE_OUTER, RIGHT_EYE_OUTER = 33, 263
# Crop side relative to the longer side of the face box.
_CROP_SCALE = 1.5
# The detectors' key points: both eyes.
_DETECTED_EYES = (0, 1)


@dataclass(frozen=True)
class Region:
    """Square crop, turned by `angle` (radians, clockwise in the picture)."""

    center: tuple[float, float]
    side: float
    angle: float

    def to_picture(self, size: int) -> NDArray[np.float64]:
        """(2, 3) affine map from pixels of a crop of `size` pixels to the picture."""
        scale = self.side / size
        cosine, sine = np.cos(self.angle) * scale, np.sin(self.angle) * scale
        linear = np.array([[cosine, -sine], [sine, cosine]])
        offset = np.array(self.center) - linear @ [size / 2, size / 2]
        return np.concatenate([linear, offset[:, None]], axis=1)


@dataclass(frozen=True)
class FaceLandmarks:
    """Landmarks of one face.

    points (478, 3); score in 0..1: how sure the network is that this is a face; asymmetry: mean
    distance between the results for the crop and its mirror image, relative to the crop - large for
    blurred or hidden faces; region: where the network looked.
    """

    points: NDArray[np.float64]
    score: float
    asymmetry: float
    region: Region

    def next_region(self) -> Region:
        """Where to look for this face in the next frame."""
        return region_of_landmarks(self.points)


def region_of_detection(face: Detection) -> Region:
    """Crop of a detected face, upright by its eyes."""
    eye_line = face.points[_DETECTED_EYES[1]] - face.points[_DETECTED_EYES[0]]
    x0, y0, x1, y1 = face.box
    return Region(
        ((x0 + x1) / 2, (y0 + y1) / 2),
        face.side * _CROP_SCALE,
        float(np.arctan2(eye_line[1], eye_line[0])),
    )


def region_of_landmarks(points: NDArray[np.float64]) -> Region:
    """Crop around known landmarks, upright by the outer eye corners."""
    eye_line = points[RIGHT_EYE_OUTER, :2] - points[LEFT_EYE_OUTER, :2]
    angle = float(np.arctan2(eye_line[1], eye_line[0]))
    cosine, sine = np.cos(angle), np.sin(angle)
    axes = np.array([[cosine, -sine], [sine, cosine]])
    upright = points[:468, :2] @ axes
    low, high = upright.min(axis=0), upright.max(axis=0)
    center = axes @ ((low + high) / 2)
    side = float((high - low).max()) * _CROP_SCALE
    return Region((float(center[0]), float(center[1])), side, angle)


def cut_region(image: NDArray[np.uint8], region: Region, size: int) -> NDArray[np.uint8]:
    """Resamples a region to (size, size, 3); black outside the picture."""
    to_picture = region.to_picture(size)
    factor = region.side / size
    if factor > 2.0:
        # Average first: sampling a large face sparsely would alias.
        scale = 2.0 / factor
        height, width = image.shape[:2]
        reduced = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(cv2.resize(image, reduced, interpolation=cv2.INTER_AREA), np.uint8)
        to_picture *= np.array([[reduced[0] / width], [reduced[1] / height]])
    # OpenCV counts from pixel centres, this module from pixel corners.
    shift = to_picture[:, :2] @ [0.5, 0.5] - 0.5
    to_picture = to_picture + np.stack([np.zeros(2), np.zeros(2), shift], axis=1)
    return np.asarray(
        cv2.warpAffine(
            image,
            to_picture,
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        ),
        np.uint8,
    )


class LandmarkNetwork:
    """Predicts the landmarks of faces whose region is roughly known."""

    def __init__(
        self, device: str | torch.device = "cpu", networks: str | Path | None = None
    ) -> None:
        self.device = torch.device(device)
        self._network = load_face_model("face_landmarks", device, networks)
        refined = [
            operation["subset_idxs"]
            for operation in self._network.operations
            if operation["op"] == "Landmarks2TransformMatrix"
        ]
        # Refined parts and the mesh points they replace.
        self._parts: dict[str, list[int]] = {
            "output_lips": refined[0],
            "output_left_eye": refined[1],
            "output_right_eye": refined[2],
        }

    @property
    def lips(self) -> list[int]:
        """Numbers of the landmarks on the lips."""
        return self._parts["output_lips"]

    def predict(
        self, image: NDArray[np.uint8], region: Region, passes: int = 2, mirrored: bool = True
    ) -> FaceLandmarks:
        """Landmarks of the face in a region.

        Args:
            image: the picture.
            region: rough place of the face.
            passes: how often to look; every further pass crops by the last result.
            mirrored: average with the result for the mirrored crop in the last pass.
        """
        for number in range(passes):
            last = number == passes - 1
            result = self._predict_once(image, region, mirrored and last)
            if not last:
                region = result.next_region()
        return result

    def _predict_once(
        self, image: NDArray[np.uint8], region: Region, mirrored: bool
    ) -> FaceLandmarks:
        size = self._network.input_size[0]
        crop = cut_region(image, region, size)
        crops = [crop, crop[:, ::-1]] if mirrored else [crop]
        batch = torch.from_numpy(np.ascontiguousarray(np.stack(crops))).to(self.device)
        outputs = self._network(batch.float() / 255.0)
        found = self._assemble({name: value.cpu().numpy() for name, value in outputs.items()})
        score = float(outputs["conv_faceflag"].flatten().sigmoid().mean())
        points, asymmetry = found[0], 0.0
        if mirrored:
            other = found[1][MIRRORED]
            other[:, 0] = size - other[:, 0]
            distance = np.linalg.norm(points[:468, :2] - other[:468, :2], axis=1)
            asymmetry = float(distance.mean()) / size
            points = (points + other) / 2
        to_picture = region.to_picture(size)
        placed = np.empty_like(points)
        placed[:, :2] = points[:, :2] @ to_picture[:, :2].T + to_picture[:, 2]
        placed[:, 2] = points[:, 2] * (region.side / size)
        return FaceLandmarks(placed, score, asymmetry, region)

    def _assemble(self, outputs: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
        """(B, 478, 3) from the mesh and its refined parts, in pixels of the crop."""
        mesh = outputs["output_mesh_identity"].reshape(-1, 468, 3).astype(np.float64)
        points = np.zeros((len(mesh), NUM_LANDMARKS, 3))
        points[:, :468] = mesh
        for name, indices in self._parts.items():
            points[:, indices, :2] = outputs[name].reshape(len(mesh), -1, 2)
        for name, first, part in (
            ("output_left_iris", 468, "output_left_eye"),
            ("output_right_iris", 473, "output_right_eye"),
        ):
            points[:, first : first + 5, :2] = outputs[name].reshape(len(mesh), -1, 2)
            # The network gives no depth for the iris: that of the lids' rim (first 16 points).
            depth = mesh[:, self._parts[part][:16], 2].mean(axis=1, keepdims=True)
            points[:, first : first + 5, 2] = depth
        return points
