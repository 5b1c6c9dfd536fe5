"""Registers the landmarks of the network to the surface of a head model.

The network is shown renderings of the head model's template from many sides; the surface points
that appear under its landmarks, averaged over the views that see them well, are the registration
of the network's face mesh to the model. This needs no hand-made table, so it serves any head model
in FLAME's format. How far the views disagree tells how well a landmark is defined on the surface.

Lips need an open mouth: closed, upper and lower lip are one and the same place. All else needs a
closed one, as most photos show: with the mouth open the network puts the chin higher on the skin.
So the mouth is opened (by the jaw joint) or closed (by the expressions), whatever the template has.

Further renderings tell what the network does wrong on turned heads, and where it puts the landmarks
of the hidden side. When a head is tilted, landmarks of the contour slide along it, those of the
eyes, nose and mouth stay. How the errors differ between tilts and with an open mouth is kept as
uncertainty, their mean as error.

Conventions: as in cap4d_core.tracking.template_views.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import distance_transform_edt

from cap4d_core.errors import UserError
from cap4d_core.flame.model import HeadModel
from cap4d_core.tracking.correspondence import (
    BIAS_YAW_DEG,
    Correspondence,
)
from cap4d_core.tracking.detector import FaceDetector
from cap4d_core.tracking.landmark_model import mouth_expression
from cap4d_core.tracking.landmark_topology import CONTOURS, NUM_MESH_POINTS
from cap4d_core.tracking.landmarks import (
    LandmarkNetwork,
    region_of_detection,
    region_of_landmarks,
)
from cap4d_core.tracking.surface import align_similarity, closest_on_surface
from cap4d_core.tracking.template_views import (
    EYEBALLS,
    FOCAL,
    NUM_SKIN_VERTICES,
    PICTURE_SIDE,
    TemplateView,
    open_jaw,
    paint,
    render_view,
    sunken_eyes,
    template_vertices,
)

Array = NDArray[np.float64]

# Views (yaw, pitch) in degrees: symmetric, so that the result is as symmetric as the head.
_VIEWS = tuple((yaw, pitch) for pitch in (-12, 0, 12) for yaw in (-45, -22, 0, 22, 45))
# Surfaces seen at a flatter angle than this (cosine) do not say where a landmark is.
_MIN_FACING = 0.25
# Below this many usable views of this share of landmarks the head shows no face.
_MIN_VIEWS = 3
# A surface point further than this from the network's own three-dimensional mesh is a wrong one.
_MAX_DISAGREEMENT_M = 0.02
# Landmarks whose surface points scatter more are placed by their neighbours.
_MAX_SPREAD_M = 0.006
# Inner lips closer than this, relative to the width of the mouth, are parted by turning the jaw.
_OPEN_LIPS, _JAW_ANGLE = 0.12, np.deg2rad(12.0)
# Larger shifts than this show a network that is lost rather than one that is a little off.
_MAX_BIAS_M = 0.005
_BIAS_PITCH_DEG = (-22.0, 0.0, 22.0)
# Share of pictures with an open mouth.
_OPEN_SHARE = 0.25


def compute_correspondence(
    model: HeadModel,
    detector: FaceDetector,
    network: LandmarkNetwork,
    source: str | Path = "the head model",
) -> Correspondence:
    """Registers the landmarks to a head model; see the module.

    Args:
        model: head model without the mouth parts.
        detector: finds the face in the renderings.
        network: places the landmarks.
        source: what to name in messages.

    Raises:
        UserError: no face is recognised in the renderings of the model.
    """
    faces = model.faces.numpy()
    vertices = template_vertices(model)
    for part, shift in zip(EYEBALLS, sunken_eyes(vertices), strict=True):
        vertices[part] += shift
    look = render_view(vertices, faces, paint(vertices), 0, 0)
    skin = np.flatnonzero((faces < NUM_SKIN_VERTICES).all(1))
    is_closed = _lip_gap(look, detector, network) < _OPEN_LIPS
    opened = open_jaw(model, vertices, _JAW_ANGLE) if is_closed else vertices
    placed, open_spread, _ = _place(opened, faces, detector, network, source)
    index, weights, points = closest_on_surface(placed, opened, faces, skin)
    closed = vertices if is_closed else _close_mouth(model, vertices, index, weights, points)
    placed, spread, picture = _place(closed, faces, detector, network, source)
    others, other_weights, _ = closest_on_surface(placed, closed, faces, skin)
    no_lips = np.setdiff1d(np.arange(len(index)), network.lips)
    index[no_lips], weights[no_lips] = others[no_lips], other_weights[no_lips]
    spread[network.lips] = open_spread[network.lips]

    def on(surface: Array) -> Array:
        points: Array = (surface[faces[index]] * weights[..., None]).sum(1)
        return points

    still = _errors(closed, faces, on(closed), network, _BIAS_PITCH_DEG)
    talking = _errors(opened, faces, on(opened), network, (0.0,))
    bias, scatter = _bias_and_scatter(still, talking)
    return Correspondence(index, weights, spread, on(vertices), bias, scatter, picture)


def _close_mouth(
    model: HeadModel, vertices: Array, index: NDArray[np.int64], weights: Array, points: Array
) -> Array:
    """Vertices with the likeliest expression that closes the lips; see `mouth_expression`."""
    count = model.num_expr
    basis = model.pose_basis[:count].double().numpy().reshape(count, 3, -1).transpose(2, 1, 0)
    corners = basis[model.faces.numpy()[index]]
    expression = mouth_expression(points, np.einsum("nbce,nb->nce", corners, weights))
    closed: Array = vertices + basis @ expression
    return closed


def _place(
    vertices: Array,
    faces: NDArray[np.int64],
    detector: FaceDetector,
    network: LandmarkNetwork,
    source: str | Path,
) -> tuple[Array, Array, NDArray[np.uint8]]:
    """Landmarks near a surface (N, 3), their spread (N,) and a picture of the frontal view."""
    albedo = paint(vertices)
    hits, weights, shapes = [], [], []
    picture = np.full((8, 8, 3), 255, np.uint8)
    for yaw, pitch in _VIEWS:
        view = render_view(vertices, faces, albedo, yaw, pitch)
        found = detector.detect(view.image)
        if not found:
            continue
        result = network.predict(view.image, region_of_detection(found[0]))
        if result.score < 0.5:
            continue
        place, weight = _surface_points(view, result.points[:NUM_MESH_POINTS, :2], faces)
        hits.append(place)
        weights.append(weight)
        shapes.append(result.points[:NUM_MESH_POINTS] * [1.0, -1.0, -1.0])
        if (yaw, pitch) == (0, 0):
            picture = _draw(view.image, result.points)
    if len(hits) < _MIN_VIEWS:
        raise UserError(
            f"{source}: a face is recognised in {len(hits)} of {len(_VIEWS)} renderings of this "
            "head model, so the landmarks cannot be placed on it. Is it a head in FLAME's format "
            "and axes (+y up, +z out of the face, metres)?"
        )
    place, weight = np.stack(hits), np.stack(weights)
    mean, spread = _register(place, weight, np.stack(shapes))
    return mean, spread, picture


def _errors(
    vertices: Array,
    faces: NDArray[np.int64],
    points: Array,
    network: LandmarkNetwork,
    pitches: Sequence[float],
) -> Array:
    """(Y, P, 468, 2) metres for the yaws of BIAS_YAW_DEG; NaN where the network is lost."""
    albedo = paint(vertices)
    errors = np.full((len(BIAS_YAW_DEG), len(pitches), len(points), 2), np.nan)
    for i, yaw in enumerate(BIAS_YAW_DEG):
        for j, pitch in enumerate(pitches):
            view = render_view(vertices, faces, albedo, yaw, pitch)
            expected = view.project(points)
            region = region_of_landmarks(np.pad(expected, ((0, 10), (0, 0))))
            result = network.predict(view.image, region)
            offset = result.points[:NUM_MESH_POINTS, :2] - expected[:, :2]
            lost = np.median(np.linalg.norm(offset, axis=1)) > 0.12 * region.side
            if result.score > 0.5 and not lost:
                metres = offset * expected[:, 2:] / (FOCAL * PICTURE_SIDE)
                errors[i, j] = metres * [1.0, -1.0]
    return errors


def _bias_and_scatter(still: Array, talking: Array) -> tuple[Array, Array]:
    """Mean errors (Y, 468, 2) and the covariances (Y, 468, 3) of what differs from them.

    Yaws at which the network is lost take the next one's values.

    Args:
        still: (Y, P, 468, 2) errors at several pitches with the mouth closed.
        talking: (Y, 1, 468, 2) with the mouth open.
    """
    bias, scatter = np.zeros_like(still[:, 0]), np.zeros((*still[:, 0].shape[:2], 3))
    seen = np.isfinite(still[:, :, 0, 0])
    known = np.flatnonzero(seen.any(1))
    for i in known:
        mean = still[i, seen[i]].mean(0)
        size = np.linalg.norm(mean, axis=-1, keepdims=True)
        bias[i] = mean * np.minimum(1.0, _MAX_BIAS_M / np.maximum(size, 1e-9))
        rest = still[i, seen[i]] - bias[i]
        covariance = (rest[..., [0, 0, 1]] * rest[..., [0, 1, 1]]).mean(0)
        open_rest = np.nan_to_num(talking[i, 0] - bias[i])
        covariance += _OPEN_SHARE * open_rest[..., [0, 0, 1]] * open_rest[..., [0, 1, 1]]
        scatter[i] = covariance
    if not len(known):
        return bias, scatter
    nearest = known[np.abs(known[None] - np.arange(len(bias))[:, None]).argmin(1)]
    return bias[nearest], scatter[nearest]


def _lip_gap(view: TemplateView, detector: FaceDetector, network: LandmarkNetwork) -> float:
    """Distance between the inner lips relative to the mouth's width; 0 when no face is seen."""
    found = detector.detect(view.image)
    if not found:
        return 0.0
    points = network.predict(view.image, region_of_detection(found[0])).points[:, :2]
    width = np.linalg.norm(points[61] - points[291])
    return float(np.linalg.norm(points[13] - points[14]) / max(float(width), 1e-6))


