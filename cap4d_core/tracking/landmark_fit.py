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
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.measurements import (
    FLIP,
    Camera,
    Free,
    LandmarkFit,
    Measurements,
    Observation,
    pairs_of,
    turn_towards,
)
from cap4d_core.tracking.solver import acceleration_gradient, gram, rigid_part, solve_banded
from cap4d_core.tracking.surface import align_similarity

__all__ = ["Camera", "LandmarkFit", "LandmarkFitter", "Observation", "with_eyes"]

Array = NDArray[np.float64]

# The last coefficient is a blink by itself: lids should close by it rather than by a mixture. Eyes
# are open or closed; less than the second value rather belongs to the shape.
_BLINK_PRIOR, _BLINK_NOISE = 0.5, 0.25
# Distance of the head and its uncertainty (log), and focal length per picture side. One picture
# hardly tells them apart. The released fits, which the diffusion model learnt from, lie at 1.1 to
# 1.5 m.
_DISTANCE_M, _DISTANCE_LOG_SIGMA = 1.2, 0.1
_FOCAL, _FOCAL_LOG_SIGMA = 2.0, 1.0
# Typical accelerations at 30 frames per second: rotation (rad), translation (m; sideways, depth),
# expression (standard deviations), per frame squared.
_REFERENCE_FPS = 30.0
_ACCELERATION = {"rot": np.deg2rad(0.55), "side": 0.0018, "depth": 0.0022, "expr": 0.33}
_BLINK_ACCELERATION = 2.0
# Landmarks of one person err alike in all frames, so beyond a few frames the shape gets no surer.
_ALIKE = 2.0
# Before expressions are found, an open mouth on a closed template, or the other way round, is far
# away but no outlier: residuals lose influence gradually.
_TOLERANCES = (4.0, 4.0, 4.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
# Shape and cameras of long recordings are estimated from so many frames.
_MAX_SHARED_FRAMES = 24
# Uncertainty of the pose of further cameras before seeing anything (radians and metres).
_CAMERA_SIGMA = 1.0


class LandmarkFitter(Measurements):
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
        super().__init__(model, cameras, observations, num_frames)
        self.fps, self.smoothness = fps, smoothness
        self.rigid_shape = rigid_part(model.rest, model.shape_basis)
        self.rigid_expression = rigid_part(model.rest, model.expression_basis)

    def fit(self) -> LandmarkFit:
        """Runs all stages."""
        state = self._initial()
        if self.num_frames > _MAX_SHARED_FRAMES:
            chosen = self._spread_frames(state)
            part = self._restricted(chosen)
            shared = part._stages(part._initial(), share=True)
            state.shape, state.focal, state.extr = shared.shape, shared.focal, shared.extr
            self._rescale_depth(state)
            # They served shape and cameras; landmarks are steadier from frame to frame.
            self.outlines = [None] * len(self.outlines)
            state = self._stages(state, share=False)
        else:
            state = self._stages(state, share=True)
        state.residuals = self.residual_figures(state)
        return state

    def refine(self, state: LandmarkFit, eye_offset: Array, iterations: int = 4) -> LandmarkFit:
        """Continues with known offsets of the landmarks by the eye rotation."""
        self.offset = eye_offset
        for _ in range(iterations):
            self._step(state, Free(False, True, False), self.smoothness)
        state.residuals = self.residual_figures(state)
        return state

    def _stages(self, state: LandmarkFit, share: bool) -> LandmarkFit:
        free_cameras = len(self.cameras) > 1 and any(c.extr is None for c in self.cameras[1:])
        for _ in range(6):
            self._step(state, Free(False, False, free_cameras), 0.0)
        if share:
            for _ in range(6):
                self._step(state, Free(True, False, True), 0.0)
        for tolerance in _TOLERANCES:
            self.tolerance = tolerance
            self._step(state, Free(share, True, share), self.smoothness)
        return state

    def _restricted(self, frames: NDArray[np.int64]) -> LandmarkFitter:
        """A fitter for some of the frames, without smoothness."""
        number = {int(f): i for i, f in enumerate(frames)}
        observations = [
            Observation(number[int(f)], int(c), p, float(w), outline)
            for f, c, p, w, outline in zip(
                self.frame, self.camera, self.points, self.trust, self.outlines, strict=True
            )
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
            flip = np.diag(FLIP)
            rotation[t] = flip @ camera_rotation.T @ flip @ turn
            tra[t] = FLIP * (camera_rotation.T @ (FLIP * shift - camera_shift))
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
        points = self.points[o, : self.model.num_points] * FLIP
        scale, rotation, shift = align_similarity(self.model.rest, points, self.base_weight)
        depth = focal[self.camera[o]] / scale
        center = self.center[self.camera[o]]
        tra = np.array([(shift[0] - center[0]) / scale, (shift[1] + center[1]) / scale, -depth])
        # Seen off the optical axis, the same picture means a turned head.
        sight = np.array([tra[0], tra[1], -depth])
        sight /= np.linalg.norm(sight)
        return turn_towards(-sight[None])[0] @ rotation, tra

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
            state.tra[t] = FLIP * (camera[:3, :3].T @ (FLIP * shift - camera[:3, 3]))

    def _step(self, state: LandmarkFit, free: Free, smoothness: float) -> None:
        """One Gauss-Newton step on everything that is free."""
        model = self.model
        _, turned, camera, pixels = self.camera_points(state)
        whitening = self.whitening(state)
        residual = (pixels - self.pixels) / self.size[:, None, None]
        residual = (whitening @ residual[..., None])[..., 0]
        weight = self.weights(state, camera, residual)
        pairs = self.pair_weights(self.visibility(state, camera), self.pair_residual(pixels))
        weight = np.concatenate([weight, pairs], axis=1)
        residual = np.concatenate([residual, self.pair_residual(pixels)], axis=1)
        num_expr = state.expr.shape[1] if free.expression else 0
        num_shape = len(state.shape) if free.shape else 0
        size = 6 + num_expr
        shared_size = num_shape + (7 * len(self.cameras) if free.cameras else 0)

        frame_matrix = np.zeros((self.num_frames, size, size))
        frame_vector = np.zeros((self.num_frames, size))
        cross = np.zeros((self.num_frames, size, shared_size))
        shared_matrix = np.zeros((shared_size, shared_size))
        shared_vector = np.zeros(shared_size)
        for o, t in enumerate(self.frame):
            own, shared = self.jacobians(
                state, o, turned[o], camera[o], model.shape_basis, model.expression_basis, free
            )
            own = np.concatenate([whitening[o] @ own, pairs_of(own)])
            rows = [own.reshape(-1, size)]
            shared = np.concatenate([whitening[o] @ shared, pairs_of(shared)])
            shared_rows = [shared.reshape(len(rows[0]), shared_size)]
            row_weights = [np.repeat(weight[o], 2)]
            errors: list[Array] = [residual[o].reshape(-1)]
            outline = self.outlines[o]
            if outline is not None:
                part = self.outline_rows(state, o, outline, free)
                parts: tuple[list[Array], ...] = (rows, shared_rows, row_weights, errors)
                for rest, more in zip(parts, part, strict=True):
                    rest.append(more)
            flat, flat_shared = np.concatenate(rows), np.concatenate(shared_rows)
            influence, error = np.concatenate(row_weights), np.concatenate(errors)
            flat_weighted = flat * influence[:, None]
            frame_matrix[t] += gram(flat_weighted, flat)
            frame_vector[t] += flat_weighted.T @ error
            if not shared_size:
                continue
            cross[t] += gram(flat_weighted, flat_shared)
            by_weight = flat_shared * influence[:, None]
            shared_matrix += gram(by_weight, flat_shared)
            shared_vector += by_weight.T @ error

        self._add_priors(state, free, frame_matrix, frame_vector, shared_matrix, shared_vector)
        steps, shared_step = self._solve(
            state, smoothness, frame_matrix, frame_vector, cross, shared_matrix, shared_vector
        )
        self._apply(state, free, steps, shared_step)

    def _add_priors(
        self,
        state: LandmarkFit,
        free: Free,
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
            prior = np.tile(self._expression_prior(), (len(state.expr), 1, 1))
            blink = state.expr[:, -1]
            prior[:, -1, -1] *= _BLINK_PRIOR / (1.0 + (blink / _BLINK_NOISE) ** 2)
            frame_matrix[:, 6:, 6:] += prior
            frame_vector[:, 6:] += np.einsum("ti,tij->tj", state.expr, prior)
        num_shape = len(state.shape) if free.shape else 0
        if free.shape:
            prior = np.eye(num_shape) * (1.0 + len(self.frame) / _ALIKE) + self.rigid_shape
            shared_matrix[:num_shape, :num_shape] += prior
            shared_vector[:num_shape] += prior @ state.shape
        if not free.cameras:
            return
        for c, camera in enumerate(self.cameras):
            first = num_shape + 7 * c
            frames = self.frame[self.camera == c]
            extr = state.extr[c]
            depth = (state.tra[frames] * FLIP) @ extr[2, :3] + extr[2, 3]
            scale = float(np.median(depth)) / float(state.focal[c])
            target, sigma = self._focal_prior(c, scale)
            shared_matrix[first, first] += sigma**-2
            shared_vector[first] += (np.log(state.focal[c]) - target) / sigma**2
            fixed = c == 0 or camera.extr is not None
            pose = np.arange(first + 1, first + 7)
            shared_matrix[pose, pose] += 1e12 if fixed else _CAMERA_SIGMA**-2

    def _expression_prior(self) -> Array:
        """Precision (E, E) of the expressions, but for the blink's own."""
        mouth = self.model.mouth
        length = max(float(np.linalg.norm(mouth)), 1.0)
        # Opening and closing the mouth costs as much as one coefficient.
        free = np.outer(mouth, mouth) / length**2 * (1.0 - length**-2)
        prior: Array = np.eye(len(mouth)) - free + self.rigid_expression
        return prior

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
            right[..., 0] -= (
                acceleration_gradient(state.rotation, state.tra, state.expr[:, : size - 6])
                * weights
            )
            solved = solve_banded(matrix, weights, right)
        else:
            solved = np.linalg.solve(matrix, right)
        own, response = solved[..., 0], solved[..., 1:]
        if not len(shared_vector):
            return own, np.zeros(0)
        reduced = shared_matrix - np.einsum("tij,tik->jk", cross, response)
        gradient = -shared_vector - np.einsum("tij,ti->j", cross, own)
        shared_step = cho_solve(cho_factor(reduced), gradient)
        return own - response @ shared_step, shared_step

    def _apply(self, state: LandmarkFit, free: Free, steps: Array, shared: Array) -> None:
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


def with_eyes(fit: LandmarkFit, eye_rot: Array) -> LandmarkFit:
    """The fit with another eye rotation."""
    return replace(fit, eye_rot=eye_rot)
