"""`snakemake train_mmdm`: two processes train a tiny model on procedural people, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cap4d_core.diffusion.checkpoint import load_mmdm
from cap4d_core.files.images import read_rgb
from tests.core.training_runs import SETTINGS
from tests.workflow.snakemake_runs import job_counts, run_snakemake

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(900)]


def write_config(folder: Path, steps: int) -> Path:
    """The run of the unit tests without LPIPS, whose weights would have to be downloaded."""
    training = SETTINGS.model_dump(mode="json")
    training["autoencoder"]["perceptual_weight"] = 0.0
    for phase in ("autoencoder", "denoiser"):
        training[phase]["steps"] = steps
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({"head_model": {"path": "demo"}, "training": training}))
    return path


def test_training_by_two_processes(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, steps=2))
    command = (
        "train_mmdm", "--cores", "2", "--resources", "gpu=2",
        "--set-resources", "train_mmdm:gpu=2", "--configfile", config,
    )  # fmt: skip
    result = run_snakemake(tmp_path, *command)
    assert result.returncode == 0, result.stdout
    run = tmp_path / "results" / "training" / "tiny"
    assert load_mmdm(run / "model").config.views_per_call == 4
    provenance = json.loads((run / "model" / "provenance.json").read_text())
    assert provenance["training"]["steps"] == 2 and provenance["training"]["people"] == 2
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # One process writes.
    assert [e["step"] for e in entries if e["phase"] == "denoiser"] == [1, 2]
    for picture in ("curve.png", "samples.png"):
        assert read_rgb(run / picture).std() > 0

    again = run_snakemake(tmp_path, *command)
    assert "Nothing to be done" in again.stdout
    # Longer training is other training.
    write_config(tmp_path, steps=3)
    changed = run_snakemake(tmp_path, *command, "-n", "--quiet", "rules")
    assert job_counts(changed.stdout).get("train_mmdm") == 1
