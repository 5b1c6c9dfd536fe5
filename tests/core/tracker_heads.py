"""Landmarks of known heads, as the network would see them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.measurements import turn_towards

Array = NDArray[np.float64]

FLIP = np.array([1.0, -1.0, -1.0])
SIZE = (480, 640)


def observe(
    model: LandmarkModel,
    shape: Array,
    expr: Array,
    rot: Array,
    tra: Array,
    focal: float,
    extr: Array | None = None,
    eye_rot: Array | None = None,
) -> Array:
    """(T, 478, 3) landmarks of known heads: pixels and a depth as the network gives it."""
    extr = np.eye(4) if extr is None else extr
    rotation = Rotation.from_rotvec(rot).as_matrix()
    own = model.points(shape, expr)
    centers, pupils, _ = model.eyes(shape)
    gaze = np.zeros((len(rot), 3)) if eye_rot is None else eye_rot
    turned = Rotation.from_rotvec(gaze).as_matrix()
    irises = centers + np.einsum("tij,ej->tei", turned, pupils - centers)
    iris_points = np.repeat(irises, 5, axis=1)
    points = np.concatenate([own, iris_points], axis=1)
    world = (points @ rotation.transpose(0, 2, 1) + tra[:, None]) * FLIP
    camera = world @ extr[:3, :3].T + extr[:3, 3]
    # The fit adds the network's error of the view, so ideal observations must contain it.
    sight = (tra * FLIP @ extr[:3, :3].T + extr[:3, 3]) * FLIP
    flip = np.diag(FLIP)
    to_camera = flip @ extr[:3, :3] @ flip @ rotation
    bias = model.view_bias(turn_towards(-sight).transpose(0, 2, 1) @ to_camera)
    camera[:, :468, :2] += bias * [1.0, -1.0]
    scale = focal / camera[:, :, 2].mean(axis=1)
    pixels = camera[..., :2] / camera[..., 2:] * focal + [SIZE[1] / 2, SIZE[0] / 2]
    depth = (camera[..., 2] - camera[..., 2].mean(axis=1, keepdims=True)) * scale[:, None]
    return np.concatenate([pixels, depth[..., None]], axis=-1)
