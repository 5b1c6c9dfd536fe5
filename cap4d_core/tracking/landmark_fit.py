"""Fits the head model to landmarks: pose, then shape and camera, then expression.

A weighted non-linear least-squares problem, solved by damped Gauss-Newton steps with robust weights
(iteratively reweighted). Landmark points are linear in shape and expression, so all derivatives are
exact. Frames couple through the shape and the cameras only (Schur complement), in videos also
through accelerations (banded system).

Conventions:
    Head space and `extr` as in cap4d_core.files.tracking; world = head space, y and z negated.
    Residuals are pixels relative to the size of the face in the picture.
    Numpy float64; rotations are matrices inside, vectors in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solveh_banded
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.correspondence import align_similarity
from cap4d_core.tracking.landmark_model import LandmarkModel

Array = NDArray[np.float64]

_FLIP = np.array([1.0, -1.0, -1.0])
# Error of the landmarks in the picture relative to the face, on top of their spread on the head.
_PIXEL_SIGMA = 0.010
# Landmarks err together: so many of them count as one observation.
_CORRELATED = 6.0
# Upper and lower lids, upper and lower lip: how far they are apart is seen better than where they
# are, and it is what blinking and talking change.
LID_AND_LIP_PAIRS = np.array(
    [
        *[(159, 145), (160, 144), (158, 153), (161, 163), (157, 154)],
        *[(386, 374), (387, 373), (385, 380), (388, 390), (384, 381)],
        *[(13, 14), (82, 87), (312, 317), (81, 178), (311, 402), (80, 88), (310, 318), (0, 17)],
    ]
)
_PAIR_SIGMA = 0.006
# The last coefficient is a blink by itself: lids should close by it rather than by a mixture.
_BLINK_PRIOR = 0.1
# Residuals beyond this many sigmas lose influence.
_ROBUST_SCALE = 3.0
# Distance of the head and its uncertainty (log), and focal length per picture side. One picture
# hardly tells them apart. The released fits, which the diffusion model learnt from, lie at 1.1 to
# 1.5 m.
_DISTANCE_M, _DISTANCE_LOG_SIGMA = 1.2, 0.2
_FOCAL, _FOCAL_LOG_SIGMA = 2.0, 1.0
# A change of shape or expression that looks like a turn or shift of the face belongs to the pose.
_RIGID_ANGLE, _RIGID_SHIFT_M = np.deg2rad(1.0), 0.002
# Typical accelerations at 30 frames per second: rotation (rad), translation (m; sideways, depth),
# expression (standard deviations), per frame squared.
_REFERENCE_FPS = 30.0
_ACCELERATION = {"rot": np.deg2rad(0.55), "side": 0.0018, "depth": 0.0022, "expr": 0.33}
_BLINK_ACCELERATION = 2.0
# Shape and cameras of long recordings are estimated from so many frames.
_MAX_SHARED_FRAMES = 24
# Uncertainty of the pose of further cameras before seeing anything (radians and metres).
_CAMERA_SIGMA = 1.0


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
    """Landmarks (N, 3) of one frame in one camera, in pixels; `weight` scales their influence."""

    frame: int
    camera: int
    points: Array
    weight: float = 1.0


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
class _Free:
    """What a stage may change."""

    shape: bool
    expression: bool
    cameras: bool


class LandmarkFitter:
    """Fits a head model to the landmarks of one subject."""

    def __init__(
        self,
        model: LandmarkModel,
        cameras: Sequence[Camera],
        observations: Sequence[Observation],
        num_frames: int,
        fps: float | None = None,
        smoothness: float = 0.0,
    ) -> None:
        """Prepares a fit.

        Args:
            model: landmarks of the head model.
            cameras: what is known of them.
            observations: every frame needs at least one.
            num_frames: T.
            fps: frame rate when the frames are consecutive.
            smoothness: weight of the accelerations; 0 for independent frames.

        Raises:
            ValueError: a frame without observation.
        """
        self.model, self.cameras = model, tuple(cameras)
        self.num_frames = num_frames
        self.fps, self.smoothness = fps, smoothness
        self.frame = np.array([o.frame for o in observations])
        self.camera = np.array([o.camera for o in observations])
        if set(range(num_frames)) - set(self.frame.tolist()):
            raise ValueError("every frame needs an observation")
        self.points = np.stack([o.points for o in observations])
        self.pixels = self.points[:, : model.num_points, :2]
        self.trust = np.array([o.weight for o in observations])
        low, high = self.pixels.min(axis=1), self.pixels.max(axis=1)
        self.size = (high - low).max(axis=1)
        sigma = np.hypot(_PIXEL_SIGMA, model.spread / model.face_size)
        self.precision = 1.0 / sigma**2
        self.base_weight = self.precision * model.density_weight / _CORRELATED
        centers = [c.center or (c.size[1] / 2, c.size[0] / 2) for c in self.cameras]
        self.center = np.array(centers)
        self.pair_precision = 1.0 / _PAIR_SIGMA**2
        self.rigid_shape = _rigid_part(model.rest, model.shape_basis)
        self.rigid_expression = _rigid_part(model.rest, model.expression_basis)

    def fit(self) -> LandmarkFit:
        """Runs all stages."""
        state = self._initial()
        if self.num_frames > _MAX_SHARED_FRAMES:
            chosen = self._spread_frames(state)
            part = self._restricted(chosen)
            shared = part._stages(part._initial(), share=True)
            state.shape, state.focal, state.extr = shared.shape, shared.focal, shared.extr
            self._rescale_depth(state)
            state = self._stages(state, share=False)
        else:
            state = self._stages(state, share=True)
        state.residuals = self.residual_figures(state)
        return state

    def refine(self, state: LandmarkFit, eye_offset: Array, iterations: int = 4) -> LandmarkFit:
        """Continues with known offsets of the landmarks by the eye rotation."""
        self._offset = eye_offset
        for _ in range(iterations):
            self._step(state, _Free(False, True, False), self.smoothness)
        state.residuals = self.residual_figures(state)
        return state

    _offset: Array | float = 0.0

    def _stages(self, state: LandmarkFit, share: bool) -> LandmarkFit:
        free_cameras = len(self.cameras) > 1 and any(c.extr is None for c in self.cameras[1:])
        for _ in range(6):
            self._step(state, _Free(False, False, free_cameras), 0.0)
        if share:
            for _ in range(6):
                self._step(state, _Free(True, False, True), 0.0)
        for _ in range(12):
            self._step(state, _Free(share, True, share), self.smoothness)
        return state

    def _restricted(self, frames: NDArray[np.int64]) -> LandmarkFitter:
        """A fitter for some of the frames, without smoothness."""
        number = {int(f): i for i, f in enumerate(frames)}
        observations = [
            Observation(number[int(f)], int(c), p, float(w))
            for f, c, p, w in zip(self.frame, self.camera, self.points, self.trust, strict=True)
            if int(f) in number
        ]
        return LandmarkFitter(self.model, self.cameras, observations, len(frames))

    def _spread_frames(self, state: LandmarkFit) -> NDArray[np.int64]:
        """Frames that differ most in pose and time: farthest-point sampling of their poses."""
        rotation = Rotation.from_matrix(state.rotation).as_rotvec()
        time = np.linspace(0, 0.3, self.num_frames)[:, None]
        features = np.concatenate([rotation, time], axis=1)
        chosen = [int(np.linalg.norm(rotation - rotation.mean(0), axis=1).argmin())]
        distance = np.full(self.num_frames, np.inf)
        while len(chosen) < _MAX_SHARED_FRAMES:
            distance = np.minimum(distance, np.linalg.norm(features - features[chosen[-1]], axis=1))
            chosen.append(int(distance.argmax()))
        return np.unique(chosen)

    def _initial(self) -> LandmarkFit:
        """Pose from the network's own three-dimensional mesh; focal lengths from what is known."""
        focal = np.zeros(len(self.cameras))
        for c in range(len(self.cameras)):
            scale = np.median(self.size[self.camera == c]) / self.model.face_size
            focal[c] = np.exp(self._focal_prior(c, 1.0 / float(scale))[0])
        poses = [self._initial_pose(o, focal) for o in range(len(self.frame))]
        extr = np.tile(np.eye(4), (len(self.cameras), 1, 1))
        for c, camera in enumerate(self.cameras):
            if camera.extr is not None:
                extr[c] = camera.extr
            elif c > 0:
                extr[c] = self._initial_camera(c, poses, extr)
        rotation, tra = np.zeros((self.num_frames, 3, 3)), np.zeros((self.num_frames, 3))
        # The camera that sees the face from the front knows its pose best.
        frontality = np.array([pose[0][2, 2] for pose in poses])
        for t in range(self.num_frames):
            seen = np.flatnonzero(self.frame == t)
            best = int(seen[frontality[seen].argmax()])
            turn, shift = poses[best]
            camera_rotation = extr[self.camera[best], :3, :3]
            camera_shift = extr[self.camera[best], :3, 3]
            flip = np.diag(_FLIP)
            rotation[t] = flip @ camera_rotation.T @ flip @ turn
            tra[t] = _FLIP * (camera_rotation.T @ (_FLIP * shift - camera_shift))
        model = self.model.model
        return LandmarkFit(
            shape=np.zeros(model.num_shape),
            expr=np.zeros((self.num_frames, model.num_expr)),
            rotation=rotation,
            tra=tra,
            focal=focal,
            extr=extr,
            eye_rot=np.zeros((self.num_frames, 3)),
        )

    def _initial_pose(self, o: int, focal: Array) -> tuple[Array, Array]:
        """Head rotation and translation relative to a camera at the origin of head space."""
        points = self.points[o, : self.model.num_points] * _FLIP
        scale, rotation, shift = align_similarity(self.model.rest, points, self.base_weight)
        depth = focal[self.camera[o]] / scale
        center = self.center[self.camera[o]]
        tra = np.array([(shift[0] - center[0]) / scale, (shift[1] + center[1]) / scale, -depth])
        # Seen off the optical axis, the same picture means a turned head.
        sight = np.array([tra[0], tra[1], -depth])
        sight /= np.linalg.norm(sight)
        return _turn_towards(-sight[None])[0] @ rotation, tra

    def _initial_camera(self, c: int, poses: list[tuple[Array, Array]], extr: Array) -> Array:
        """Pose of a further camera from the frames that it shares with an earlier one."""
        flip = np.diag([1.0, -1.0, -1.0, 1.0])

        def matrix(o: int) -> Array:
            result = np.eye(4)
            result[:3, :3], result[:3, 3] = poses[o]
            return flip @ result @ flip

        candidates = []
        for o in np.flatnonzero(self.camera == c):
            for other in np.flatnonzero((self.frame == self.frame[o]) & (self.camera < c)):
                candidates.append(
                    matrix(int(o)) @ np.linalg.inv(matrix(int(other))) @ extr[self.camera[other]]
                )
        if not candidates:
            return np.eye(4)
        result = np.eye(4)
        stack = np.stack(candidates)
        result[:3, :3] = Rotation.from_matrix(stack[:, :3, :3]).mean().as_matrix()
        result[:3, 3] = np.median(stack[:, :3, 3], axis=0)
        return result

    def _rescale_depth(self, state: LandmarkFit) -> None:
        """Brings translations in line with a changed focal length and shape (one camera)."""
        for t in range(self.num_frames):
            o = int(np.flatnonzero(self.frame == t)[0])
            _, shift = self._initial_pose(o, state.focal)
            c = self.camera[o]
            camera = state.extr[c]
            state.tra[t] = _FLIP * (camera[:3, :3].T @ (_FLIP * shift - camera[:3, 3]))

    def camera_points(self, state: LandmarkFit) -> tuple[Array, Array, Array, Array]:
        """Own-frame points (T, N, 3); turned (O, N, 3); camera (O, N, 3); pixels (O, N, 2)."""
        own = self.model.points(state.shape, state.expr, self._offset)
        turned = own @ state.rotation.transpose(0, 2, 1)
        world = (turned + state.tra[:, None])[self.frame] * _FLIP
        extr = state.extr[self.camera]
        camera = world @ extr[:, :3, :3].transpose(0, 2, 1) + extr[:, None, :3, 3]
        depth = np.maximum(camera[..., 2:], 1e-3)
        # The network's known error for this view of the head, as a shift across the line of sight.
        shift = self.model.view_bias(self._sight_rotation(state)) * [1.0, -1.0]
        pixels = (camera[..., :2] + shift) / depth * state.focal[self.camera, None, None]
        return own, turned[self.frame], camera, pixels + self.center[self.camera, None]

    def _sight_rotation(self, state: LandmarkFit) -> Array:
        """(O, 3, 3) rotation from head axes to axes along the line of sight to the head."""
        flip = np.diag(_FLIP)
        extr = state.extr[self.camera]
        rotation = flip @ extr[:, :3, :3] @ flip @ state.rotation[self.frame]
        position = (
            np.einsum("oij,oj->oi", extr[:, :3, :3], state.tra[self.frame] * _FLIP) + extr[:, :3, 3]
        ) * _FLIP
        return _turn_towards(-position).transpose(0, 2, 1) @ rotation

    def visibility(self, state: LandmarkFit, camera: Array) -> Array:
        """(O, N) 0..1: whether the surface at a landmark faces the camera."""
        normals = self.model.normals @ state.rotation.transpose(0, 2, 1)
        seen = (normals[self.frame] * _FLIP) @ state.extr[self.camera, :3, :3].transpose(0, 2, 1)
        sight = -camera / np.linalg.norm(camera, axis=-1, keepdims=True)
        cosine = (seen * sight).sum(-1)
        visible: Array = np.clip((cosine + 0.1) / 0.4, 0.0, 1.0) ** 2
        return visible

    def _weights(self, state: LandmarkFit, camera: Array, residual: Array) -> Array:
        """(O, N) influence of every landmark: its precision, visibility and robust weight."""
        base = self.base_weight * self.visibility(state, camera) * self.trust[:, None]
        square = (residual**2).sum(-1) * self.precision
        weights: Array = base / (1.0 + square / _ROBUST_SCALE**2) ** 2
        return weights

    def _pair_weights(self, weight: Array, residual: Array) -> Array:
        """(O, P) influence of the distances between lids and between lips."""
        first, second = LID_AND_LIP_PAIRS.T
        visible = np.minimum(weight[:, first], weight[:, second])
        difference = ((residual[:, first] - residual[:, second]) ** 2).sum(-1)
        robust = 1.0 / (1.0 + difference * self.pair_precision / _ROBUST_SCALE**2) ** 2
        pairs: Array = visible * robust * self.pair_precision / _CORRELATED
        return pairs * self.trust[:, None]

    def residual_figures(self, state: LandmarkFit) -> Array:
        """(O,) figures of `LandmarkFit.residuals`."""
        _, _, camera, pixels = self.camera_points(state)
        distance = np.linalg.norm(pixels - self.pixels, axis=-1) / self.size[:, None]
        weight = self.base_weight * self.visibility(state, camera)
        figures: Array = (distance * weight).sum(1) / weight.sum(1)
        return figures

    def _step(self, state: LandmarkFit, free: _Free, smoothness: float) -> None:
        """One Gauss-Newton step on everything that is free."""
        model = self.model
        _, turned, camera, pixels = self.camera_points(state)
        residual = (pixels - self.pixels) / self.size[:, None, None]
        weight = self._weights(state, camera, residual)
        pairs = self._pair_weights(self.visibility(state, camera), residual)
        weight = np.concatenate([weight, pairs], axis=1)
        residual = _with_pairs(residual, axis=1)
        num_expr = state.expr.shape[1] if free.expression else 0
        num_shape = len(state.shape) if free.shape else 0
        num_cameras = len(self.cameras)
        size = 6 + num_expr
        shared_size = num_shape + (7 * num_cameras if free.cameras else 0)

        frame_matrix = np.zeros((self.num_frames, size, size))
        frame_vector = np.zeros((self.num_frames, size))
        cross = np.zeros((self.num_frames, size, shared_size))
        shared_matrix = np.zeros((shared_size, shared_size))
        shared_vector = np.zeros(shared_size)
        for o, (t, c) in enumerate(zip(self.frame, self.camera, strict=True)):
            depth = np.maximum(camera[o, :, 2], 1e-3)
            focal = state.focal[c] / self.size[o]
            slope = np.zeros((model.num_points, 2, 3))
            slope[:, 0, 0] = slope[:, 1, 1] = focal / depth
            slope[:, :, 2] = -focal * camera[o, :, :2] / depth[:, None] ** 2
            to_world = slope @ state.extr[c, :3, :3]
            to_head = to_world * _FLIP
            # Left-multiplied small rotation: d(R q) = w x (R q).
            jacobian = np.empty((model.num_points, 2, size))
            jacobian[:, :, :3] = np.cross(turned[o][:, None], to_head)
            jacobian[:, :, 3:6] = to_head
            in_own_frame = to_head @ state.rotation[t]
            if num_expr:
                jacobian[:, :, 6:] = in_own_frame @ model.expression_basis
            jacobian = _with_pairs(jacobian)
            weighted = jacobian * weight[o, :, None, None]
            flat, flat_weighted = jacobian.reshape(-1, size), weighted.reshape(-1, size)
            frame_matrix[t] += _gram(flat_weighted, flat)
            frame_vector[t] += flat_weighted.T @ residual[o].reshape(-1)
            if not shared_size:
                continue
            shared = np.zeros((model.num_points, 2, shared_size))
            if num_shape:
                shared[:, :, :num_shape] = in_own_frame @ model.shape_basis
            if free.cameras:
                first = num_shape + 7 * c
                shared[:, :, first] = camera[o, :, :2] / depth[:, None] * focal
                # Small motion of the camera itself, in its own axes.
                inside = camera[o] - state.extr[c, :3, 3]
                shared[:, :, first + 1 : first + 4] = np.cross(inside[:, None], slope)
                shared[:, :, first + 4 : first + 7] = slope
            flat_shared = _with_pairs(shared).reshape(-1, shared_size)
            cross[t] += _gram(flat_weighted, flat_shared)
            by_weight = flat_shared * np.repeat(weight[o], 2)[:, None]
            shared_matrix += _gram(by_weight, flat_shared)
            shared_vector += by_weight.T @ residual[o].reshape(-1)

        self._add_priors(state, free, frame_matrix, frame_vector, shared_matrix, shared_vector)
        steps, shared_step = self._solve(
            state, smoothness, frame_matrix, frame_vector, cross, shared_matrix, shared_vector
        )
        self._apply(state, free, steps, shared_step)

    def _add_priors(
        self,
        state: LandmarkFit,
        free: _Free,
        frame_matrix: Array,
        frame_vector: Array,
        shared_matrix: Array,
        shared_vector: Array,
    ) -> None:
        """Adds what is known before looking at the pictures to the normal equations."""
        # Keeps the pose defined when a frame shows almost nothing.
        diagonal = np.arange(6)
        frame_matrix[:, diagonal, diagonal] += 1e-3
        if free.expression:
            prior = np.eye(state.expr.shape[1]) + self.rigid_expression
            prior[-1, -1] *= _BLINK_PRIOR
            frame_matrix[:, 6:, 6:] += prior
            frame_vector[:, 6:] += state.expr @ prior
        num_shape = len(state.shape) if free.shape else 0
        if free.shape:
            prior = np.eye(num_shape) + self.rigid_shape
            shared_matrix[:num_shape, :num_shape] += prior
            shared_vector[:num_shape] += prior @ state.shape
        if not free.cameras:
            return
        for c, camera in enumerate(self.cameras):
            first = num_shape + 7 * c
            frames = self.frame[self.camera == c]
            extr = state.extr[c]
            depth = (state.tra[frames] * _FLIP) @ extr[2, :3] + extr[2, 3]
            scale = float(np.median(depth)) / float(state.focal[c])
            target, sigma = self._focal_prior(c, scale)
            shared_matrix[first, first] += sigma**-2
            shared_vector[first] += (np.log(state.focal[c]) - target) / sigma**2
            fixed = c == 0 or camera.extr is not None
            pose = np.arange(first + 1, first + 7)
            shared_matrix[pose, pose] += 1e12 if fixed else _CAMERA_SIGMA**-2

    def _focal_prior(self, c: int, depth_by_focal: float) -> tuple[float, float]:
        """Expected logarithm of the focal length and its uncertainty.

        Args:
            c: camera.
            depth_by_focal: distance of the head per pixel of focal length, known from its size.
        """
        camera = self.cameras[c]
        if camera.focal_px is not None and camera.focal_log_sigma == 0.0:
            return float(np.log(camera.focal_px)), 1e-4
        terms = [(np.log(_DISTANCE_M / depth_by_focal), _DISTANCE_LOG_SIGMA)]
        if camera.focal_px is None:
            terms.append((np.log(_FOCAL * max(camera.size)), _FOCAL_LOG_SIGMA))
        else:
            terms.append((np.log(camera.focal_px), camera.focal_log_sigma))
        values = [value for value, _ in terms]
        weights = [sigma**-2 for _, sigma in terms]
        return float(np.average(values, weights=weights)), float(sum(weights) ** -0.5)

    def _acceleration_weights(self, num_expr: int) -> Array:
        rate = (_REFERENCE_FPS / (self.fps or _REFERENCE_FPS)) ** 2
        sigma = np.full(6 + num_expr, _ACCELERATION["expr"])
        sigma[:3] = _ACCELERATION["rot"]
        sigma[3:5], sigma[5] = _ACCELERATION["side"], _ACCELERATION["depth"]
        if num_expr:
            sigma[-1] = _BLINK_ACCELERATION  # blinks are quick
        weights: Array = self.smoothness / (sigma * rate) ** 2
        return weights

    def _solve(
        self,
        state: LandmarkFit,
        smoothness: float,
        matrix: Array,
        vector: Array,
        cross: Array,
        shared_matrix: Array,
        shared_vector: Array,
    ) -> tuple[Array, Array]:
        """Steps of all frames (T, n) and of the shared unknowns."""
        frames, size = vector.shape
        right = np.concatenate([-vector[..., None], cross], axis=-1)
        if smoothness > 0 and frames > 2:
            weights = self._acceleration_weights(size - 6)
            right[..., 0] -= _acceleration_gradient(state, size - 6) * weights
            solved = _solve_banded(matrix, weights, right)
        else:
            solved = np.linalg.solve(matrix, right)
        own, response = solved[..., 0], solved[..., 1:]
        if not len(shared_vector):
            return own, np.zeros(0)
        reduced = shared_matrix - np.einsum("tij,tik->jk", cross, response)
        gradient = -shared_vector - np.einsum("tij,ti->j", cross, own)
        shared_step = cho_solve(cho_factor(reduced), gradient)
        return own - response @ shared_step, shared_step

    def _apply(self, state: LandmarkFit, free: _Free, steps: Array, shared: Array) -> None:
        # Long steps leave the region where the linearisation holds.
        turn = steps[:, :3]
        turn = turn * np.minimum(1.0, 0.5 / (np.linalg.norm(turn, axis=1, keepdims=True) + 1e-12))
        state.rotation = Rotation.from_rotvec(turn).as_matrix() @ state.rotation
        state.tra = state.tra + np.clip(steps[:, 3:6], -0.3, 0.3)
        if free.expression:
            state.expr = state.expr + np.clip(steps[:, 6:], -3.0, 3.0)
        num_shape = len(state.shape) if free.shape else 0
        state.shape = state.shape + (np.clip(shared[:num_shape], -3.0, 3.0) if num_shape else 0.0)
        if not free.cameras:
            return
        for c in range(len(self.cameras)):
            move = shared[num_shape + 7 * c : num_shape + 7 * (c + 1)]
            state.focal[c] *= np.exp(np.clip(move[0], -0.3, 0.3))
            rotation = Rotation.from_rotvec(np.clip(move[1:4], -0.3, 0.3)).as_matrix()
            state.extr[c, :3, :3] = rotation @ state.extr[c, :3, :3]
            state.extr[c, :3, 3] += np.clip(move[4:7], -0.3, 0.3)


