"""Registration to the head model, landmark fit, gaze: recovery of known heads."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.flame.model import HeadModel
from cap4d_core.tracking.correspondence import Correspondence, load_or_compute
from cap4d_core.tracking.eyeball import eye_rotation
from cap4d_core.tracking.gaze import RESPONSE, TOWARDS_CAMERA, estimate_gaze
from cap4d_core.tracking.landmark_fit import Camera, LandmarkFit, LandmarkFitter, Observation
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.landmark_topology import MIRRORED
from cap4d_core.tracking.selection import Candidate, select_references
from cap4d_core.tracking.solver import acceleration_gradient, rigid_part, solve_banded
from cap4d_core.tracking.surface import align_similarity, closest_on_surface
from cap4d_core.tracking.template_views import EYEBALLS, sunken_eyes, template_vertices
from tests.core.tracker_heads import SIZE, observe
from tests.core.tracker_pictures import correspondence_file, demo_head_folder

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def placed() -> Correspondence:
    return load_or_compute(demo_head_folder(), correspondence_file())


@pytest.fixture(scope="module")
def model(placed: Correspondence) -> LandmarkModel:
    return LandmarkModel(HeadModel.load(demo_head_folder(), mouth=False), placed)


def test_landmarks_lie_on_the_right_features(placed: Correspondence) -> None:
    points = placed.points
    assert placed.barycentrics.min() > -1e-9
    assert np.allclose(placed.barycentrics.sum(1), 1)
    # Mirror images of each other: the demo head is symmetric to about a millimetre.
    mirrored = points[MIRRORED[:468]] * [-1, 1, 1]
    assert np.median(np.linalg.norm(points - mirrored, axis=1)) < 0.003
    assert points[1, 2] > np.percentile(points[:, 2], 97)  # the nose stands out
    assert points[10, 1] > points[9, 1] > points[1, 1] > points[13, 1] > points[152, 1]
    # Upper and lower lip are different places even where the template's mouth is closed.
    template = template_vertices(HeadModel.load(demo_head_folder(), mouth=False))
    assert points[13, 1] - points[14, 1] > 0.001
    eyes = [template[part].mean(axis=0) for part in EYEBALLS]
    for eye, (outer, inner) in zip(eyes, ((33, 133), (263, 362)), strict=True):
        # Landmarks 33.. are at the left of the picture, where x is negative.
        assert np.linalg.norm((points[[outer, inner]].mean(0) - eye)[:2]) < 0.006


def test_landmarks_of_the_contour_slide_when_the_head_is_tilted(placed: Correspondence) -> None:
    frontal = placed.scatter[len(placed.scatter) // 2]
    beside_the_ears, eyes = frontal[[127, 234, 356, 454]], frontal[[33, 133, 263, 362]]
    # Up and down, several millimetres; eyes stay. Sideways nothing happens.
    assert beside_the_ears[:, 2].min() > 10 * eyes[:, 2].max()
    assert np.sqrt(beside_the_ears[:, 2]).min() > 0.004
    assert (beside_the_ears[:, 0] < 0.3 * beside_the_ears[:, 2]).all()


def test_sliding_landmarks_do_not_tilt_the_head(
    model: LandmarkModel, placed: Correspondence, monkeypatch: pytest.MonkeyPatch
) -> None:
    rot, tra = np.array([[-0.3, 0.0, 0.0]]), np.array([[0.0, 0.0, -1.2]])
    seen = observe(model, np.zeros(150), np.zeros((1, 65)), rot, tra, 900.0)
    middle = len(placed.scatter) // 2
    # Looking up, the contour's landmarks stay higher in the picture than their skin does.
    seen[0, :468, 1] -= 900.0 / 1.2 * np.sqrt(placed.scatter[middle, :, 2])

    def error() -> float:
        fitter = LandmarkFitter(model, [Camera(SIZE, 900.0)], [Observation(0, 0, seen[0])], 1)
        turn = Rotation.from_matrix(fitter.fit().rotation).inv() * Rotation.from_rotvec(rot)
        return float(np.degrees(turn.magnitude()).max())

    aware = error()
    monkeypatch.setattr(
        model, "view_scatter", lambda rotation: np.zeros((len(rotation), 468, 2, 2))
    )
    assert aware < 0.7 * error()


def test_correspondence_is_cached_for_its_model_only(
    placed: Correspondence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("cap4d_core.tracking.registration.compute_correspondence", refuse)
    again = load_or_compute(demo_head_folder(), correspondence_file())
    assert np.array_equal(again.faces, placed.faces)
    monkeypatch.setattr("cap4d_core.tracking.correspondence.sha256_file", lambda _: "another")
    with pytest.raises(AssertionError, match="computed again"):
        load_or_compute(demo_head_folder(), correspondence_file())


def test_closest_points_on_the_surface() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0.0]])
    faces = np.array([[0, 1, 2], [1, 3, 2]])
    queries = np.array([[0.2, 0.3, 0.7], [-1, 0.5, 0], [2, 2, 1], [0.8, 0.8, -0.1]])
    _, weights, points = closest_on_surface(queries, vertices, faces, neighbours=4)
    assert np.allclose(points, [[0.2, 0.3, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.8, 0.8, 0.0]])
    assert np.allclose(weights.sum(1), 1)


def test_similarity_is_recovered_without_reflection() -> None:
    rng = np.random.default_rng(0)
    source = rng.normal(size=(20, 3))
    rotation = Rotation.from_rotvec([0.3, -2.0, 0.5]).as_matrix()
    scale, found, shift = align_similarity(source, 2.5 * source @ rotation.T + 1, np.ones(20))
    assert scale == pytest.approx(2.5)
    assert np.allclose(found, rotation) and np.allclose(shift, 1)
    _, mirror, _ = align_similarity(source, source * [-1, 1, 1], np.ones(20))
    assert np.linalg.det(mirror) == pytest.approx(1)


def test_sunken_eyes_are_noticed(model: LandmarkModel) -> None:
    vertices = template_vertices(model.model)
    assert np.array_equal(sunken_eyes(vertices), np.zeros((2, 3)))
    for part in EYEBALLS:
        vertices[part, 2] -= 0.02
    # Found up to how deep the eyes lie behind the lids of this head in the first place.
    assert np.abs(sunken_eyes(vertices)[:, 2] - 0.02).max() < 0.006


def _heads(frames: int, seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    expr = np.zeros((frames, 65))
    expr[:, :5] = rng.normal(size=(frames, 5))
    rot = rng.uniform([-0.25, -0.7, -0.3], [0.25, 0.7, 0.3], (frames, 3))
    tra = rng.uniform([-0.1, -0.1, -1.3], [0.1, 0.1, -1.0], (frames, 3))
    return expr, rot, tra


def test_known_heads_are_recovered(model: LandmarkModel) -> None:
    expr, rot, tra = _heads(6, 0)
    shape = np.zeros(150)
    shape[:8] = np.random.default_rng(1).normal(size=8)
    focal = 900.0
    seen = observe(model, shape, expr, rot, tra, focal)
    fitter = LandmarkFitter(
        model, [Camera(SIZE, focal)], [Observation(t, 0, p) for t, p in enumerate(seen)], 6
    )
    fit = fitter.fit()
    error = Rotation.from_matrix(fit.rotation).inv() * Rotation.from_rotvec(rot)
    # Priors pull shape and expression to zero, and what they leave turns the head a little.
    assert np.degrees(error.magnitude()).max() < 2.5
    assert np.median(np.linalg.norm(fit.tra - tra, axis=1)) < 0.04
    assert fit.residuals.max() < 0.01
    start = fitter._initial()
    before = Rotation.from_matrix(start.rotation).inv() * Rotation.from_rotvec(rot)
    assert error.magnitude().mean() < 0.7 * before.magnitude().mean()


def test_outliers_and_hidden_sides_do_not_turn_the_head(model: LandmarkModel) -> None:
    rot, tra = np.array([[0.05, 0.9, 0.0]]), np.array([[0.0, 0.0, -1.2]])
    seen = observe(model, np.zeros(150), np.zeros((1, 65)), rot, tra, 900.0)
    size = np.ptp(seen[0, :468, 0])
    wrong = np.random.default_rng(0).choice(468, 40, replace=False)
    seen[0, wrong, :2] += 0.25 * size
    fitter = LandmarkFitter(model, [Camera(SIZE, 900.0)], [Observation(0, 0, seen[0])], 1)
    error = Rotation.from_matrix(fitter.fit().rotation).inv() * Rotation.from_rotvec(rot)
    assert np.degrees(error.magnitude()).max() < 3.0


def test_pose_and_expression_survive_a_shift_off_the_axis(model: LandmarkModel) -> None:
    # A head beside the optical axis looks turned; the fit must tell both apart.
    rot = np.array([[0.0, 0.3, 0.0]] * 2)
    tra = np.array([[-0.25, 0.0, -1.2], [0.25, 0.1, -1.2]])
    seen = observe(model, np.zeros(150), np.zeros((2, 65)), rot, tra, 700.0)
    fit = LandmarkFitter(
        model, [Camera(SIZE, 700.0)], [Observation(t, 0, p) for t, p in enumerate(seen)], 2
    ).fit()
    error = Rotation.from_matrix(fit.rotation).inv() * Rotation.from_rotvec(rot)
    assert np.degrees(error.magnitude()).max() < 1.0
    assert np.abs(fit.tra - tra).max() < 0.02


@pytest.mark.parametrize("known", [True, False])
def test_second_camera_is_used_or_found(model: LandmarkModel, known: bool) -> None:
    expr, rot, tra = _heads(4, 2)
    rot[:, 1] *= 0.3
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec([0.0, 0.5, 0.0]).as_matrix()
    pivot = np.array([0.0, 0.0, 1.2])
    turn[:3, 3] = pivot - turn[:3, :3] @ pivot
    observations = [
        Observation(t, c, points)
        for c, extr in enumerate((np.eye(4), turn))
        for t, points in enumerate(observe(model, np.zeros(150), expr, rot, tra, 900.0, extr))
    ]
    cameras = [Camera(SIZE, 900.0), Camera(SIZE, 900.0, extr=turn if known else None)]
    fit = LandmarkFitter(model, cameras, observations, 4).fit()
    error = Rotation.from_matrix(fit.extr[1, :3, :3].T @ turn[:3, :3]).magnitude()
    assert np.degrees(error) < (1e-3 if known else 2.0)
    assert np.linalg.norm(fit.extr[1, :3, 3] - turn[:3, 3]) < (1e-6 if known else 0.06)
    assert np.array_equal(fit.extr[0], np.eye(4)) or np.allclose(fit.extr[0], np.eye(4), atol=1e-6)


@pytest.mark.slow
def test_smoothness_removes_jitter_and_keeps_motion(model: LandmarkModel) -> None:
    frames = 40
    time = np.arange(frames) / 30.0
    rot = np.stack([0.1 * np.sin(5 * time), 0.4 * np.sin(3 * time), 0 * time], axis=1)
    tra = np.tile([0.0, 0.0, -1.2], (frames, 1))
    seen = observe(model, np.zeros(150), np.zeros((frames, 65)), rot, tra, 900.0)
    rng = np.random.default_rng(0)
    # Landmarks of a frame err together: shift, turn and scale, a third of a percent of the face.
    size = np.ptp(seen[:, :468, 0], axis=1).mean()
    noise = rng.normal(size=(frames, 1, 2)) * 0.003 * size
    noise = noise + rng.normal(size=(frames, 478, 2)) * 0.006 * size
    seen[..., :2] += noise
    observations = [Observation(t, 0, p) for t, p in enumerate(seen)]

    def accelerations(smoothness: float) -> tuple[float, float, float]:
        fit = LandmarkFitter(
            model, [Camera(SIZE, 900.0)], observations, frames, 30.0, smoothness
        ).fit()
        error = Rotation.from_matrix(fit.rotation).inv() * Rotation.from_rotvec(rot)
        turn = np.diff(fit.rot, n=2, axis=0)
        return (
            float(np.median(np.linalg.norm(turn, axis=1))),
            float(np.degrees(error.magnitude()).mean()),
            float(fit.residuals.mean()),
        )

    rough, smooth = accelerations(0.0), accelerations(1.0)
    assert smooth[0] < 0.5 * rough[0]
    assert smooth[1] < rough[1] + 0.05  # closer to the truth, not just smoother
    assert smooth[2] < 1.1 * rough[2]


def test_gaze_is_recovered_from_what_the_network_makes_of_it(model: LandmarkModel) -> None:
    gaze = np.array([[0, 0], [0.3, 0], [-0.25, 0], [0.1, 0.15]])
    rot = np.array([[0, 0, 0], [0, -0.4, 0], [0.1, 0.3, 0.1], [0, 0, 0.2]])
    tra = np.tile([0.05, 0.0, -1.2], (4, 1))

    def fitted(drawn: Array) -> tuple[LandmarkFitter, LandmarkFit]:
        eyes = eye_rotation(drawn)
        seen = observe(model, np.zeros(150), np.zeros((4, 65)), rot, tra, 900.0, eye_rot=eyes)
        observations = [Observation(t, 0, p) for t, p in enumerate(seen)]
        fitter = LandmarkFitter(model, [Camera(SIZE, 900.0)], observations, 4)
        return fitter, fitter.fit()

    fitter, fit = fitted(np.zeros((4, 2)))
    fitter, fit = fitted(RESPONSE * gaze - TOWARDS_CAMERA * fitter.sight_angles(fit))
    found = estimate_gaze(fitter, fit, smooth=False).eye_rot
    # Two eyes with errors of 4 degrees against a prior of 20; vertically of 7 against 10.
    expected = Rotation.from_rotvec(eye_rotation(gaze * [0.96, 0.8]))
    error = np.degrees((Rotation.from_rotvec(found).inv() * expected).magnitude())
    assert error.max() < 5.0, error


def test_banded_solution_is_that_of_the_full_system() -> None:
    rng = np.random.default_rng(0)
    frames, size = 7, 4
    root = rng.normal(size=(frames, size, size))
    matrix = root @ root.transpose(0, 2, 1) + np.eye(size)
    weights, right = rng.random(size) + 0.1, rng.normal(size=(frames, size, 2))
    difference = np.zeros((frames - 2, frames))
    for place in range(frames - 2):
        difference[place, place : place + 3] = (1, -2, 1)
    full = np.kron(difference.T @ difference, np.diag(weights))
    for t in range(frames):
        full[t * size : (t + 1) * size, t * size : (t + 1) * size] += matrix[t]
    expected = np.linalg.solve(full, right.reshape(-1, 2)).reshape(frames, size, 2)
    assert np.allclose(solve_banded(matrix, weights, right), expected)


def test_acceleration_gradient_is_that_of_the_energy(model: LandmarkModel) -> None:
    rng = np.random.default_rng(0)
    fit = LandmarkFitter(
        model,
        [Camera(SIZE, 900.0)],
        [
            Observation(t, 0, p)
            for t, p in enumerate(observe(model, np.zeros(150), *_heads(5, 3), 900.0))
        ],
        5,
    )._initial()
    fit.tra, fit.expr = rng.normal(size=(5, 3)), rng.normal(size=(5, 65))
    gradient = acceleration_gradient(fit.rotation, fit.tra, fit.expr)
    step = 1e-6
    for t, k in ((0, 0), (2, 1), (4, 2)):
        energies = []
        for sign in (1, -1):
            moved = fit.tra.copy()
            moved[t, k] += sign * step
            energies.append(0.5 * (np.diff(moved, n=2, axis=0) ** 2).sum())
        assert gradient[t, 3 + k] == pytest.approx((energies[0] - energies[1]) / 2 / step, rel=1e-5)


def test_rigid_part_sees_rotations_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 3)) * 0.05
    turn = np.cross([0.0, 1.0, 0.0], points - points.mean(0)) * np.deg2rad(1.0)
    stretch = (points - points.mean(0)) * 0.1
    penalty = rigid_part(points, np.stack([turn, stretch], axis=-1))
    assert penalty[0, 0] == pytest.approx(1.0, rel=1e-6)
    assert penalty[1, 1] < 1e-12


def test_frames_without_observation_are_refused(model: LandmarkModel) -> None:
    seen = observe(model, np.zeros(150), *_heads(1, 0), 900.0)
    with pytest.raises(ValueError, match="every frame"):
        LandmarkFitter(model, [Camera(SIZE)], [Observation(0, 0, seen[0])], 2)


def _candidate(yaw: float, sharpness: float = 1.0, closed: bool = False) -> Candidate:
    return Candidate(0, 0, yaw, 0.0, np.zeros(65), sharpness, closed)


def test_first_reference_is_frontal_and_sharp_and_the_next_ones_differ() -> None:
    candidates = [
        _candidate(30), _candidate(1, sharpness=0.1), _candidate(4), _candidate(-40),
        _candidate(0, closed=True), _candidate(5),
    ]  # fmt: skip
    chosen = select_references(candidates, 3)
    assert chosen[0] == 2
    assert set(chosen[1:]) == {0, 3}
    assert len(select_references(candidates, 100)) == 6
    # In videos, what repeats something chosen adds nothing.
    assert 5 not in select_references(candidates, 100, min_difference=0.12)
    with pytest.raises(ValueError, match="no frames"):
        select_references([], 3)
