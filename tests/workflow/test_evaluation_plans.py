"""Evaluation in the workflow: which jobs, and that frames set aside never reach an avatar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cap4d_core.files.basic import read_json
from cap4d_core.files.image_set import read_image_index, read_image_set
from tests.workflow.snakemake_runs import dry_run, job_counts, run_snakemake
from tests.workflow.test_dry_runs import write_project

pytestmark = pytest.mark.workflow


def planned(folder: Path, config: Path) -> dict[str, int]:
    """Jobs of `snakemake evaluate`."""
    done = run_snakemake(
        folder, "evaluate", "--cores", "2", "-n", "--quiet", "rules", "--configfile", str(config)
    )
    assert done.returncode == 0, done.stdout
    return job_counts(done.stdout)


def test_without_truth_avatars_are_only_driven(tmp_path: Path) -> None:
    config = write_project(tmp_path, 2, 3, sampling={"num_views": 0}, mmdm={"path": None})
    counts = planned(tmp_path, config)
    assert counts["evaluate_reenactment"] == 6 and counts["place_landmarks"] == 1
    assert not {"evaluate_avatar", "hold_out", "make_demo_performance"} & set(counts)
    assert "evaluate_reenactment" not in dry_run(tmp_path, config)


def test_frames_are_set_aside_of_every_subject_without_truth(tmp_path: Path) -> None:
    config = write_project(tmp_path, 3, 1, evaluation={"protocol": "held_out_frames"})
    (tmp_path / "data" / "truth").mkdir()
    rows = (tmp_path / "subjects.tsv").read_text().splitlines()
    rows[0] += "\theld_out"
    rows[1] += "\tdata/truth"
    (tmp_path / "subjects.tsv").write_text("\n".join(rows) + "\n")
    counts = dry_run(tmp_path, config)
    assert counts["hold_out"] == 2 and counts["evaluate_avatar"] == 3
    assert counts["track_subject"] == counts["plan_views"] == 3


def test_ready_avatars_are_compared_with_truth_only(tmp_path: Path) -> None:
    config = write_project(tmp_path, 1, 1, evaluation={"protocol": "held_out_cameras"})
    (tmp_path / "avatar").mkdir()
    (tmp_path / "subjects.tsv").write_text("subject\tavatar\ns000\tavatar\n")
    counts = dry_run(tmp_path, config)
    assert counts["import_avatar"] == 1
    assert not {"hold_out", "evaluate_avatar", "track_subject"} & set(counts)
    # Nothing to compare with, nothing to evaluate: there are no photos of the person.
    assert set(planned(tmp_path, config)) == {"evaluate"}


DEMO = {
    "quality": "demo",
    "subjects": "subjects.tsv",
    "driving": "driving.tsv",
    "evaluation": {"protocol": "held_out_frames", "fraction": 0.3, "max_frames": 3},
    "demo": {"num_references": 6, "num_frames": 3, "resolution": 160},
    "sampling": {"resolution": 128, "num_views": 0},
    "fitting": {
        "iterations": 6, "uv_resolution": 32, "deform_net_layers": 3, "deform_net_channels": 8,
        "num_gaussians_init": 500, "min_gaussians_per_face": 1, "evaluate_every": 6,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_person_measured_on_frames_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DEMO))
    (tmp_path / "subjects.tsv").write_text("subject\treference\nada\tdemo:7\n")
    (tmp_path / "driving.tsv").write_text("driving\tfit\ntalk\tdemo\n")
    done = run_snakemake(
        tmp_path, "evaluate", "--cores", "1", "--configfile", str(tmp_path / "config.yaml"),
        timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    ada = tmp_path / "results" / "ada"
    split = read_json(ada / "hold_out" / "split.json")
    assert split["num_held_out"] == 2 and split["num_references"] == 4
    fitted = [
        item.parameters.timestep_id for item in read_image_index(ada / "crops" / "index.json")
    ]
    apart = [item.parameters.timestep_id for item in read_image_set(ada / "hold_out" / "held_out")]
    assert [["cam0", t] for t in fitted] == split["kept"]
    assert [["cam0", t] for t in apart] == split["held_out"]
    assert not set(fitted) & set(apart)
    metrics = read_json(ada / "evaluation" / "metrics.json")
    assert len(metrics["views"]) == 2 and metrics["protocol"]["protocol"] == "held_out_frames"
    summary = json.loads((tmp_path / "results" / "evaluation" / "summary.json").read_text())
    assert [row["subject"] for row in summary["subjects"]] == ["ada"]
    (film,) = summary["reenactments"]
    assert film["driving"] == "talk" and film["num_frames"] == 3 and 0 < film["psnr"] < 100
    again = run_snakemake(
        tmp_path, "evaluate", "--cores", "1", "--configfile", str(tmp_path / "config.yaml")
    )
    assert "Nothing to be done" in again.stdout