def _gram(first: Array, second: Array) -> Array:
    """first^T second. By torch, whose threads the caller can limit; numpy's cannot be."""
    product = torch.from_numpy(first).T @ torch.from_numpy(second)
    result: Array = product.numpy()
    return result


def _with_pairs(values: Array, axis: int = 0) -> Array:
    """Values per landmark, followed by their differences over the lid and lip pairs."""
    first, second = LID_AND_LIP_PAIRS.T
    difference = np.take(values, first, axis) - np.take(values, second, axis)
    return np.concatenate([values, difference], axis)


def _turn_towards(directions: Array) -> Array:
    """(O, 3, 3) smallest rotations that take +z to the given directions (O, 3)."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    axis = np.stack([-unit[:, 1], unit[:, 0], np.zeros(len(unit))], axis=-1)
    sine = np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.arctan2(sine, unit[:, 2:])
    matrices: Array = Rotation.from_rotvec(axis / np.maximum(sine, 1e-12) * angle).as_matrix()
    return matrices


def _rigid_part(points: Array, basis: Array) -> Array:
    """Penalty matrix (K, K) on the rotation and translation that coefficients cause.

    The best-fitting rigid motion of the displacement field of every basis vector is found by least
    squares; its size counts in units of a degree and two millimetres.
    """
    centered = points - points.mean(axis=0)
    motion = np.zeros((len(points), 3, 6))
    # w x p as a matrix acting on w.
    for axis in range(3):
        unit = np.zeros(3)
        unit[axis] = 1.0
        motion[:, :, axis] = np.cross(unit, centered)
        motion[:, axis, 3 + axis] = 1.0
    solution, *_ = np.linalg.lstsq(
        motion.reshape(-1, 6), basis.reshape(-1, basis.shape[-1]), rcond=None
    )
    solution[:3] /= _RIGID_ANGLE
    solution[3:] /= _RIGID_SHIFT_M
    penalty: Array = solution.T @ solution
    return penalty


def _acceleration_gradient(state: LandmarkFit, num_expr: int) -> Array:
    """(T, n): D^T D of the current parameters, D the second difference over frames."""
    frames = len(state.rotation)
    relative = state.rotation[1:] @ state.rotation[:-1].transpose(0, 2, 1)
    velocity = Rotation.from_matrix(relative).as_rotvec()
    acceleration = np.zeros((frames - 2, 6 + num_expr))
    acceleration[:, :3] = np.diff(velocity, axis=0)
    acceleration[:, 3:6] = np.diff(state.tra, n=2, axis=0)
    if num_expr:
        acceleration[:, 6:] = np.diff(state.expr, n=2, axis=0)
    gradient = np.zeros((frames, 6 + num_expr))
    for place, factor in enumerate((1.0, -2.0, 1.0)):
        gradient[place : place + frames - 2] += factor * acceleration
    return gradient


def _solve_banded(matrix: Array, weights: Array, right: Array) -> Array:
    """Solves (blockdiag(matrix) + D^T D x diag(weights)) x = right for all frames at once."""
    frames, size, columns = right.shape
    stencil = np.zeros((frames, 3))  # diagonals 0, 1, 2 of D^T D
    for place in range(frames - 2):
        for i, a in enumerate((1.0, -2.0, 1.0)):
            for j in range(i, 3):
                stencil[place + i, j - i] += a * (1.0, -2.0, 1.0)[j]
    total, band = frames * size, 2 * size
    lower = np.zeros((band + 1, total))
    index = np.arange(size)
    for offset in range(size):
        values = np.zeros((frames, size))
        column = index[: size - offset]
        values[:, : size - offset] = matrix[:, column + offset, column]
        lower[offset] += values.reshape(-1)
    for distance in range(3):
        lower[distance * size] += (stencil[:, distance, None] * weights).reshape(-1)
    solved = solveh_banded(
        lower, right.reshape(total, columns), lower=True, overwrite_ab=True, check_finite=False
    )
    result: Array = solved.reshape(frames, size, columns)
    return result


def with_eyes(fit: LandmarkFit, eye_rot: Array) -> LandmarkFit:
    """The fit with another eye rotation."""
    return replace(fit, eye_rot=eye_rot)
