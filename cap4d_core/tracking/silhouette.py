"""The outline of the head in the matte: no part of the head lies outside the person.

Where the outline of the fitted head runs along the edge of the person (the far cheek of a turned
head, nose and chin in profile), it is drawn to that edge, too. Hair only adds to the matte, so a
head inside of it is no error, and an edge that is far away is that of hair or clothes.

Conventions: as in cap4d_core.tracking.landmark_fit. Signed distances are > 0 outside the person.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, map_coordinates
from torch import Tensor

from cap4d_core.flame.model import HeadModel
from cap4d_core.tracking.template_views import NUM_SKIN_VERTICES

Array = NDArray[np.float64]

# Every n-th vertex of the head is looked at.
_STRIDE = 3
# Resolution of the distances: pixels per face; part of the picture that is kept, in faces.
_FACE_PX, _MARGIN = 96.0, 1.2
# Uncertainty of the matte's edge and reach of what draws to it, relative to the face.
_SIGMA, _REACH = 0.010, 0.03
_ROBUST_SCALE = 3.0
# Edges err together, so many of their points count as one.
_CORRELATED = 10.0
# Landmarks: tip of the chin, cheeks before the ears, brows.
_CHIN, _EARS, _BROWS = 152, [127, 356], [105, 334]
# Cosine between normal and line of sight below which a vertex is on the outline.
_RIM = 0.2


class HeadOutline:
    """Vertices of the head (without neck and eyes) as functions of shape and expression.

    Attributes:
        rest (V, 3), normals (V, 3); shape_basis (V, 3, S), expression_basis (V, 3, E).
        is_face (V,): in front of the ears and below the brows, where the outline is skin.
    """

    def __init__(self, model: HeadModel, rest: Array, normals: Array, landmarks: Array) -> None:
        """Reduces a head model.

        Args:
            model: head model without the mouth parts.
            rest: (5023, 3) vertices at rest.
            normals: (5023, 3) there.
            landmarks: (468, 3) at rest.
        """
        chin, ears, brows = landmarks[_CHIN, 1], landmarks[_EARS, 2], landmarks[_BROWS, 1]
        skin = np.flatnonzero(rest[:NUM_SKIN_VERTICES, 1] > chin)
        self.ids = skin[::_STRIDE]
        self.rest, self.normals = rest[self.ids], normals[self.ids]
        self.shape_basis = _rows(model.shape_basis, self.ids)
        self.expression_basis = _rows(model.pose_basis[: model.num_expr], self.ids)
        in_front = self.rest[:, 2] > ears.mean()
        self.is_face = in_front & (self.rest[:, 1] < brows.mean())

    def residuals(
        self, pixels: Array, cosines: Array, field: DistanceField, size: float
    ) -> tuple[NDArray[np.int64], Array, Array, Array]:
        """Vertices on the wrong side of the edge, or near it where it is that of the face.

        Args:
            pixels: (V, 2).
            cosines: (V,) between normal and line of sight.
            field: of the picture.
            size: of the face in pixels.

        Returns:
            Indices (M,) into the vertices, distances (M,) relative to the face, their gradients
            (M, 2) and weights (M,).
        """
        distance, gradient, known = field.sample(pixels)
        distance = distance / size
        rim = self.is_face & (np.abs(cosines) < _RIM) & (np.abs(distance) < _REACH)
        chosen = np.flatnonzero(known & ((distance > 0) | rim))
        error = (distance[chosen] / (_SIGMA * _ROBUST_SCALE)) ** 2
        weights = 1.0 / (1.0 + error) ** 2 / _SIGMA**2 / _CORRELATED
        return chosen, distance[chosen], gradient[chosen], weights


def _rows(planar: Tensor, ids: NDArray[np.int64]) -> Array:
    """(K, 3 * 5023) basis with planar coordinates to (V, 3, K) at some vertices."""
    basis = planar.detach().cpu().double().numpy().reshape(len(planar), 3, -1)[:, :, ids]
    return np.ascontiguousarray(basis.transpose(2, 1, 0))


@dataclass(frozen=True)
class DistanceField:
    """Signed distance to the edge of the person around a face, in pixels of the picture.

    values (h, w); origin (x, y) of its first pixel's corner; scale: its pixels per picture pixel.
    """

    values: NDArray[np.float32]
    origin: Array
    scale: float

    def sample(self, pixels: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Distances (V,), their gradients (V, 2) and whether a place is inside the field."""
        place = (pixels - self.origin) * self.scale - 0.5
        height, width = self.values.shape
        known: NDArray[np.bool_] = np.asarray(
            ((place > 0) & (place < [width - 1, height - 1])).all(1), np.bool_
        )

        def at(x: float, y: float) -> Array:
            where = [place[:, 1] + y, place[:, 0] + x]
            return np.asarray(map_coordinates(self.values, where, order=1, mode="nearest"))

        gradient = np.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], -1) * self.scale / 2
        return at(0, 0), gradient, known


def distance_field(matte: NDArray[np.uint8], low: Array, high: Array) -> DistanceField:
    """The field around a face whose landmarks lie between two corners (x, y)."""
    height, width = matte.shape
    size = float((high - low).max())
    center = (low + high) / 2
    corner = np.maximum(np.floor(center - _MARGIN * size), 0).astype(int)
    end = np.minimum(np.ceil(center + _MARGIN * size), [width, height]).astype(int)
    part = matte[corner[1] : end[1], corner[0] : end[0]]
    scale = min(1.0, _FACE_PX / size)
    shape = (max(2, round(part.shape[1] * scale)), max(2, round(part.shape[0] * scale)))
    person = cv2.resize(part, shape, interpolation=cv2.INTER_AREA) >= 128
    if person.all() or not person.any():
        # No edge to go by.
        return DistanceField(np.full((2, 2), -1e6, np.float32), corner.astype(np.float64), scale)
    outside = distance_transform_edt(~person) - distance_transform_edt(person)
    # Half a pixel: distances are measured between centres of pixels, the edge lies between them.
    values = (outside - 0.5 * np.sign(outside)) / scale
    return DistanceField(np.asarray(values, np.float32), corner.astype(np.float64), scale)
