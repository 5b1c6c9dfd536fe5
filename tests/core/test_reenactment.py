"""Driven avatars: following the driver, and the whole evaluation of a performance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.demo.subject import make_subject
from cap4d_core.demo.world import write_demo_driving
from cap4d_core.evaluation import evaluate, reenactment
from cap4d_core.evaluation.demo_truth import write_demo_performance
from cap4d_core.evaluation.following import following_error
from cap4d_core.evaluation.reenactment import driven_views, evaluate_reenactment
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_rgb
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.landmarks import FaceLandmarks, Region
from tests.core.test_face_measures import Mean
from tests.core.tracker_pictures import correspondence_file, demo_head_folder

SEED, FRAMES, SIZE = 9003, 5, 128


@pytest.fixture(scope="module")
def driving(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    folder = tmp_path_factory.mktemp("driving")
    # Every fifth frame of a second: enough changes to be followed.
    fit = write_demo_driving(folder, num_frames=24)
    rows = slice(0, 5 * FRAMES, 5)
    parts = {name: getattr(fit, name)[rows] for name in ("expr", "rot", "tra", "eye_rot")}
    return replace(fit, neck_rot=fit.neck_rot[rows], **parts)


@pytest.fixture(scope="module")
def model() -> LandmarkModel:
    placed = load_or_compute(demo_head_folder(), correspondence_file())
    return LandmarkModel(HeadModel.load(demo_head_folder(), mouth=False), placed)


def _landmarks(
    model: LandmarkModel, driving: Tracking, views: list[Any], expr: np.ndarray
) -> list[FaceLandmarks | None]:
    """What a perfect network would see of a head with these expressions, in crops of SIZE."""
    own = model.points(np.zeros(150), expr)
    found: list[FaceLandmarks | None] = []
    for i, view in enumerate(views):
        turn = Rotation.from_rotvec(driving.rot[i]).as_matrix()
        world = own[i] @ turn.T + driving.tra[i]
        x, y, z = (world * [1, -1, -1]).T
        x0, y0, x1, _ = view.crop_box
        scale = SIZE / (x1 - x0)
        points = np.zeros((478, 3))
        points[:468, 0] = (x / z * view.fx + view.cx - x0) * scale
        points[:468, 1] = (y / z * view.fy + view.cy - y0) * scale
        # Depth as the network gives it: relative, in pixels.
        points[:468, 2] = (z - z.mean()) / z.mean() * view.fx * scale
        points[468:] = points[0]
        found.append(FaceLandmarks(points, 1.0, 0.0, Region((64, 64), 128, 0)))
    return found


@pytest.mark.slow
def test_a_head_that_follows_and_one_that_does_not(model: LandmarkModel, driving: Tracking) -> None:
    # Strong expressions: a fit of few landmarks plays small ones down.
    driving = replace(driving, expr=2 * driving.expr)
    head = HeadModel.load(demo_head_folder())
    views = driven_views(head, np.zeros(150, np.float32), driving, 100)
    assert [view.timestep_id for view in views] == list(range(FRAMES))
    expr = np.asarray(driving.expr, np.float64)
    good = following_error(model, driving, views, _landmarks(model, driving, views, expr), SIZE)
    still = following_error(
        model, driving, views, _landmarks(model, driving, views, 0 * expr), SIZE
    )
    assert good is not None and still is not None
    assert good.frames == list(range(FRAMES))
    assert good.pose_deg.mean() < 4 and still.pose_deg.mean() < 4
    assert good.expression_mm.mean() < 0.6 * still.expression_mm.mean()
    assert good.expression_percent == pytest.approx(0.1 * good.expression_mm / model.face_size)
    assert set(good.of_frame(2)) == {
        "pose_deg_error", "expression_mm_error", "expression_percent_error", "gaze_deg_error"
    }  # fmt: skip
    # A head that is turned 10 degrees too far.
    turned = replace(driving, rot=driving.rot + np.float32([0, np.radians(10), 0]))
    off = following_error(model, turned, views, _landmarks(model, driving, views, expr), SIZE)
    assert off is not None and off.pose_deg.mean() > good.pose_deg.mean() + 5


def test_lost_frames_are_left_out(model: LandmarkModel, driving: Tracking) -> None:
    head = HeadModel.load(demo_head_folder())
    views = driven_views(head, np.zeros(150, np.float32), driving, 100)
    found = _landmarks(model, driving, views, np.asarray(driving.expr, np.float64))
    error = following_error(model, driving, views, [None, *found[1:]], SIZE)
    assert error is not None and error.frames == [1, 2, 3, 4] and error.of_frame(0) == {}
    assert following_error(model, driving, views, [None, None, None, *found[3:]], SIZE) is None


@pytest.fixture(scope="module")
def truth(driving: Tracking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    write_demo_performance(folder, SEED, driving, crop_size=SIZE, supersample=2)
    return folder


def _avatar(head: HeadModel) -> GaussianAvatar:
    settings = FittingSettings(
        uv_resolution=32, deform_net_layers=3, deform_net_channels=8, num_gaussians_init=200,
        min_gaussians_per_face=1,
    )  # fmt: skip
    shape = torch.from_numpy(make_subject(SEED).shape).float()
    return GaussianAvatar.create(head, shape, settings)


@pytest.mark.slow
def test_performance_of_a_perfect_avatar(
    driving: Tracking, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the truth in place of its renders: everything is found, and nothing is off."""
    head = HeadModel.load(demo_head_folder(), lower_jaw=True)
    items = read_image_set(truth)
    assert [item.parameters.timestep_id for item in items] == list(range(FRAMES))

    def render(_: Any, view: Any, size: int, *__: Any, **___: Any) -> torch.Tensor:
        picture = read_rgb(items[view.timestep_id].image)
        assert picture.shape[0] == size
        # The truth is cropped as the avatar's own head is.
        assert view.crop_box == items[view.timestep_id].parameters.crop_box
        return torch.from_numpy(picture.copy()).float() / 255

    monkeypatch.setattr(reenactment, "render_view", render)
    monkeypatch.setattr(evaluate, "render_view", render)
    metrics = evaluate_reenactment(
        _avatar(head), head, driving, truth, tmp_path, landmarks_file=correspondence_file(),
        truth=truth, identity=Mean(),
    )  # fmt: skip
    assert metrics == json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    summary = metrics["summary"]
    assert summary["num_frames"] == FRAMES and summary["share_with_landmarks"] == 1
    assert summary["identity_similarity"] > 0.99 and metrics["absent"] == {}
    best = metrics["truth"]["following"]
    for name in ("pose_deg_error", "expression_mm_error", "gaze_deg_error"):
        assert summary[name] == pytest.approx(best[name], rel=1e-3)
    assert summary["pose_deg_error"] < 6 and summary["expression_mm_error"] < 4
    against = metrics["truth"]["summary"]
    assert against["psnr"] == pytest.approx(100) and against["akd"] == 0
    assert metrics["truth"]["temporal"]["avatar"]["acceleration_error"] == 0
    jitter = metrics["temporal"]["avatar"]["landmark_jitter"]
    assert jitter == pytest.approx(metrics["truth"]["temporal"]["truth"]["landmark_jitter"])
    assert len((tmp_path / "frames.csv").read_text("utf-8").splitlines()) == FRAMES + 1
    for name in ("metrics.png", "side_by_side.png", "truth/side_by_side.png", "truth/metrics.png"):
        assert read_rgb(tmp_path / name).std() > 5


def test_an_avatar_without_a_face_says_so(driving: Tracking, truth: Path, tmp_path: Path) -> None:
    head = HeadModel.load(demo_head_folder(), lower_jaw=True)
    metrics = evaluate_reenactment(
        _avatar(head), head, driving, truth, tmp_path, landmarks_file=correspondence_file(),
        max_frames=3, identity_absent="none given",
    )  # fmt: skip
    assert metrics["summary"] == {"num_frames": 3, "share_with_landmarks": 0}
    assert metrics["absent"] == {
        "identity_similarity": "none given",
        "following": "fewer than 3 frames in which a face was found",
    }
    assert all(frame["absent"] for frame in metrics["frames"])
    assert "landmark_jitter" not in metrics["temporal"]["avatar"]
    assert metrics["temporal"]["avatar"]["color_flicker"] >= 0
