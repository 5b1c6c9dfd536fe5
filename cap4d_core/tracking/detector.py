"""Face detection: where faces are in a picture, with six key points each.

Two single-shot detectors (BlazeFace, Bazarevsky et al. 2019): one for faces that fill a good part
of the picture, one for smaller faces. Pictures are (H, W, 3) uint8 RGB; coordinates are pixels with
(0, 0) at the outer corner of the first pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.tracking.face_models import ModelName, load_face_model

MIN_SCORE = 0.5
_OVERLAP = 0.3
# Overlap of two boxes that are the same face seen in two tiles.
_TILE_SHARE = 0.6
# Pictures smaller than this hold no face that could be tracked; tiles below it are not looked at.
_MIN_TILED_SIDE = 640


@dataclass(frozen=True)
class Detection:
    """A face: box (x0, y0, x1, y1), score in 0..1, and key points (6, 2).

    The key points are the eye at the left of an upright picture, the other eye, the nose tip, the
    mouth, and the ears in the order of the eyes.
    """

    box: tuple[float, float, float, float]
    score: float
    points: NDArray[np.float64]

    @property
    def side(self) -> float:
        """Longer side of the box in pixels."""
        x0, y0, x1, y1 = self.box
        return max(x1 - x0, y1 - y0)

    def shifted(self, x: float, y: float) -> Detection:
        """The same face in a picture whose origin lies (x, y) pixels to the upper left."""
        x0, y0, x1, y1 = self.box
        return Detection(
            (x0 + x, y0 + y, x1 + x, y1 + y), self.score, self.points + np.array([x, y])
        )


@dataclass(frozen=True)
class _Variant:
    """One detector: its network, cell size of every anchor layer and anchors per cell."""

    model: ModelName
    layers: tuple[tuple[int, int], ...]
    scores: str
    boxes: str


_SHORT_RANGE = _Variant(
    "face_detection_short_range", ((8, 2), (16, 6)), "classificators", "regressors"
)
_FULL_RANGE = _Variant("face_detection_full_range", ((4, 1),), "Identity_1", "Identity")


class FaceDetector:
    """Finds faces from near to far."""

    def __init__(
        self, device: str | torch.device = "cpu", networks: str | Path | None = None
    ) -> None:
        self.device = torch.device(device)
        self._networks = {
            variant.model: load_face_model(variant.model, device, networks)
            for variant in (_SHORT_RANGE, _FULL_RANGE)
        }

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """All faces of a picture, largest first.

        Large faces are searched first; only when none is found, smaller ones, and then, in large
        pictures, those that appear when looking at overlapping quarters.
        """
        # The second network also finds large faces that the first one misses, e.g. turned ones.
        found = self._run(image, _SHORT_RANGE) + self._run(image, _FULL_RANGE)
        if not found and max(image.shape[:2]) >= _MIN_TILED_SIDE:
            found = self._detect_in_tiles(image)
        found = suppress_overlaps(found, _OVERLAP)
        return sorted(found, key=lambda face: -face.side)

    def _detect_in_tiles(self, image: NDArray[np.uint8]) -> list[Detection]:
        height, width = image.shape[:2]
        side = int(max(height, width) * 0.5)
        found = []
        for y in _tile_starts(height, side):
            for x in _tile_starts(width, side):
                tile = np.ascontiguousarray(image[y : y + side, x : x + side])
                found += [face.shifted(x, y) for face in self._run(tile, _FULL_RANGE)]
        return found

    def _run(self, image: NDArray[np.uint8], variant: _Variant) -> list[Detection]:
        network = self._networks[variant.model]
        size = network.input_size[0]
        height, width = image.shape[:2]
        scale = size / max(height, width)
        # Scale to fit, centred, black around: as the networks were trained.
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
        canvas = np.zeros((size, size, 3), np.uint8)
        canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(
            image, inner, interpolation=method
        )
        batch = torch.from_numpy(canvas).to(self.device).float()[None] / 127.5 - 1.0
        outputs = network(batch)
        scores = outputs[variant.scores][0, :, 0].clamp(-100, 100).sigmoid().cpu().numpy()
        raw = outputs[variant.boxes][0].cpu().numpy().astype(np.float64)
        likely = scores >= MIN_SCORE
        centers = anchor_centers(size, variant.layers)[likely] * size
        values = raw[likely].reshape(-1, 8, 2)
        factor = np.array([width / inner[0], height / inner[1]])
        faces = []
        for center, value, score in zip(centers, values, scores[likely], strict=True):
            middle, extent = (center + value[0] - [left, top]) * factor, value[1] * factor
            low, high = middle - extent / 2, middle + extent / 2
            points = (center + value[2:] - [left, top]) * factor
            box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            faces.append(Detection(box, float(score), points))
        return merge_overlaps(faces, _OVERLAP)


def anchor_centers(size: int, layers: tuple[tuple[int, int], ...]) -> NDArray[np.float64]:
    """Centres of the anchors in 0..1, (N, 2) as x, y: cell by cell, row-major, layer by layer.

    Args:
        size: side of the network's input.
        layers: cell size in pixels and anchors per cell of every layer.
    """
    parts = []
    for stride, per_cell in layers:
        cells = size // stride
        line = (np.arange(cells) + 0.5) / cells
        y, x = np.meshgrid(line, line, indexing="ij")
        centers = np.stack([x, y], axis=-1).reshape(-1, 2)
        parts.append(np.repeat(centers, per_cell, axis=0))
    return np.concatenate(parts)


def overlap(first: Detection, second: Detection) -> float:
    """Intersection over union of two boxes."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    return shared / (areas - shared) if shared > 0 else 0.0


def merge_overlaps(faces: list[Detection], threshold: float) -> list[Detection]:
    """Replaces every group of overlapping boxes by their average, weighted by score."""
    left = sorted(faces, key=lambda face: -face.score)
    merged = []
    while left:
        best = left[0]
        group = [face for face in left if face is best or overlap(best, face) > threshold]
        left = [face for face in left if not any(face is member for member in group)]
        weights = np.array([face.score for face in group])
        weights /= weights.sum()
        box: Any = tuple(float(v) for v in weights @ np.array([face.box for face in group]))
        points = np.tensordot(weights, np.stack([face.points for face in group]), axes=1)
        merged.append(Detection(box, best.score, points))
    return merged


def suppress_overlaps(faces: list[Detection], threshold: float) -> list[Detection]:
    """Keeps the best of every group of boxes that overlap or contain each other."""
    kept: list[Detection] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if not any(overlap(face, k) > threshold or _inside(face, k) for k in kept):
            kept.append(face)
    return kept


def _inside(first: Detection, second: Detection) -> bool:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    smaller = min((ax1 - ax0) * (ay1 - ay0), (bx1 - bx0) * (by1 - by0))
    return shared > _TILE_SHARE * smaller


def _tile_starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    count = 1 + -(-(length - side) * 2 // side)
    return [round(start) for start in np.linspace(0, length - side, count)]
