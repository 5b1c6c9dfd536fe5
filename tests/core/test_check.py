"""`python -m cap4d_core`: checks of files before a run, and the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cap4d_core.__main__ import main
from cap4d_core.check import check_files, describe
from cap4d_core.config import load_config
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import Tracking, write_fit, write_reference_list

SIZE = (24, 32)  # height, width


def small_fit(frames: int = 3) -> Tracking:
    zeros = np.zeros((frames, 3), np.float32)
    one = np.ones((1, 1), np.float32)
    return Tracking(
        shape=np.zeros(150, np.float32),
        expr=np.zeros((frames, 65), np.float32),
        rot=zeros,
        tra=zeros,
        eye_rot=zeros,
        neck_rot=zeros,
        fx=40 * one,
        fy=40 * one,
        cx=16 * one,
        cy=12 * one,
        extr=np.eye(4, dtype=np.float32)[None],
        resolutions=np.array([SIZE]),
        camera_order=("cam0",),
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A subject with a ready fit, a motion, no sampling; all files valid."""
    monkeypatch.chdir(tmp_path)
    ana = tmp_path / "ana"
    write_fit(ana / "fit.npz", small_fit())
    write_reference_list(ana / "reference_images.json", [("cam0", 0)])
    for folder in ("images", "bg"):
        for i in range(3):
            image = (
                np.zeros((*SIZE, 3), np.uint8) if folder == "images" else np.ones(SIZE, np.uint8)
            )
            write_image(ana / folder / "cam0" / f"{i}.png", image)
    write_fit(tmp_path / "talk.npz", small_fit())
    (tmp_path / "subjects.tsv").write_text("subject\ttracking\nana\tana\n")
    (tmp_path / "driving.tsv").write_text("driving\tfit\tnum_frames\ntalk\ttalk.npz\t3\n")
    (tmp_path / "config.yaml").write_text(
        "subjects: subjects.tsv\ndriving: driving.tsv\nhead_model: {path: demo}\n"
        "sampling: {num_views: 0}\n"
    )
    return tmp_path


def problems(project: Path, **changes: Any) -> list[str]:
    raw = {
        "subjects": "subjects.tsv",
        "driving": "driving.tsv",
        "head_model": {"path": "demo"},
        "sampling": {"num_views": 0},
        **changes,
    }
    return check_files(load_config(raw, project / "config.yaml"))


def test_valid_project(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(project) == []
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "1 subjects; no views" in out and "0 problems found" in out


def test_command_line_values(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", "quality=meduim"]) == 1
    assert "did you mean 'medium'?" in capsys.readouterr().err
    assert main(["summary", "--config", "results=elsewhere"]) == 0
    assert "ana: no avatar yet" in capsys.readouterr().out


def test_problems_of_all_subjects_at_once(project: Path) -> None:
    (project / "subjects.tsv").write_text("subject\ttracking\nana\tana\nben\tben\ncem\tcem\n")
    write_fit(project / "cem" / "fit.npz", small_fit())
    found = problems(project)
    assert [text.split(":")[0] for text in found] == ["subject ben", "subject cem"]
    assert "ben/fit.npz: found nothing there" in found[0]
    assert "reference_images.json" in found[1]


def test_wrong_field_of_a_fit(project: Path) -> None:
    arrays = dict(np.load(project / "ana" / "fit.npz"))
    arrays["expr"] = arrays["expr"][:, :50]
    np.savez(project / "ana" / "fit.npz", **arrays)
    assert "'expr' of shape (3, 50); expected shape (any, 65)" in problems(project)[0]


def test_image_of_another_size_or_that_cannot_be_decoded(project: Path) -> None:
    image = project / "ana" / "images" / "cam0" / "0.png"
    write_image(image, np.zeros((24, 30, 3), np.uint8))
    assert "30 x 24 pixels, fit.npz says 32 x 24" in problems(project)[0]
    image.write_bytes(b"no image")
    assert "no readable image" in problems(project)[0]


def test_driving_shorter_than_asked_for(project: Path) -> None:
    (project / "driving.tsv").write_text(
        "driving\tfit\tstart_frame\tnum_frames\ntalk\ttalk.npz\t2\t2\n"
    )
    assert "3 frames, but start_frame 2 and num_frames 2 need 4" in problems(project)[0]


def test_missing_head_model_weights_and_recordings(project: Path) -> None:
    (project / "subjects.tsv").write_text("subject\treference\nana\tphotos\n")
    (project / "driving.tsv").write_text("driving\tvideo\ntalk\tana/images\n")
    found = problems(
        project,
        head_model={"path": "flame"},
        mmdm={"path": "mmdm"},
        sampling={"num_views": 28},
        fitting={"lpips_weights": "vgg.pth"},
    )
    where = [text.split(":")[0] for text in found]
    assert where == ["head_model.path", "mmdm.path", "fitting.lpips_weights", "subject ana"]
    assert "flame2023_no_jaw.pkl" in found[0]
    assert "expected photos or a video" in found[3]


def test_disk_space_and_plan(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"subject": "ana", "head_model": {"path": "demo"}, "sampling": {"num_views": 0}}
    config = load_config(raw, project / "config.yaml")
    assert "0 driving sequences" in describe(config)

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    assert "GB are needed, 0.0 GB free" in check_files(config)[0]


def test_schema_and_docs_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "--output", str(tmp_path / "docs.md")]) == 0
    assert "## sampling" in (tmp_path / "docs.md").read_text()
    assert main(["schema"]) == 0
    assert '"num_views"' in capsys.readouterr().out
