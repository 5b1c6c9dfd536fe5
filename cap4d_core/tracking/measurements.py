"""What landmarks and outlines say about a head: residuals, their weights and derivatives.

Conventions: as in cap4d_core.tracking.landmark_fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.eyeball import eye_openness
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.landmark_topology import INNER_LIP_PAIRS
from cap4d_core.tracking.silhouette import DistanceField

Array = NDArray[np.float64]

FLIP = np.array([1.0, -1.0, -1.0])
# Error of the landmarks in the picture relative to the face, on top of their spread on the head.
_PIXEL_SIGMA = 0.010
# Landmarks err together: so many of them count as one observation.
_CORRELATED = 6.0
# Residuals beyond this many sigmas lose influence.
_ROBUST_SCALE = 3.0
# Upper and lower lids, upper and lower lip: how far they are apart is seen better than where they
# are, and it is what blinking and talking change.
LID_AND_LIP_PAIRS = np.array(
    [
        *[(159, 145), (160, 144), (158, 153), (161, 163), (157, 154)],
        *[(386, 374), (387, 373), (385, 380), (388, 390), (384, 381)],
        *INNER_LIP_PAIRS.tolist(),
        (0, 17),
    ]
)
_PAIR_SIGMA = 0.006
_NUM_LID_PAIRS = 10
# Beyond so many sigmas distances lose influence. Closed eyes and mouths are far from the open ones
# that a fit begins with, yet no outliers.
_PAIR_ROBUST_SCALE = 12.0
# The network plays closing eyes down: height by width of eyes as it sees them, and as they are,
# from renderings of two head models that blink. From 0.26 on it is right.
_SEEN_OPENNESS = (0.0, 0.08, 0.15, 0.18, 0.22, 0.26, 1.0)
_TRUE_OPENNESS = (0.0, 0.02, 0.04, 0.09, 0.155, 0.26, 1.0)


@dataclass(frozen=True)
class Camera:
    """What is known of a camera: size (height, width), focal length, pose.

    focal_px: focal length in pixels, None = not known; focal_log_sigma: its relative uncertainty (0
    = exact); center: principal point (x, y), None = middle of the picture; extr: (4, 4)
    world-to-camera, None = to be estimated (the first camera then defines the world).
    """

    size: tuple[int, int]
    focal_px: float | None = None
    focal_log_sigma: float = 0.0
    extr: Array | None = None
    center: tuple[float, float] | None = None


@dataclass(frozen=True)
class Observation:
    """Landmarks (N, 3) of one frame in one camera, in pixels; `weight` scales their influence.

    outline: distances to the edge of the person, None = not known.
    """

    frame: int
    camera: int
    points: Array
    weight: float = 1.0
    outline: DistanceField | None = None


@dataclass
class LandmarkFit:
    """Result: shape (S,), expr (T, E), rotation (T, 3, 3), tra (T, 3), focal (C,), extr (C, 4, 4).

    residuals: (O,) weighted mean distance between observed and fitted landmarks that face the
    camera, relative to the size of the face.
    """

    shape: Array
    expr: Array
    rotation: Array
    tra: Array
    focal: Array
    extr: Array
    eye_rot: Array
    residuals: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def rot(self) -> Array:
        """(T, 3) rotation vectors."""
        vectors: Array = Rotation.from_matrix(self.rotation).as_rotvec()
        return vectors


@dataclass(frozen=True)
class Free:
    """What a stage may change."""

    shape: bool
    expression: bool
    cameras: bool


class Measurements:
    """Observed landmarks and outlines of one subject, compared with a state of the fit.

    Attributes:
        frame (O,), camera (O,): what every observation shows.
        points (O, 478, 3): landmarks as seen; pixels (O, N, 2): with the lids as they are.
        trust (O,); size (O,): of the face, pixels.
        variance (N,): of the landmarks seen from ahead, relative to the face.
        center (C, 2): principal points.
    """

    def __init__(
        self,
        model: LandmarkModel,
        cameras: Sequence[Camera],
        observations: Sequence[Observation],
        num_frames: int,
    ) -> None:
        """Takes observations.

        Args:
            model: landmarks of the head model.
            cameras: what is known of them.
            observations: every frame needs at least one.
            num_frames: T.

        Raises:
            ValueError: a frame without observation.
        """
        self.model, self.cameras = model, tuple(cameras)
        self.num_frames = num_frames
        self.frame = np.array([o.frame for o in observations])
        self.camera = np.array([o.camera for o in observations])
        if set(range(num_frames)) - set(self.frame.tolist()):
            raise ValueError("every frame needs an observation")
        self.points = np.stack([o.points for o in observations])
        self.pixels = with_true_lids(self.points)[:, : model.num_points, :2]
        self.trust = np.array([o.weight for o in observations])
        self.outlines = [o.outline for o in observations]
        low, high = self.pixels.min(axis=1), self.pixels.max(axis=1)
        self.size = (high - low).max(axis=1)
        self.variance = _PIXEL_SIGMA**2 + (model.spread / model.face_size) ** 2
        self.base_weight = model.density_weight / self.variance / _CORRELATED
        centers = [c.center or (c.size[1] / 2, c.size[0] / 2) for c in self.cameras]
        self.center = np.array(centers)
        self.pair_precision = 1.0 / _PAIR_SIGMA**2
        first, second = LID_AND_LIP_PAIRS.T
        self.pair_targets: Array = self.pixels[:, first] - self.pixels[:, second]

    offset: Array | float = 0.0
    """Shift (T, N, 3) of the landmarks by turned eyes, if known."""
    tolerance: float = 1.0
    """How much larger residuals may be before they lose influence, in multiples of the usual."""

    def camera_points(self, state: LandmarkFit) -> tuple[Array, Array, Array, Array]:
        """Own-frame points (T, N, 3); turned (O, N, 3); camera (O, N, 3); pixels (O, N, 2)."""
        own = self.model.points(state.shape, state.expr, self.offset)
        turned = own @ state.rotation.transpose(0, 2, 1)
        world = (turned + state.tra[:, None])[self.frame] * FLIP
        extr = state.extr[self.camera]
        camera = world @ extr[:, :3, :3].transpose(0, 2, 1) + extr[:, None, :3, 3]
        depth = np.maximum(camera[..., 2:], 1e-3)
        # The network's known error for this view of the head, as a shift across the line of sight.
        shift = self.model.view_bias(self._sight_rotation(state)) * [1.0, -1.0]
        pixels = (camera[..., :2] + shift) / depth * state.focal[self.camera, None, None]
        return own, turned[self.frame], camera, pixels + self.center[self.camera, None]

    def _sight_rotation(self, state: LandmarkFit) -> Array:
        """(O, 3, 3) rotation from head axes to axes along the line of sight to the head."""
        flip = np.diag(FLIP)
        extr = state.extr[self.camera]
        rotation = flip @ extr[:, :3, :3] @ flip @ state.rotation[self.frame]
        position = (
            np.einsum("oij,oj->oi", extr[:, :3, :3], state.tra[self.frame] * FLIP) + extr[:, :3, 3]
        ) * FLIP
        return turn_towards(-position).transpose(0, 2, 1) @ rotation

    def sight_angles(self, state: LandmarkFit) -> Array:
        """(O, 2) yaw (> 0 to the right) and pitch (> 0 up) against the line of sight, radians."""
        rotation = self._sight_rotation(state)
        yaw = np.arctan2(-rotation[:, 2, 0], rotation[:, 2, 2])
        return np.stack([yaw, -np.arcsin(np.clip(rotation[:, 2, 1], -1.0, 1.0))], axis=-1)

    def visibility(self, state: LandmarkFit, camera: Array) -> Array:
        """(O, N) 0..1: whether the surface at a landmark faces the camera."""
        normals = self.model.normals @ state.rotation.transpose(0, 2, 1)
        seen = (normals[self.frame] * FLIP) @ state.extr[self.camera, :3, :3].transpose(0, 2, 1)
        sight = -camera / np.linalg.norm(camera, axis=-1, keepdims=True)
        cosine = (seen * sight).sum(-1)
        visible: Array = np.clip((cosine + 0.1) / 0.4, 0.0, 1.0) ** 2
        return visible

    def whitening(self, state: LandmarkFit) -> Array:
        """(O, N, 2, 2) symmetric matrices that turn residuals into multiples of their error.

        Landmarks of the contour slide along it when the head is tilted: along it they say little.
        """
        rotation = self._sight_rotation(state)
        covariance = self.model.view_scatter(rotation) / self.model.face_size**2
        covariance *= [[1.0, -1.0], [-1.0, 1.0]]  # y down, as in the picture
        covariance += self.variance[:, None, None] * np.eye(2)
        # Inverse square root of a symmetric 2 x 2 matrix in closed form.
        root_determinant = np.sqrt(np.linalg.det(covariance))[..., None, None]
        trace = np.trace(covariance, axis1=-2, axis2=-1)[..., None, None]
        root = (covariance + root_determinant * np.eye(2)) / np.sqrt(trace + 2 * root_determinant)
        inverse: Array = np.linalg.inv(root)
        return inverse

    def weights(self, state: LandmarkFit, camera: Array, whitened: Array) -> Array:
        """(O, N) influence of every whitened landmark: visibility and robust weight."""
        base = self.model.density_weight / _CORRELATED * self.visibility(state, camera)
        square = (whitened**2).sum(-1)
        weights: Array = (
            base * self.trust[:, None] / (1.0 + square / (self.tolerance * _ROBUST_SCALE) ** 2) ** 2
        )
        return weights

    def pair_residual(self, pixels: Array) -> Array:
        """(O, P, 2) distances between lids and between lips that the fit has too much."""
        first, second = LID_AND_LIP_PAIRS.T
        difference: Array = pixels[:, first] - pixels[:, second] - self.pair_targets
        return difference / self.size[:, None, None]

    def pair_weights(self, weight: Array, residual: Array) -> Array:
        """(O, P) influence of the distances between lids and between lips."""
        first, second = LID_AND_LIP_PAIRS.T
        visible = np.minimum(weight[:, first], weight[:, second])
        square = (residual**2).sum(-1) * self.pair_precision
        robust = 1.0 / (1.0 + square / (self.tolerance * _PAIR_ROBUST_SCALE) ** 2) ** 2
        pairs: Array = visible * robust * self.pair_precision / _CORRELATED
        return pairs * self.trust[:, None]

    def residual_figures(self, state: LandmarkFit) -> Array:
        """(O,) figures of `LandmarkFit.residuals`."""
        _, _, camera, pixels = self.camera_points(state)
        distance = np.linalg.norm(pixels - self.pixels, axis=-1) / self.size[:, None]
        weight = self.base_weight * self.visibility(state, camera)
        figures: Array = (distance * weight).sum(1) / weight.sum(1)
        return figures

    def jacobians(
        self,
        state: LandmarkFit,
        o: int,
        turned: Array,
        camera: Array,
        shape_basis: Array,
        expression_basis: Array,
        free: Free,
    ) -> tuple[Array, Array]:
        """Derivatives of image points, in residual units, by the frame's and the shared unknowns.

        Args:
            state: where to linearise.
            o: observation.
            turned: (M, 3) points in the head's frame, turned.
            camera: (M, 3) points before the camera.
            shape_basis: (M, 3, S).
            expression_basis: (M, 3, E).
            free: which unknowns there are.

        Returns:
            (M, 2, n) and (M, 2, shared unknowns).
        """
        t, c = int(self.frame[o]), int(self.camera[o])
        num_expr = state.expr.shape[1] if free.expression else 0
        num_shape = len(state.shape) if free.shape else 0
        depth = np.maximum(camera[:, 2], 1e-3)
        focal = state.focal[c] / self.size[o]
        slope = np.zeros((len(camera), 2, 3))
        slope[:, 0, 0] = slope[:, 1, 1] = focal / depth
        slope[:, :, 2] = -focal * camera[:, :2] / depth[:, None] ** 2
        to_head = slope @ state.extr[c, :3, :3] * FLIP
        # Left-multiplied small rotation: d(R q) = w x (R q).
        own = np.empty((len(camera), 2, 6 + num_expr))
        own[:, :, :3] = np.cross(turned[:, None], to_head)
        own[:, :, 3:6] = to_head
        in_own_frame = to_head @ state.rotation[t]
        if num_expr:
            own[:, :, 6:] = in_own_frame @ expression_basis
        shared = np.zeros((len(camera), 2, num_shape + 7 * len(self.cameras) * free.cameras))
        if num_shape:
            shared[:, :, :num_shape] = in_own_frame @ shape_basis
        if free.cameras:
            first = num_shape + 7 * c
            shared[:, :, first] = camera[:, :2] / depth[:, None] * focal
            # Small motion of the camera itself, in its own axes.
            inside = camera - state.extr[c, :3, 3]
            shared[:, :, first + 1 : first + 4] = np.cross(inside[:, None], slope)
            shared[:, :, first + 4 : first + 7] = slope
        return own, shared

    def outline_rows(
        self, state: LandmarkFit, o: int, field: DistanceField, free: Free
    ) -> tuple[Array, Array, Array, Array]:
        """Rows of the silhouette: derivatives (own, shared), weights and residuals."""
        head = self.model.outline
        t, c = int(self.frame[o]), int(self.camera[o])
        own = head.rest + head.shape_basis @ state.shape + head.expression_basis @ state.expr[t]
        turned = own @ state.rotation[t].T
        extr = state.extr[c]
        camera = (turned + state.tra[t]) * FLIP @ extr[:3, :3].T + extr[:3, 3]
        depth = np.maximum(camera[:, 2:], 1e-3)
        pixels = camera[:, :2] / depth * state.focal[c] + self.center[c]
        normals = (head.normals @ state.rotation[t].T) * FLIP @ extr[:3, :3].T
        sight = -camera / np.linalg.norm(camera, axis=1, keepdims=True)
        cosines = (normals * sight).sum(1)
        chosen, distance, gradient, weights = head.residuals(
            pixels, cosines, field, float(self.size[o])
        )
        own_rows, shared_rows = self.jacobians(
            state,
            o,
            turned[chosen],
            camera[chosen],
            head.shape_basis[chosen],
            head.expression_basis[chosen],
            free,
        )
        along = gradient[:, None]
        return (
            (along @ own_rows)[:, 0],
            (along @ shared_rows)[:, 0],
            weights * self.trust[o],
            distance,
        )


def pairs_of(values: Array) -> Array:
    """Differences (P, ...) of values per landmark (N, ...) over the lid and lip pairs."""
    first, second = LID_AND_LIP_PAIRS.T
    difference: Array = values[first] - values[second]
    return difference


def with_true_lids(points: Array) -> Array:
    """Landmarks (O, 478, 3) with the upper lids where the eyes are as open as they really are."""
    corrected = points.copy()
    half = _NUM_LID_PAIRS // 2
    for o, landmarks in enumerate(points):
        for eye, openness in enumerate(eye_openness(landmarks[:, :2])):
            upper, lower = LID_AND_LIP_PAIRS[eye * half : (eye + 1) * half].T
            share = np.interp(openness, _SEEN_OPENNESS, _TRUE_OPENNESS) / max(openness, 1e-6)
            gap = landmarks[upper, :2] - landmarks[lower, :2]
            corrected[o, upper, :2] = landmarks[lower, :2] + min(share, 1.0) * gap
    return corrected


def turn_towards(directions: Array) -> Array:
    """(O, 3, 3) smallest rotations that take +z to the given directions (O, 3)."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    axis = np.stack([-unit[:, 1], unit[:, 0], np.zeros(len(unit))], axis=-1)
    sine = np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.arctan2(sine, unit[:, 2:])
    matrices: Array = Rotation.from_rotvec(axis / np.maximum(sine, 1e-12) * angle).as_matrix()
    return matrices
