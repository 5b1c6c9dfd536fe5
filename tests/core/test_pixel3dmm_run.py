"""The external tracker: what is missing is named, its steps run, its output is converted.

A stand-in for the checkout writes what the real one would, from a known head.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.errors import InputFileError, MissingAssetError, UserError
from cap4d_core.files.tracking import read_fit, read_tracked_subject
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import flip_head_opencv
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.pixel3dmm_convert import read_output
from cap4d_core.tracking.pixel3dmm_installation import find_installation
from cap4d_core.tracking.track import track_subject
from tests.core.tracker_pictures import (
    correspondence_file,
    demo_head_folder,
    demo_subject,
    frontal_picture,
    save,
)

# Copies prepared files where the real scripts would write theirs.
_SCRIPT = """
import os, shutil, sys
kind = os.path.basename(__file__)
here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(here, "calls.txt"), "a") as handle:
    handle.write(kind + " " + " ".join(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join(here, "fail-" + kind)):
    sys.exit("CUDA out of memory")
if kind == "run_preprocessing.py":
    shutil.copytree(here + "/preprocess", os.environ["PIXEL3DMM_PREPROCESSED_DATA"] + "/input")
if kind == "track.py":
    shutil.copytree(here + "/tracking", os.environ["PIXEL3DMM_TRACKING_OUTPUT"] + "/input_nV1")
"""


def _write_mesh(path: Path, points: np.ndarray) -> None:
    rows = "\n".join(f"{x:.7f} {y:.7f} {z:.7f}" for x, y, z in points)
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n{axes}end_header\n"
    path.write_text(header + rows + "\n")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "pixel3dmm"
    for name in ("run_preprocessing.py", "network_inference.py", "track.py"):
        (folder / "scripts").mkdir(parents=True, exist_ok=True)
        (folder / "scripts" / name).write_text(_SCRIPT)
    (folder / "src/pixel3dmm").mkdir(parents=True)
    (folder / "src/pixel3dmm/__init__.py").touch()
    truth = read_fit(demo_subject() / "fit.npz").frames(0, 1)
    model = HeadModel.load(demo_head_folder(), mouth=False)
    with torch.no_grad():
        vertices = model(
            *(
                torch.from_numpy(np.asarray(getattr(truth, k)))
                for k in ("shape", "expr", "rot", "tra")
            )
        ).vertices
    # World of OpenGL axes with the camera at its origin: the camera turns by half a turn about x.
    world = vertices[0].numpy()
    for name in ("tracking/checkpoint", "tracking/mesh", "preprocess"):
        (folder / name).mkdir(parents=True)
    _write_mesh(folder / "tracking/mesh/00000.ply", world)
    height, width = (int(v) for v in truth.resolutions[0])
    center = np.array([truth.cx[0, 0], truth.cy[0, 0]]) * 256 / width
    frame = {
        "flame": {"R_rotation_matrix": np.eye(3)[None], "t": np.zeros((1, 3))},
        "camera": {
            "R_base_0": np.eye(3, dtype=np.float32)[None],
            "t_base_0": np.zeros((1, 3), np.float32),
            "pp": (center / 128.5 - 1)[None],
            "fl": np.array([[truth.fx[0, 0] * 256 / width / 256]]),
        },
        "img_size": (256, 256),
    }
    torch.save(frame, folder / "tracking/checkpoint/00000.frame")
    np.save(folder / "preprocess/crop_ymin_ymax_xmin_xmax.npy", np.array([0, height, 0, width]))
    monkeypatch.setenv("PIXEL3DMM_PYTHON", sys.executable)
    return folder


def _track(checkout: Path, tmp_path: Path) -> Path:
    save(tmp_path / "in/0.png", frontal_picture())
    settings = TrackingSettings(backend="pixel3dmm", pixel3dmm_path=str(checkout))
    track_subject(
        tmp_path / "in", tmp_path / "out", demo_head_folder(), settings,
        correspondence=correspondence_file(),
    )  # fmt: skip
    return tmp_path / "out"


def test_output_of_the_checkout_becomes_a_subject(checkout: Path, tmp_path: Path) -> None:
    output = _track(checkout, tmp_path)
    calls = (checkout / "calls.txt").read_text().splitlines()
    assert [call.split()[0] for call in calls] == [
        "run_preprocessing.py", "network_inference.py", "network_inference.py", "track.py"
    ]  # fmt: skip
    assert "is_discontinuous=True" in calls[-1] and "use_flame2023=True" in calls[-1]
    fit = read_tracked_subject(output).tracking
    truth = read_fit(demo_subject() / "fit.npz").frames(0, 1)
    assert fit.fx[0, 0] == pytest.approx(truth.fx[0, 0], rel=1e-5)
    assert fit.cx[0, 0] == pytest.approx(truth.cx[0, 0], abs=1e-3)
    # The same surface in the camera, whatever the coefficients.
    model = HeadModel.load(demo_head_folder(), mouth=False)
    seen = []
    for one in (fit, truth):
        values = (
            torch.from_numpy(np.asarray(getattr(one, k))) for k in ("shape", "expr", "rot", "tra")
        )
        with torch.no_grad():
            points = flip_head_opencv(model(*values).vertices)[0].numpy()
        seen.append(points @ one.extr[0, :3, :3].T + one.extr[0, :3, 3])
    assert np.linalg.norm(seen[0] - seen[1], axis=1).mean() < 0.002
    quality = json.loads((output / "quality.json").read_text())
    assert quality["backend"] == "pixel3dmm" and quality["num_used"] == 1
    assert quality["median_landmark_residual"] < 0.03


def test_everything_missing_is_named_before_anything_runs(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "scripts/track.py").unlink()
    monkeypatch.setenv("PIXEL3DMM_PYTHON", str(tmp_path / "no-python"))
    with pytest.raises(MissingAssetError, match=r"scripts/track\.py; its Python .*no-python"):
        _track(checkout, tmp_path)
    assert not (checkout / "calls.txt").exists()
    monkeypatch.setenv("PIXEL3DMM_PYTHON", sys.executable)
    (checkout / "src/pixel3dmm/__init__.py").unlink()
    (checkout / "src/pixel3dmm").rmdir()
    message = r"scripts/track\.py; the module pixel3dmm in .*make install-pixel3dmm"
    with pytest.raises(MissingAssetError, match=message):
        find_installation(str(checkout))
    monkeypatch.delenv("PIXEL3DMM_PATH", raising=False)
    settings = TrackingSettings(backend="pixel3dmm")
    with pytest.raises(MissingAssetError, match="no checkout of Pixel3DMM is known"):
        track_subject(tmp_path / "in", tmp_path / "out", demo_head_folder(), settings)


def test_failing_step_shows_the_end_of_its_log(checkout: Path, tmp_path: Path) -> None:
    (checkout / "fail-network_inference.py").touch()
    with pytest.raises(UserError, match=r"(?s)network_inference\.py failed.*CUDA out of memory"):
        _track(checkout, tmp_path)


def test_precomputed_backend_wants_a_fit(tmp_path: Path) -> None:
    settings = TrackingSettings(backend="precomputed")
    with pytest.raises(UserError, match=r"'precomputed'.*ready fit is expected"):
        track_subject(tmp_path / "in", tmp_path / "out", demo_head_folder(), settings)


def _spoil(checkout: Path, kind: str) -> None:
    frame = checkout / "tracking/checkpoint/00000.frame"
    mesh = checkout / "tracking/mesh/00000.ply"
    if kind == "pickle":
        torch.save({"img_size": (1, 1), "flame": Path("danger")}, frame)
    elif kind == "no camera":
        content = torch.load(frame, weights_only=False)  # written by this test
        del content["camera"]["pp"]
        torch.save(content, frame)
    elif kind == "few vertices":
        _write_mesh(mesh, np.zeros((10, 3)))
    elif kind == "no mesh":
        mesh.unlink()
    elif kind == "no crop":
        (checkout / "preprocess/crop_ymin_ymax_xmin_xmax.npy").unlink()
    else:
        frame.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "no readable checkpoint"),
        ("no camera", r"no usable 'camera\.pp'"),
        ("few vertices", "10 vertices.*5023"),
        ("no mesh", "the tracked mesh of a frame"),
        ("no crop", "the crop of the preprocessing"),
        ("no frames", "no checkpoints"),
    ],
)
def test_broken_output_is_explained(checkout: Path, kind: str, message: str) -> None:
    _spoil(checkout, kind)
    with pytest.raises(InputFileError, match=message):
        read_output(checkout / "tracking", checkout / "preprocess")
