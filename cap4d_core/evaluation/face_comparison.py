"""Landmark distance and identity similarity of a render, its truth and the nearest reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.evaluation.faces import FaceReader, FaceReading, keypoint_distance
from cap4d_core.evaluation.identity import IdentityEncoder
from cap4d_core.files.images import to_uint8

Array = NDArray[np.float64]


class FaceComparison:
    """Compares faces view after view.

    Attributes:
        landmarks, true_landmarks: (478, 2) of every view compared so far, None where none were
            found; pixels of the picture.
    """

    def __init__(
        self, identity: IdentityEncoder | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.reader = FaceReader(device)
        self.identity = identity
        self.landmarks: list[Array | None] = []
        self.true_landmarks: list[Array | None] = []
        self._references: dict[str, tuple[FaceReading, Array | None]] = {}

    def compare(
        self, image: Tensor, truth: Tensor, baseline: Tensor, baseline_name: str
    ) -> dict[str, Any]:
        """Figures of `ViewResult` that concern the face, and `absent`.

        Args:
            image: the render, (H, W, 3) in 0..1.
            truth: likewise.
            baseline: likewise, the nearest reference.
            baseline_name: of the reference; references are looked at once.
        """
        found, of_image = self._look(image)
        true, of_truth = self._look(truth)
        if baseline_name not in self._references:
            self._references[baseline_name] = self._look(baseline)
        near, of_baseline = self._references[baseline_name]
        self.landmarks.append(found.landmarks)
        self.true_landmarks.append(true.landmarks)
        figures: dict[str, Any] = {}
        if true.landmarks is None:
            return {"absent": {"akd": f"truth: {true.absent}"}}
        if found.landmarks is None:
            figures["absent"] = {"akd": f"render: {found.absent}"}
        else:
            distance = keypoint_distance(found.landmarks, true.landmarks)
            figures["akd"], figures["akd_percent"] = distance.pixels, distance.percent
        if near.landmarks is not None:
            percent = keypoint_distance(near.landmarks, true.landmarks).percent
            figures["baseline_akd_percent"] = percent
        if of_truth is not None and of_image is not None:
            figures["identity_similarity"] = float(of_truth @ of_image)
        if of_truth is not None and of_baseline is not None:
            figures["baseline_identity_similarity"] = float(of_truth @ of_baseline)
        return figures

    def _look(self, picture: Tensor) -> tuple[FaceReading, Array | None]:
        """Landmarks and, with a network, the embedding of the face."""
        image = to_uint8(picture.cpu().numpy())
        reading = self.reader.read(image)
        if self.identity is None or reading.landmarks is None:
            return reading, None
        return reading, self.identity.embed(image, reading.landmarks)
