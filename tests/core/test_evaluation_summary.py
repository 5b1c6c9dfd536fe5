"""Tables, plots and the summary over subjects."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.evaluation.summary import mean_row, summarise_evaluations
from cap4d_core.evaluation.tables import write_frames_csv, write_frames_plot
from cap4d_core.files.basic import write_json
from cap4d_core.files.images import read_rgb


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


VIEWS: list[dict[str, Any]] = [
    {"view": "0.png", "psnr": 30.0, "baseline_psnr": 20.0, "akd_percent": 1.0},
    {"view": "1.png", "psnr": 28.0, "baseline_psnr": 21.0, "absent": {"akd": "render: no face"}},
]


def test_frames_become_a_table_with_reasons(tmp_path: Path) -> None:
    write_frames_csv(tmp_path / "frames.csv", VIEWS)
    assert _rows(tmp_path / "frames.csv") == [
        {
            "view": "0.png", "psnr": "30", "baseline_psnr": "20", "akd_percent": "1", "absent": "",
        },
        {
            "view": "1.png", "psnr": "28", "baseline_psnr": "21", "akd_percent": "",
            "absent": "akd: render: no face",
        },
    ]  # fmt: skip
    write_frames_plot(tmp_path / "metrics.png", VIEWS)
    assert read_rgb(tmp_path / "metrics.png").std() > 5
    # A driven avatar whose face was not found has a plot, too.
    write_frames_plot(tmp_path / "nothing.png", [{"frame": 0}])
    assert (tmp_path / "nothing.png").stat().st_size > 0


def _metrics(path: Path, psnr: float, **more: Any) -> Path:
    write_json(path, {"summary": {"psnr": psnr, "baseline_psnr": 15.0}, "absent": {}, **more})
    return path


def test_subjects_count_once_each(tmp_path: Path) -> None:
    subjects = {
        "ana": _metrics(
            tmp_path / "a.json", 30.0, protocol={"protocol": "held_out_frames"},
            temporal={"avatar": {"landmark_jitter": 0.5}},
        ),
        "ben": _metrics(tmp_path / "b.json", 20.0, absent={"lpips": "no weights"}),
    }  # fmt: skip
    film = tmp_path / "film.json"
    write_json(
        film,
        {
            "summary": {"pose_deg_error": 2.0},
            "absent": {},
            "truth": {"summary": {"psnr": 31.0}, "following": {"pose_deg_error": 1.5}},
        },
    )
    content = summarise_evaluations(subjects, {("ana", "talk"): film}, tmp_path / "out")
    assert content == json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert [row["protocol"] for row in content["subjects"]] == ["held_out_frames", "ground_truth"]
    assert content["mean"] == {"psnr": 25.0, "baseline_psnr": 15.0, "landmark_jitter": 0.5}
    assert content["reenactments"] == [
        {
            "subject": "ana", "driving": "talk", "pose_deg_error": 2.0, "psnr": 31.0,
            "pose_deg_error_best": 1.5, "absent": {},
        }
    ]  # fmt: skip
    rows = _rows(tmp_path / "out" / "subjects.csv")
    assert [row["subject"] for row in rows] == ["ana", "ben", "mean"]
    assert rows[1]["landmark_jitter"] == "" and rows[1]["absent"] == "lpips: no weights"
    assert rows[2]["psnr"] == "25"
    assert read_rgb(tmp_path / "out" / "summary.png").std() > 5
    # Without reenactments there is no table of them left over.
    summarise_evaluations(subjects, {}, tmp_path / "out")
    assert not (tmp_path / "out" / "reenactments.csv").exists()


def test_truths_are_no_numbers() -> None:
    assert mean_row([{"a": True, "b": 2}, {"b": 4.0, "c": "x"}]) == {"b": 3.0}


def test_nothing_to_evaluate_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to evaluate: no subject has true pictures"):
        summarise_evaluations({}, {}, tmp_path)
    write_json(tmp_path / "x.json", {"views": []})
    with pytest.raises(InputFileError, match="found no 'summary'"):
        summarise_evaluations({"ana": tmp_path / "x.json"}, {}, tmp_path / "out")
