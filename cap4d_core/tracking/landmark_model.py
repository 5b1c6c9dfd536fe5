"""The head model reduced to its landmarks: points linear in shape and expression.

Rotating the eyes also moves the lids a little (pose correctives); that part is computed with the
whole model and enters as an offset per frame.

Conventions: head space, metres; rotations are matrices; numpy float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.spatial import cKDTree

from cap4d_core.flame.model import HeadModel
from cap4d_core.tracking.correspondence import BIAS_YAW_DEG, Correspondence
from cap4d_core.tracking.landmark_topology import INNER_LIP_PAIRS
from cap4d_core.tracking.silhouette import HeadOutline
from cap4d_core.tracking.template_views import EYEBALLS, eyeball_center, sunken_eyes

Array = NDArray[np.float64]

# Inner lips that are further apart are open; how far closed ones are opened, how exactly, and how
# still everything above the mouth stays.
_OPEN_LIPS_M, _OPENING_M, _LIP_SIGMA_M, _STILL_SIGMA_M = 0.004, 0.015, 0.001, 0.003
_BELOW_NOSE = 2


class LandmarkModel:
    """Landmark points of a head model.

    Attributes:
        rest (N, 3): landmarks of the mean head at rest, constant pose correctives included.
        normals (N, 3): outward normals there.
        shape_basis (N, 3, S), expression_basis (N, 3, E).
        outline: the head's surface, for its silhouette.
        spread (N,): uncertainty of the landmarks on the surface in metres.
        density_weight (N,): share of the surface that a landmark stands for, 1 on average.
        face_size: scale of the face in metres: extent of the landmarks.
        mouth (E,): likeliest expression that closes an open mouth, or opens a closed one.
    """

    def __init__(self, model: HeadModel, correspondence: Correspondence) -> None:
        self.model = model
        faces = model.faces.numpy()
        self._corners = correspondence.vertices(faces)
        self._weights = correspondence.barycentrics
        self.spread = correspondence.spread_m
        count = len(self.spread)
        self.rest = self.points_of(self._whole_head(np.zeros(model.num_shape))[0])
        self.shape_basis = self._reduce(model.shape_basis)
        self.expression_basis = self._reduce(model.pose_basis[: model.num_expr])
        vertices = self._whole_head(np.zeros(model.num_shape))[0]
        normals = _vertex_normals(vertices, faces)
        self.outline = HeadOutline(model, vertices, normals, self.rest)
        blended = (normals[self._corners] * self._weights[..., None]).sum(1)
        self.normals = blended / np.linalg.norm(blended, axis=1, keepdims=True)
        extent = self.rest.max(axis=0) - self.rest.min(axis=0)
        self.face_size = float(extent[:2].max())
        self.num_points = count
        self.mouth = mouth_expression(self.rest, self.expression_basis)
        yaws = np.array(BIAS_YAW_DEG)
        self._bias = make_interp_spline(yaws, correspondence.bias, k=1)
        self._scatter = make_interp_spline(yaws, correspondence.scatter, k=1)
        # Lips and lids have many landmarks close together that err together.
        distance = cKDTree(self.rest).query(self.rest, k=7)[0][:, 1:].mean(1)
        area = np.clip(distance / np.median(distance), 0.2, 1.5) ** 2
        self.density_weight = area / area.mean()

    def view_bias(self, rotation: Array) -> Array:
        """Where the network sees the landmarks beside their place, as it was measured.

        Args:
            rotation: (O, 3, 3) head axes to axes along the line of sight (+x right, +y up, +z to
                the viewer).

        Returns:
            (O, N, 2) metres along the first two of those axes.
        """
        yaw, turn = _yaw_and_roll(rotation)
        result: Array = self._bias(yaw) @ turn.transpose(0, 2, 1)
        return result

    def view_scatter(self, rotation: Array) -> Array:
        """How uncertain that is: (O, N, 2, 2) covariances in square metres, same axes."""
        yaw, turn = _yaw_and_roll(rotation)
        upright = self._scatter(yaw)[..., [[0, 1], [1, 2]]]
        result: Array = turn[:, None] @ upright @ turn.transpose(0, 2, 1)[:, None]
        return result

    def _reduce(self, planar: torch.Tensor) -> Array:
        """(K, 3 * 5023) basis with planar coordinates to (N, 3, K) at the landmarks."""
        basis = planar.detach().cpu().double().numpy().reshape(len(planar), 3, -1)
        corners = basis[:, :, self._corners]  # (K, 3, N, 3)
        reduced: Array = np.einsum("kcnb,nb->nck", corners, self._weights)
        return np.ascontiguousarray(reduced)

    def points_of(self, vertices: Array) -> Array:
        """Landmarks on posed vertices: (..., V, 3) -> (..., N, 3)."""
        corners = vertices[..., self._corners, :]
        points: Array = np.einsum("...nbc,nb->...nc", corners, self._weights)
        return points

    def points(self, shape: Array, expr: Array, offset: Array | float = 0.0) -> Array:
        """(T, N, 3) landmarks in the head's own frame.

        Args:
            shape: (S,).
            expr: (T, E).
            offset: (T, N, 3) of `eye_offset`, or 0.
        """
        neutral = self.rest + self.shape_basis @ shape
        flat = self.expression_basis.reshape(-1, self.expression_basis.shape[-1])
        moved = (expr @ flat.T).reshape(len(expr), *self.rest.shape)
        result: Array = neutral + moved + offset
        return result

    def eye_offset(self, shape: Array, expr: Array, eye_rot: Array) -> Array:
        """(T, N, 3): how turning the eyes moves the landmarks."""
        vertices = self._whole_head(shape, expr, eye_rot)
        return self.points_of(vertices) - self.points(shape, expr)

    def eyes(self, shape: Array) -> tuple[Array, Array, Array]:
        """Eyeballs of an identity at rest: centres (2, 3), pupils (2, 3), radii (2,)."""
        vertices = self._whole_head(shape)[0]
        centers, pupils, radii = [], [], []
        for part, shift in zip(EYEBALLS, sunken_eyes(vertices), strict=True):
            ball = vertices[part] + shift
            center, radius = eyeball_center(ball)
            centers.append(center)
            pupils.append(ball[ball[:, 2].argmax()])
            radii.append(radius)
        return np.stack(centers), np.stack(pupils), np.array(radii)

    def _whole_head(
        self, shape: Array, expr: Array | None = None, eye_rot: Array | None = None
    ) -> Array:
        frames = 1 if expr is None else len(expr)
        if expr is None:
            expr = np.zeros((1, self.model.num_expr))

        def tensor(values: Array) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, np.float32))

        still = torch.zeros(frames, 3)
        with torch.no_grad():
            output = self.model(
                tensor(shape),
                tensor(expr),
                still,
                still,
                None if eye_rot is None else tensor(eye_rot),
            )
        return output.vertices.double().numpy()


def mouth_expression(points: Array, basis: Array) -> Array:
    """Likeliest expression (E,) that closes an open mouth, or opens a closed one.

    Args:
        points: (N, 3) landmarks.
        basis: (N, 3, E) how expressions move them.
    """
    upper, lower = INNER_LIP_PAIRS.T
    gap = points[upper] - points[lower]
    opening = np.tile([0.0, _OPENING_M, 0.0], (len(gap), 1))
    change = -gap if lips_are_open(points) else opening
    above = points[:, 1] > points[_BELOW_NOSE, 1]
    count = basis.shape[-1]
    rows = np.concatenate(
        [
            ((basis[upper] - basis[lower]) / _LIP_SIGMA_M).reshape(-1, count),
            (basis[above] / _STILL_SIGMA_M).reshape(-1, count),
        ]
    )
    rows[:, -1] = 0.0  # the blink
    values = np.zeros(len(rows))
    values[: change.size] = change.reshape(-1) / _LIP_SIGMA_M
    result: Array = np.linalg.solve(rows.T @ rows + np.eye(count), rows.T @ values)
    return result


def lips_are_open(points: Array) -> bool:
    """Whether the inner lips of landmarks (N, 3) are apart."""
    upper, lower = INNER_LIP_PAIRS.T
    gaps = np.linalg.norm(points[upper] - points[lower], axis=1)
    return bool(gaps.mean() > _OPEN_LIPS_M)


def _yaw_and_roll(rotation: Array) -> tuple[Array, Array]:
    """Yaw in degrees (O,), within the measured ones, and (O, 2, 2) rotations by the roll."""
    # rotation = Rz(roll) Rx(pitch) Ry(yaw)
    yaw = np.degrees(np.arctan2(-rotation[:, 2, 0], rotation[:, 2, 2]))
    roll = np.arctan2(-rotation[:, 0, 1], rotation[:, 1, 1])
    cosine, sine = np.cos(roll), np.sin(roll)
    turn = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    return np.clip(yaw, BIAS_YAW_DEG[0], BIAS_YAW_DEG[-1]), turn


def _vertex_normals(vertices: Array, faces: NDArray[np.int64]) -> Array:
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    result = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(result, faces[:, corner], normals)
    smooth: Array = result / (np.linalg.norm(result, axis=1, keepdims=True) + 1e-20)
    return smooth
