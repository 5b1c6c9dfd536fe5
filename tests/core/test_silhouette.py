"""The outline of the head in the matte."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.flame.model import HeadModel
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.landmark_fit import Camera, LandmarkFitter, Observation
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.measurements import Free
from cap4d_core.tracking.silhouette import DistanceField, distance_field
from tests.core.tracker_heads import FLIP, SIZE, observe
from tests.core.tracker_pictures import correspondence_file, demo_head_folder

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def model() -> LandmarkModel:
    placed = load_or_compute(demo_head_folder(), correspondence_file())
    return LandmarkModel(HeadModel.load(demo_head_folder(), mouth=False), placed)


def _disc_field(center: tuple[float, float], radius: float) -> DistanceField:
    """Outline of a person that is a disc, around a face of 100 pixels."""
    y, x = np.mgrid[:300, :400] + 0.5
    matte = 255 * (np.hypot(x - center[0], y - center[1]) < radius)
    low, high = np.array(center) - 50, np.array(center) + 50
    return distance_field(matte.astype(np.uint8), low, high)


def test_distance_field_has_its_zero_at_the_edge() -> None:
    field = _disc_field((180.0, 150.0), 90.0)
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    for radius in (70.0, 90.0, 105.0):
        distance, gradient, known = field.sample([180.0, 150.0] + radius * rays)
        assert known.all() and np.abs(distance - (radius - 90.0)).max() < 1.0
        assert ((gradient * rays).sum(1) > 0.9).all()
    # Beyond the field nothing is known; without an edge nothing is outside.
    assert not field.sample(np.array([[390.0, 10.0]]))[2].any()
    full = distance_field(np.full((50, 60), 255, np.uint8), np.zeros(2), np.full(2, 40.0))
    assert (full.sample(np.array([[20.0, 20.0]]))[0] < 0).all()


def test_outline_rows_are_derivatives(model: LandmarkModel) -> None:
    tra, rot = np.array([[0.0, 0.0, -1.2]]), np.array([[0.1, 0.6, 0.0]])
    seen = observe(model, np.zeros(150), np.zeros((1, 65)), rot, tra, 900.0)
    center = seen[0, :468, :2].mean(axis=0)
    matte = np.zeros(SIZE, np.uint8)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    matte[np.hypot(x - center[0] - 6, y - center[1] + 20) < 70] = 255  # cuts into the head
    face = seen[0, :468, :2]
    outline = distance_field(matte, face.min(axis=0), face.max(axis=0))
    fitter = LandmarkFitter(model, [Camera(SIZE, 900.0)], [Observation(0, 0, seen[0])], 1)
    state = fitter.fit()
    free = Free(True, True, True)
    own, _, weights, distance = fitter.outline_rows(state, 0, outline, free)
    assert len(distance) > 30 and (weights > 0).all()
    step = 1e-4

    def moved(k: int, sign: float) -> Array:
        """Distances of the same vertices after a small change of one unknown of the frame."""
        changed = replace(state, tra=state.tra.copy(), expr=state.expr.copy())
        if k < 6:
            changed.tra[0, k - 3] += sign * step
        else:
            changed.expr[0, k - 6] += sign * 100 * step
        return fitter.outline_rows(changed, 0, outline, free)[3]

    compared = 0
    for k, size in ((3, step), (4, step), (8, 100 * step)):
        plus, minus = moved(k, 1.0), moved(k, -1.0)
        if len(plus) == len(minus) == len(distance):
            slope = (plus - minus) / 2 / size
            # The field is piecewise linear: single vertices may sit on a kink.
            close = np.abs(slope - own[:, k]) < 0.1 * np.abs(own[:, k]).max() + 1e-6
            assert close.mean() > 0.8
            compared += 1
    assert compared >= 2  # in the others a vertex changes sides


def test_head_is_pulled_into_the_person(model: LandmarkModel) -> None:
    tra, rot = np.array([[0.0, 0.0, -1.2]]), np.array([[0.0, 0.7, 0.0]])
    seen = observe(model, np.zeros(150), np.zeros((1, 65)), rot, tra, 900.0)
    head = model.outline
    turned = head.rest @ Rotation.from_rotvec(rot[0]).as_matrix().T
    camera = (turned + tra[0]) * FLIP
    pixels = camera[:, :2] / camera[:, 2:] * 900.0 + [SIZE[1] / 2, SIZE[0] / 2]
    hull = cv2.convexHull(pixels.astype(np.float32)).astype(np.int32)
    matte = np.asarray(cv2.fillConvexPoly(np.zeros(SIZE, np.uint8), hull, 255), np.uint8)
    # Landmarks that are off by five degrees of turn; the outline is not.
    wrong = observe(
        model, np.zeros(150), np.zeros((1, 65)), rot + np.array([0, 0.09, 0]), tra, 900.0
    )[0]
    low, high = wrong[:468, :2].min(axis=0), wrong[:468, :2].max(axis=0)
    errors = []
    for outline in (None, distance_field(matte, low, high)):
        observation = Observation(0, 0, wrong, outline=outline)
        fitter = LandmarkFitter(model, [Camera(SIZE, 900.0)], [observation], 1)
        found = Rotation.from_matrix(fitter.fit().rotation[0])
        errors.append(np.degrees((found * Rotation.from_rotvec(rot[0]).inv()).magnitude()))
    assert errors[1] < 0.9 * errors[0]
    assert (np.abs(seen[0] - wrong) > 0).any()
