"""Where the demo's camera stands and what the head does: exact fits of photos and held-out views.

Conventions: see `cap4d_core.files.tracking`. One still camera looks at a head that turns.
Directions are (yaw, pitch) in degrees of the head: positive yaw turns the face to its left (+x),
positive pitch lowers it. References cover yaw +-55, pitch +-20 but for a few holes; held-out views
look from inside the holes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.demo import expressions
from cap4d_core.demo.subject import make_subject
from cap4d_core.files.tracking import Tracking
from cap4d_core.geometry.rotations import rodrigues

Array = NDArray[np.float64]

MAX_YAW = 55.0
MAX_PITCH = 20.0
# Centres of the directions that no reference looks from, and how far references keep away
# (degrees).
HOLES = ((-36.0, 8.0), (-12.0, -11.0), (13.0, 11.0), (37.0, -8.0))
HOLE_RADIUS = 12.0
HELD_OUT_SPREAD = 0.8
DISTANCE = 1.1
# A head, cropped as the pipeline crops it, is about this tall (m), and fills this share of a frame.
_CROP_SIDE = 0.302
_CROP_SHARE = 0.8
PIVOT = np.array([0.0, 0.008, -0.030])


def _direction(yaw: Array, pitch: Array) -> Array:
    """Where a camera straight ahead stands in the frame of a head turned by yaw and pitch."""
    y, p = np.radians(yaw), np.radians(pitch)
    return np.stack([-np.sin(y), np.cos(y) * np.sin(p), np.cos(y) * np.cos(p)], -1)


def _angle(a: Array, b: Array) -> Array:
    """Degrees between unit vectors."""
    out: Array = np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))
    return out


def view_directions(fit: Tracking) -> Array:
    """Directions (T,3) towards camera 0 in the frame of each head."""
    extr = np.asarray(fit.extr[0], dtype=np.float64)
    centre = -(extr[:3, :3].T @ extr[:3, 3]) * np.array([1.0, -1.0, -1.0])
    turn = rodrigues(torch.as_tensor(np.asarray(fit.rot, dtype=np.float64))).numpy()
    d = np.einsum("tij,ti->tj", turn, centre - np.asarray(fit.tra, dtype=np.float64))
    return d / np.linalg.norm(d, axis=1, keepdims=True)


def _reference_directions(num: int) -> tuple[Array, Array]:
    """A low-discrepancy cover of all directions but the holes; the first is frontal."""
    holes = _direction(*np.array(HOLES).T)
    yaw, pitch = [0.0], [0.0]
    k = 0
    while len(yaw) < num:
        k += 1
        u, v = (0.5 + 0.7548776662466927 * k) % 1.0, (0.5 + 0.5698402909980532 * k) % 1.0
        y, p = (2 * u - 1) * MAX_YAW, (2 * v - 1) * MAX_PITCH
        d = _direction(np.array([y]), np.array([p]))
        if _angle(d, holes).min() > HOLE_RADIUS:
            yaw.append(y)
            pitch.append(p)
    return np.array(yaw), np.array(pitch)


def head_poses(yaw: Array, pitch: Array, roll: Array, shift: Array) -> tuple[Array, Array]:
    """Rotation vectors and translations of heads turned about their middle."""
    r = [
        _matrix(y, p, q)
        for y, p, q in zip(np.radians(yaw), np.radians(pitch), np.radians(roll), strict=True)
    ]
    turn = np.array(r)
    # Rotation vectors whose `rodrigues` is the wanted matrix; angles stay far from pi.
    angle = np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1))
    axis = np.stack(
        [
            turn[:, 2, 1] - turn[:, 1, 2],
            turn[:, 0, 2] - turn[:, 2, 0],
            turn[:, 1, 0] - turn[:, 0, 1],
        ],
        -1,
    )
    scale = np.where(angle > 1e-6, angle / np.maximum(2 * np.sin(angle), 1e-9), 0.5)
    rot = axis * scale[:, None]
    tra = np.array([0.0, 0.0, -DISTANCE]) + shift - np.einsum("tij,j->ti", turn, PIVOT)
    return rot, tra


def _matrix(yaw: float, pitch: float, roll: float) -> Array:
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    rz = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    out: Array = ry @ rx @ rz
    return out


def focal_length(resolution: int) -> float:
    """Focal length in pixels at which a head fills its share of a frame."""
    return _CROP_SHARE * resolution * DISTANCE / _CROP_SIDE


def make_fit(
    shape: Array,
    expr: Array,
    eye: Array,
    rot: Array,
    tra: Array,
    resolution: int,
    fps: float | None,
) -> Tracking:
    """A tracking of one still camera from per-frame arrays; neck at rest."""
    f = np.full((1, 1), focal_length(resolution), np.float32)
    c = np.full((1, 1), resolution / 2, np.float32)
    return Tracking(
        shape=shape.astype(np.float32),
        expr=expr.astype(np.float32),
        rot=rot.astype(np.float32),
        tra=tra.astype(np.float32),
        eye_rot=eye.astype(np.float32),
        neck_rot=np.zeros((len(expr), 3), np.float32),
        fx=f,
        fy=f,
        cx=c,
        cy=c,
        extr=np.eye(4, dtype=np.float32)[None],
        resolutions=np.array([[resolution, resolution]]),
        camera_order=("cam0",),
        fps=fps,
    )


def reference_fit(seed: int, num_references: int = 64, resolution: int = 160) -> Tracking:
    """The exact fit of a demo subject's reference photos."""
    rng = np.random.default_rng([seed, 11])
    yaw, pitch = _reference_directions(num_references)
    expr, eye = expressions.sample_expressions(num_references, rng)
    # Every third photo is neutral in the mouth: a face is seen at rest from many sides.
    calm = np.arange(num_references) % 3 == 0
    expr[calm, : expressions.index_of("blink_left")] *= 0.15
    expr[0], eye[0] = 0.0, 0.0
    roll = rng.uniform(-4, 4, num_references) * (np.arange(num_references) > 0)
    shift = rng.uniform(-1, 1, (num_references, 3)) * np.array([0.006, 0.006, 0.02])
    rot, tra = head_poses(yaw, pitch, roll, shift)
    return make_fit(make_subject(seed).shape, expr, eye, rot, tra, resolution, None)


def held_out_fit(seed: int, num_views: int = 16, resolution: int = 160) -> Tracking:
    """The exact fit of the held-out views: directions in the holes, own expressions."""
    rng = np.random.default_rng([seed, 12])
    holes = np.array(HOLES)[np.arange(num_views) % len(HOLES)]
    jitter = rng.uniform(-1, 1, (num_views, 2)) * HELD_OUT_SPREAD
    expr, eye = expressions.sample_expressions(num_views, rng)
    yaw, pitch = (holes + jitter).T
    rot, tra = head_poses(yaw, pitch, np.zeros(num_views), np.zeros((num_views, 3)))
    return make_fit(make_subject(seed).shape, expr, eye, rot, tra, resolution, None)
