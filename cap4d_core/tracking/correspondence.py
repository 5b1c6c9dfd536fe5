"""Where the landmarks lie on the surface of a head model.

The landmark network is shown renderings of the head model's template from many sides; the surface
points that appear under its landmarks, averaged over the views that see them well, are the
registration of the network's face mesh to the model. This needs no hand-made table, so it serves
any head model in FLAME's format. How far the views disagree tells how well a landmark is defined on
the surface.

Conventions: head space, metres (see cap4d_core.flame.model). Vertices 3931.. are the eyeballs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import binary_fill_holes, distance_transform_edt
from scipy.spatial import cKDTree

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import read_npz, require_file, sha256_file, take_array, write_npz
from cap4d_core.files.images import write_image
from cap4d_core.flame.model import MODEL_FILE, HeadModel
from cap4d_core.geometry.mesh_rasterizer import rasterize, screen_to_ndc
from cap4d_core.tracking.detector import FaceDetector
from cap4d_core.tracking.landmark_topology import CONTOURS, NUM_MESH_POINTS
from cap4d_core.tracking.landmarks import (
    LandmarkNetwork,
    region_of_detection,
    region_of_landmarks,
)

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

NUM_SKIN_VERTICES = 3931
EYEBALLS = (slice(4477, 5023), slice(3931, 4477))  # left and right of the picture
_VERSION = 10
_PICTURE_SIDE = 512
_FOCAL = 3.0  # of the picture side
_DISTANCE_M = 1.25
# Views (yaw, pitch) in degrees: symmetric, so that the result is as symmetric as the head.
_VIEWS = tuple((yaw, pitch) for pitch in (-12, 0, 12) for yaw in (-45, -22, 0, 22, 45))
# Views whose systematic errors are measured.
BIAS_YAW_DEG = (-70.0, -50.0, -32.0, -15.0, 0.0, 15.0, 32.0, 50.0, 70.0)
_BIAS_PITCH_DEG = (-22.0, 0.0, 22.0)
_LIGHT = np.array([0.0, 0.45, 0.9])
_SKIN, _WHITE = (0.85, 0.62, 0.52), (0.93, 0.92, 0.90)
_MOUTH = (0.20, 0.07, 0.07)
_IRIS, _PUPIL = (0.30, 0.20, 0.12), (0.03, 0.03, 0.03)
# Surfaces seen at a flatter angle than this (cosine) do not say where a landmark is.
_MIN_FACING = 0.25
# Below this many usable views of this share of landmarks the head shows no face.
_MIN_VIEWS = 3
# A surface point further than this from the network's own three-dimensional mesh is a wrong one.
_MAX_DISAGREEMENT_M = 0.02
# Landmarks whose surface points scatter more are placed by their neighbours.
_MAX_SPREAD_M = 0.006
# Inner lips closer than this, relative to the width of the mouth, are parted by turning the jaw.
_OPEN_LIPS, _JAW_ANGLE, _JAW_JOINT = 0.12, np.deg2rad(12.0), 2
# Larger shifts than this show a network that is lost rather than one that is a little off.
_MAX_BIAS_M = 0.005
# Eyeballs this far behind the lids are misplaced; where they belong instead.
_SUNKEN_M, _LID_THICKNESS_M = 0.008, 0.002


@dataclass(frozen=True)
class Correspondence:
    """Landmarks on the surface of a head model.

    faces (468,) index into the model's faces; barycentrics (468, 3); spread_m (468,): how far the
    views disagree; points (468, 3): place on the template; picture: (H, W, 3) that shows it.
    bias (Y, 468, 2): in metres across the line of sight (x right, y up when the head is upright),
    where the network saw each landmark beside its place on the surface, for every yaw of
    BIAS_YAW_DEG, averaged over pitch. It is what the network does wrong on turned heads, and where
    it puts the landmarks of the hidden side.
    """

    faces: NDArray[np.int64]
    barycentrics: Array
    spread_m: Array
    points: Array
    bias: Array
    picture: NDArray[np.uint8]

    def vertices(self, model_faces: NDArray[np.int64]) -> NDArray[np.int64]:
        """(468, 3) vertex indices that `barycentrics` weight."""
        return model_faces[self.faces]


def load_or_compute(
    head_model_dir: str | Path, cache: str | Path, device: str | torch.device = "cpu"
) -> Correspondence:
    """The correspondence of a head model, from a cache file when that belongs to this model.

    Args:
        head_model_dir: folder written by `prepare_head_model`.
        cache: .npz to read or write; a picture is written beside it (.png).
        device: where the networks run.
    """
    head_model_dir, cache = Path(head_model_dir), Path(cache)
    digest = sha256_file(
        require_file(head_model_dir / MODEL_FILE, "a head model made by prepare_head_model")
    )
    if cache.is_file():
        found = _read(cache, digest)
        if found is not None:
            return found
    model = HeadModel.load(head_model_dir, mouth=False)
    result = compute_correspondence(
        model, FaceDetector(device), LandmarkNetwork(device), head_model_dir
    )
    write_npz(
        cache,
        {
            "model_sha256": np.array(digest),
            "version": np.int64(_VERSION),
            "faces": result.faces,
            "barycentrics": result.barycentrics,
            "spread_m": result.spread_m,
            "points": result.points,
            "bias": result.bias,
            "picture": result.picture,
        },
    )
    write_image(cache.with_suffix(".png"), result.picture)
    return result


def _read(path: Path, digest: str) -> Correspondence | None:
    """Content of a cache file; None when it belongs to another model or cannot be read."""
    try:
        arrays = read_npz(path, "landmarks on the head model")
        if str(arrays.get("model_sha256")) != digest or int(arrays.get("version", -1)) != _VERSION:
            return None
        points = NUM_MESH_POINTS
        return Correspondence(
            take_array(arrays, path, "faces", (points,), np.int64),
            take_array(arrays, path, "barycentrics", (points, 3), np.float64),
            take_array(arrays, path, "spread_m", (points,), np.float64),
            take_array(arrays, path, "points", (points, 3), np.float64),
            take_array(arrays, path, "bias", (len(BIAS_YAW_DEG), points, 2), np.float64),
            take_array(arrays, path, "picture", (None, None, 3), np.uint8),
        )
    except InputFileError as error:
        logger.warning("%s; computed again", error)
        return None


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
    if _lip_gap(_render(vertices, faces, _paint(vertices), 0, 0), detector, network) < _OPEN_LIPS:
        # On closed lips the landmarks of upper and lower lip would be one and the same place.
        vertices = open_jaw(model, vertices, _JAW_ANGLE)
    albedo = _paint(vertices)
    hits, weights, shapes = [], [], []
    picture = np.full((8, 8, 3), 255, np.uint8)
    for yaw, pitch in _VIEWS:
        view = _render(vertices, faces, albedo, yaw, pitch)
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
    index, barycentrics, points = closest_on_surface(mean, vertices, faces)
    bias = _measure_bias(vertices, faces, albedo, points, network)
    return Correspondence(index, barycentrics, spread, points, bias, picture)


def _measure_bias(
    vertices: Array,
    faces: NDArray[np.int64],
    albedo: Array,
    points: Array,
    network: LandmarkNetwork,
) -> Array:
    """(Y, 468, 2) metres; yaws at which the network is lost take the next one's values."""
    bias = np.full((len(BIAS_YAW_DEG), len(points), 2), np.nan)
    for i, yaw in enumerate(BIAS_YAW_DEG):
        seen = []
        for pitch in _BIAS_PITCH_DEG:
            view = _render(vertices, faces, albedo, yaw, pitch)
            expected = view.project(points)
            region = region_of_landmarks(np.pad(expected, ((0, 10), (0, 0))))
            result = network.predict(view.image, region)
            offset = result.points[:NUM_MESH_POINTS, :2] - expected[:, :2]
            lost = np.median(np.linalg.norm(offset, axis=1)) > 0.12 * region.side
            if result.score > 0.5 and not lost:
                metres = offset * expected[:, 2:] / (_FOCAL * _PICTURE_SIDE)
                seen.append(metres * [1.0, -1.0])
        if seen:
            mean = np.mean(seen, axis=0)
            size = np.linalg.norm(mean, axis=-1, keepdims=True)
            bias[i] = mean * np.minimum(1.0, _MAX_BIAS_M / np.maximum(size, 1e-9))
    known = np.flatnonzero(np.isfinite(bias[:, 0, 0]))
    if not len(known):
        return np.zeros_like(bias)
    nearest = known[np.abs(known[None] - np.arange(len(bias))[:, None]).argmin(1)]
    return bias[nearest]


