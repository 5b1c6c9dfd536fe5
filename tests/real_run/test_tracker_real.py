"""Acceptance of the built-in tracker on real photos and a real video (skipped without them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cap4d_core.files.tracking import read_fit, read_tracked_subject
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.track import track_driving, track_subject

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = real_data / "head_model"
    return prepare_head_model(
        folder / "flame_gp.pkl", folder / "assets", tmp_path_factory.mktemp("head")
    )


def test_head_rotations_agree_with_the_given_fits(
    real_data: Path, head: Path, tmp_path: Path
) -> None:
    relative = []
    for name in ("felix", "tesla"):
        output = tmp_path / name
        track_subject(real_data / name / "images/cam0", output, head, TrackingSettings())
        truth = read_fit(real_data / name / "fit.npz")
        fit = read_tracked_subject(output).tracking
        ours, theirs = (
            (Rotation.from_matrix(f.extr[0, :3, :3]) * Rotation.from_euler("x", 180, degrees=True)
             * Rotation.from_rotvec(f.rot))
            for f in (fit, truth)
        )  # fmt: skip
        relative.append((theirs.inv() * ours).as_matrix())
    differences = Rotation.from_matrix(np.concatenate(relative))
    # Head models differ in what 'straight ahead' means: one constant rotation is free.
    errors = np.degrees((differences.mean().inv() * differences).magnitude())
    assert np.median(errors) <= 3.0 and errors.max() <= 6.0, errors.round(2)


def test_video_is_smooth_but_not_frozen(real_data: Path, head: Path, tmp_path: Path) -> None:
    figures = {}
    for smoothness in (0.0, 1.0):
        output = tmp_path / str(smoothness)
        settings = TrackingSettings(smoothness=smoothness)
        track_driving(real_data / "video/talking.mp4", output, head, settings)
        figures[smoothness] = json.loads((output / "quality.json").read_text())
    rough, smooth = figures[0.0], figures[1.0]
    assert smooth["num_used"] == smooth["num_frames"] == 92
    assert smooth["median_rotation_acceleration_deg"] <= 0.3
    assert smooth["median_translation_acceleration_mm"] <= 1.0
    assert smooth["median_landmark_residual"] <= 1.1 * rough["median_landmark_residual"]
    assert smooth["seconds"] < 180