def _surface_points(
    view: TemplateView, landmarks: Array, faces: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Skin under each landmark: (468, 3) points and (468,) weights, 0 where there is none."""
    side = len(view.face_index)
    covered = view.face_index >= 0
    distance, nearest = distance_transform_edt(~covered, return_indices=True)
    columns = np.clip(landmarks[:, 0].astype(int), 0, side - 1)
    rows = np.clip(landmarks[:, 1].astype(int), 0, side - 1)
    # Landmarks on the rim of the lids or lips may fall just beside the skin.
    gap = distance[rows, columns]
    row, column = nearest[0][rows, columns], nearest[1][rows, columns]
    corners = view.vertices[faces[view.face_index[row, column]]]
    points = (corners * view.barycentrics[row, column][..., None]).sum(1)
    facing = view.facing[row, column]
    weights = np.where((facing > _MIN_FACING) & (gap < 0.02 * side), facing**2, 0.0)
    return points, weights


def _register(hits: Array, weights: Array, shapes: Array) -> tuple[Array, Array]:
    """Places the landmarks: (N, 3) points near the surface and their spread (N,).

    The network also tells depth: its three-dimensional face mesh, aligned to the surface points of
    every view and averaged, says roughly where each landmark must be. That settles which surface
    points are wrong (a landmark beside the cheek may lie over an ear), and a smooth deformation
    of that mesh towards the good ones places the rest.

    Args:
        hits: (S, N, 3) surface points of every view.
        weights: (S, N), 0 where a view does not see the surface well.
        shapes: (S, N, 3) face mesh of the network, any scale and rotation.
    """
    mean, spread = _robust_mean(hits, weights)
    for _ in range(3):
        trust = 1.0 / (spread + 1e-3) ** 2
        aligned = []
        for shape in shapes:
            scale, rotation, offset = align_similarity(shape, mean, trust)
            aligned.append(scale * shape @ rotation.T + offset)
        canonical = np.mean(aligned, axis=0)
        near = np.linalg.norm(hits - canonical, axis=-1) < _MAX_DISAGREEMENT_M
        mean, spread = _robust_mean(hits, weights * near)
        support = (weights * near).sum(0)
        good = (support > 0.15 * len(hits)) & (spread < _MAX_SPREAD_M)
        displacement = RBFInterpolator(
            canonical[good],
            (mean - canonical)[good],
            smoothing=1e-3,
            kernel="linear",
            neighbors=60,
        )
        deformed = canonical + displacement(canonical)
        # Where the views agree their own word counts, elsewhere that of the neighbourhood.
        mean = np.where(good[:, None], mean, deformed)
        spread = np.where(good, spread, _MAX_SPREAD_M)
    return mean, spread


def _robust_mean(points: Array, weights: Array) -> tuple[Array, Array]:
    """Mean over views of (S, N, 3) points, and spread (N,), with outlying views played down."""
    weights = weights + 1e-6
    mean = (points * weights[..., None]).sum(0) / weights.sum(0)[:, None]
    for _ in range(5):
        distance = np.linalg.norm(points - mean, axis=-1)
        typical = np.sqrt((weights * distance**2).sum(0) / weights.sum(0)) + 1e-6
        robust = weights / (1.0 + (distance / typical) ** 2)
        mean = (points * robust[..., None]).sum(0) / robust.sum(0)[:, None]
    distance = np.linalg.norm(points - mean, axis=-1)
    spread = np.sqrt((robust * distance**2).sum(0) / robust.sum(0))
    return mean, spread


def _draw(image: NDArray[np.uint8], landmarks: Array) -> NDArray[np.uint8]:
    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=2, fy=2))
    for edges in CONTOURS.values():
        for first, second in edges:
            ends = [tuple(int(v * 2) for v in landmarks[i, :2]) for i in (first, second)]
            cv2.line(canvas, ends[0], ends[1], (60, 200, 90), 1, cv2.LINE_AA)
    for x, y, _ in landmarks[:NUM_MESH_POINTS]:
        cv2.circle(canvas, (int(x * 2), int(y * 2)), 2, (40, 90, 230), -1, cv2.LINE_AA)
    return np.asarray(canvas, np.uint8)
