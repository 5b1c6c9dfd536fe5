"""The real Snakefile on a tiny procedural person, on the CPU; then what a second run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cap4d_core.config import load_config, load_config_file
from cap4d_core.files.basic import read_safetensors
from cap4d_core.files.image_set import read_image_set
from cap4d_core.summary import summarise
from tests.workflow.snakemake_runs import ROOT, job_counts, run_snakemake
from tests.workflow.tiny_mmdm import write_tiny_checkpoint

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = ROOT / "tests" / "data" / "tiny" / "config.yaml"
GPU_RULES = (
    "prepare_mmdm", "encode_references", "sample_views", "decode_views",
    "fit_avatar", "evaluate_avatar", "animate_avatar",
)  # fmt: skip


class Workspace:
    """A folder in which the tiny workflow was run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.variables = {"CAP4D_TINY_MMDM": str(write_tiny_checkpoint(folder / "weights"))}

    def snakemake(self, *words: str) -> str:
        # One core per job and two at once: most of a tiny job is importing.
        result = run_snakemake(
            self.folder, *words, "--cores", "2", "--resources", "gpu=2",
            "--set-threads", *[f"{rule}=1" for rule in GPU_RULES], "--configfile", str(CONFIG),
            environment=self.variables,
            timeout=1500,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        return result.stdout

    def planned(self, *words: str) -> dict[str, int]:
        return job_counts(self.snakemake("-n", "--quiet", "rules", *words))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("tiny"))
    space.snakemake()
    return space


def test_everything_is_there(workspace: Workspace) -> None:
    subject = workspace.results / "ada"
    for name in (
        "tracking/fit.npz",
        "tracking/quality.json",
        "views/plan.npz",
        "avatar/avatar.safetensors",
        "avatar/metrics.json",
        "animation/talk/renders.mp4",
        "animation/talk/exported_animation.ply",
        "evaluation/metrics.json",
    ):
        assert (subject / name).stat().st_size > 0, name
    assert "ada" in (workspace.results / "index.html").read_text()
    assert len(read_image_set(subject / "views" / "generated_images")) == 8
    figures = json.loads((subject / "evaluation" / "metrics.json").read_text())["summary"]
    assert 0 < figures["psnr"] < 100


def test_every_job_left_a_log_a_job_file_and_a_benchmark(workspace: Workspace) -> None:
    logs = sorted((workspace.results / "logs").rglob("*.log"))
    assert len(logs) == 20
    for log in logs:
        assert "done in" in log.read_text(), log
        assert log.with_suffix(".job.json").is_file()
        name = log.relative_to(workspace.results / "logs").with_suffix(".tsv")
        assert (workspace.results / "benchmarks" / name).is_file()


def test_progress_is_visible_in_the_log(workspace: Workspace) -> None:
    log = (workspace.results / "logs/fit_avatar/ada.log").read_text()
    assert "iteration 6/6" in log


def test_second_run_does_nothing(workspace: Workspace) -> None:
    assert "Nothing to be done" in workspace.snakemake()


AFTER_SAMPLING = {
    "fit_avatar": 1, "evaluate_avatar": 1, "animate_avatar": 1, "write_report": 1, "all": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shard", "sampled", "decoded"),
    [
        # The first round's, the two of the next round that were dealt from it, and both decodings.
        ("1/2-of-2", 3, 2),
        # The last round's only concerns its own images.
        ("2/1-of-2", 1, 1),
    ],
)
def test_plan_after_a_shard_was_deleted(
    workspace: Workspace, shard: str, sampled: int, decoded: int
) -> None:
    path = workspace.results / "ada" / "views" / "rounds" / f"{shard}.safetensors"
    moved = path.rename(path.with_suffix(".moved"))
    try:
        counts = workspace.planned()
    finally:
        moved.rename(path)
    assert counts == {"sample_views": sampled, "decode_views": decoded, **AFTER_SAMPLING}


def test_setting_of_one_stage_reruns_that_stage(workspace: Workspace) -> None:
    counts = workspace.planned("--config", "animation={crf: 30}")
    assert counts == {"animate_avatar": 1, "write_report": 1, "all": 1}


def test_job_can_be_run_again_by_hand(workspace: Workspace) -> None:
    """Outside Snakemake, to a folder of its own, with the same bits."""
    job = "results/logs/sample_views/ada/2/1-of-2.job.json"
    result = subprocess.run(
        [sys.executable, str(ROOT / "workflow_scripts" / "sample_views.py"), job],
        cwd=workspace.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CAP4D_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    name = "results/ada/views/rounds/2/1-of-2.safetensors"
    original, _ = read_safetensors(workspace.folder / name)
    again, _ = read_safetensors(workspace.folder / "debug" / name)
    assert original["latents"].equal(again["latents"])


def test_summary(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.folder)
    monkeypatch.setenv("CAP4D_TINY_MMDM", workspace.variables["CAP4D_TINY_MMDM"])
    text = summarise(load_config(load_config_file(CONFIG), CONFIG))
    assert "talk: results/ada/animation/talk/renders.mp4" in text
    assert "held-out views: PSNR " in text and "on 2 views" in text


def test_broken_input_is_one_sentence_in_the_failed_jobs_log(
    tmp_path: Path, workspace: Workspace
) -> None:
    """A truncated fit: the run fails, says which file, and keeps going with other subjects."""
    source = workspace.results / "demo" / "subjects" / "ada"
    fit = tmp_path / "fit"
    fit.mkdir()
    (fit / "fit.npz").write_bytes((source / "fit.npz").read_bytes()[:100])
    (fit / "reference_images.json").write_text('[["cam0", 0]]')
    result = run_snakemake(
        tmp_path, "track_all", "--cores", "1", "--config", "subject=fit",
        "driving=demo", "quality=demo", "head_model={path: demo}",
        "--configfile", str(CONFIG),
        environment=workspace.variables,
    )  # fmt: skip
    assert result.returncode == 1
    assert "fit/fit.npz: found an unreadable archive" in result.stdout
    assert "track_subject/fit.log" in result.stdout
    log = (tmp_path / "results/logs/track_subject/fit.log").read_text()
    assert "unreadable archive" in log and "Traceback" not in log


def test_deleted_shard_is_made_again_with_the_same_bits(workspace: Workspace) -> None:
    """Last, because everything after sampling is made again."""
    views = workspace.results / "ada" / "views"
    shard = views / "rounds" / "1" / "2-of-2.safetensors"
    before, _ = read_safetensors(shard)
    images = {path.name: path.read_bytes() for path in views.glob("generated_images/images/*")}
    shard.unlink()
    workspace.snakemake()
    after, _ = read_safetensors(shard)
    assert before["latents"].equal(after["latents"])
    assert images == {p.name: p.read_bytes() for p in views.glob("generated_images/images/*")}
    assert "Nothing to be done" in workspace.snakemake()