def template_vertices(model: HeadModel) -> Array:
    """(V, 3) vertices of the mean head before pose correctives.

    The constant correctives of a posed head can part its lips and close its lids, the template's
    neutral face cannot be mistaken. Places on the surface are the same.
    """
    with torch.no_grad():
        vertices: Array = model.neutral(torch.zeros(model.num_shape)).double().numpy()
    return vertices


def open_jaw(model: HeadModel, vertices: Array, angle: float) -> Array:
    """Turns the jaw of a template about its joint, by skinning alone."""
    joint = model.joint_template.double().numpy().reshape(-1, 3)[_JAW_JOINT]
    weight = model.skinning_weights[_JAW_JOINT].double().numpy()[:, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    moved = (vertices - joint) @ turn.T + joint
    result: Array = vertices + weight * (moved - vertices)
    return result


def _lip_gap(view: _View, detector: FaceDetector, network: LandmarkNetwork) -> float:
    """Distance between the inner lips relative to the mouth's width; 0 when no face is seen."""
    found = detector.detect(view.image)
    if not found:
        return 0.0
    points = network.predict(view.image, region_of_detection(found[0])).points[:, :2]
    width = np.linalg.norm(points[61] - points[291])
    return float(np.linalg.norm(points[13] - points[14]) / max(float(width), 1e-6))


def sunken_eyes(vertices: Array) -> Array:
    """(2, 3) shifts that bring eyeballs that lie deep behind the lids up to them, else zero.

    Templates exist whose eyes lie centimetres too deep (the public one with texture coordinates).
    Behind their lids no eye can be seen, and the direction of gaze would come out wrong.
    """
    skin = vertices[:NUM_SKIN_VERTICES]
    shifts = np.zeros((2, 3))
    for number, part in enumerate(EYEBALLS):
        ball = vertices[part]
        center, radius = eyeball_center(ball)
        across = np.linalg.norm((skin - center)[:, :2], axis=1)
        lids = skin[(across < 0.7 * radius) & (skin[:, 2] > center[2])]
        if not len(lids):
            continue
        gap = float(lids[:, 2].max() - ball[:, 2].max())
        if gap > _SUNKEN_M:
            shifts[number, 2] = gap - _LID_THICKNESS_M
    return shifts


@dataclass(frozen=True)
class _View:
    """A rendering: image, front-most skin face per pixel, barycentrics, facing, vertices."""

    image: NDArray[np.uint8]
    face_index: NDArray[np.int64]
    barycentrics: NDArray[np.float32]
    facing: Array
    vertices: Array
    rotation: Array
    center: Array

    def project(self, points: Array) -> Array:
        """Points of the head to (x, y) in pixels and depth in metres."""
        turned = (points - self.center) @ self.rotation.T
        return _to_screen(turned)


def _paint(vertices: Array) -> Array:
    """(V, 3) colours: skin, and eyes with iris and pupil, which the network needs to see."""
    colours = np.tile(np.array(_SKIN), (len(vertices), 1))
    for part in EYEBALLS:
        ball = vertices[part]
        center, radius = eyeball_center(ball)
        across = np.linalg.norm((ball - center)[:, :2], axis=1) / radius
        front = ball[:, 2] > center[2]
        paint = np.tile(np.array(_WHITE), (len(ball), 1))
        paint[front & (across < 0.48)] = _IRIS
        paint[front & (across < 0.20)] = _PUPIL
        colours[part] = paint
    return colours


def eyeball_center(ball: Array) -> tuple[Array, float]:
    """Centre and radius of an eyeball's vertices (middle of their extent in x and y)."""
    low, high = ball.min(axis=0), ball.max(axis=0)
    radius = float((high - low)[:2].max() / 2)
    center = (low + high) / 2
    # The cornea bulges to the front: measure from the back.
    center[2] = low[2] + radius
    return center, radius


def _render(
    vertices: Array, faces: NDArray[np.int64], albedo: Array, yaw: float, pitch: float
) -> _View:
    a, b = np.deg2rad(yaw), np.deg2rad(pitch)
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    center = np.mean([vertices[part].mean(axis=0) for part in EYEBALLS], axis=0)
    rotation = turn_x @ turn_y
    turned = (vertices - center) @ rotation.T
    side = _PICTURE_SIDE
    screen = torch.from_numpy(_to_screen(turned).astype(np.float32))
    fragments = rasterize(
        screen_to_ndc(screen, (side, side))[None],
        torch.from_numpy(faces),
        (side, side),
        perspective=True,
    )
    index = fragments.face_index[0].numpy()
    weights = fragments.barycentrics[0].numpy()
    corners = turned[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    smooth = np.zeros_like(turned)
    for corner in range(3):
        np.add.at(smooth, faces[:, corner], normals)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True) + 1e-20
    shade = 0.35 + 0.65 * np.clip(smooth @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    colours = albedo * shade[:, None]
    covered = np.asarray(index >= 0, np.bool_)
    image = np.full((side, side, 3), 0.55)
    # Looking through the open mouth, the network must not see a bright background.
    holes = np.asarray(binary_fill_holes(covered), np.bool_) & ~covered
    image[holes] = _MOUTH
    image[covered] = (colours[faces[index[covered]]] * weights[covered][..., None]).sum(1)
    sight = -turned + np.array([0.0, 0.0, _DISTANCE_M])
    sight /= np.linalg.norm(sight, axis=1, keepdims=True)
    cosine = (smooth * sight).sum(1)[faces].mean(1)
    skin = faces.max(axis=1) < NUM_SKIN_VERTICES
    only_skin = np.where(covered & skin[index], index, -1)
    facing = np.where(only_skin >= 0, cosine[only_skin], 0.0)
    rgb = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return _View(rgb, only_skin, weights, facing, vertices, rotation, center)


def _to_screen(turned: Array) -> Array:
    depth = _DISTANCE_M - turned[:, 2]
    focal = _FOCAL * _PICTURE_SIDE
    u = focal * turned[:, 0] / depth + _PICTURE_SIDE / 2
    v = -focal * turned[:, 1] / depth + _PICTURE_SIDE * 0.45
    return np.stack([u, v, depth], axis=-1)


def _surface_points(view: _View, landmarks: Array, faces: NDArray[np.int64]) -> tuple[Array, Array]:
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


def align_similarity(source: Array, target: Array, weights: Array) -> tuple[float, Array, Array]:
    """Weighted least-squares similarity (Umeyama 1991): target = scale R source + t.

    Args:
        source: (N, 3).
        target: (N, 3).
        weights: (N,).

    Returns:
        Scale, rotation (3, 3) and translation (3,).
    """
    share = weights / weights.sum()
    source_mean, target_mean = share @ source, share @ target
    a, b = source - source_mean, target - target_mean
    u, values, vt = np.linalg.svd((b * share[:, None]).T @ a)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((values * sign).sum() / (share @ (a * a).sum(1)))
    return scale, rotation, target_mean - scale * rotation @ source_mean


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


def closest_on_surface(
    points: Array, vertices: Array, faces: NDArray[np.int64], neighbours: int = 6
) -> tuple[NDArray[np.int64], Array, Array]:
    """Closest points on the skin of a mesh.

    Only triangles at the nearest vertices are looked at, which is exact for points near a mesh of
    well-shaped triangles.

    Returns:
        Face index (N,), barycentrics (N, 3) and the points (N, 3).
    """
    skin_faces = np.flatnonzero((faces < NUM_SKIN_VERTICES).all(1))
    around: list[list[int]] = [[] for _ in range(NUM_SKIN_VERTICES)]
    for face in skin_faces:
        for vertex in faces[face]:
            around[vertex].append(int(face))
    used = np.array([v for v in range(NUM_SKIN_VERTICES) if around[v]])
    _, nearest = cKDTree(vertices[used]).query(points, k=neighbours)
    index = np.zeros(len(points), np.int64)
    barycentrics, placed = np.zeros((len(points), 3)), np.zeros((len(points), 3))
    for number, point in enumerate(points):
        candidates = np.unique([f for v in used[nearest[number]] for f in around[v]])
        weights = _closest_barycentrics(point, vertices[faces[candidates]])
        spots = (vertices[faces[candidates]] * weights[..., None]).sum(1)
        best = int(np.linalg.norm(spots - point, axis=1).argmin())
        index[number], barycentrics[number] = candidates[best], weights[best]
        placed[number] = spots[best]
    return index, barycentrics, placed


def _closest_barycentrics(point: Array, triangles: Array) -> Array:
    """Barycentrics (F, 3) of the closest point of every triangle (F, 3, 3) to one point."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    ab, ac, ap = b - a, c - a, point - a
    d00, d01, d11 = (ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1)
    d20, d21 = (ap * ab).sum(1), (ap * ac).sum(1)
    denominator = np.maximum(d00 * d11 - d01 * d01, 1e-30)
    v = (d11 * d20 - d01 * d21) / denominator
    w = (d00 * d21 - d01 * d20) / denominator
    inside = np.stack([1 - v - w, v, w], axis=1)
    # Outside, the closest point lies on one of the three edges.
    best, best_distance = inside.copy(), np.where((inside >= 0).all(1), 0.0, np.inf)
    for first, second in ((0, 1), (1, 2), (2, 0)):
        start, edge = triangles[:, first], triangles[:, second] - triangles[:, first]
        along = ((point - start) * edge).sum(1) / np.maximum((edge * edge).sum(1), 1e-30)
        along = np.clip(along, 0.0, 1.0)
        distance = np.linalg.norm(start + along[:, None] * edge - point, axis=1)
        weights = np.zeros_like(inside)
        weights[:, first], weights[:, second] = 1 - along, along
        closer = distance < best_distance
        best[closer], best_distance[closer] = weights[closer], distance[closer]
    return best


def _draw(image: NDArray[np.uint8], landmarks: Array) -> NDArray[np.uint8]:
    import cv2

    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=2, fy=2))
    for edges in CONTOURS.values():
        for first, second in edges:
            ends = [tuple(int(v * 2) for v in landmarks[i, :2]) for i in (first, second)]
            cv2.line(canvas, ends[0], ends[1], (60, 200, 90), 1, cv2.LINE_AA)
    for x, y, _ in landmarks[:NUM_MESH_POINTS]:
        cv2.circle(canvas, (int(x * 2), int(y * 2)), 2, (40, 90, 230), -1, cv2.LINE_AA)
    return np.asarray(canvas, np.uint8)
