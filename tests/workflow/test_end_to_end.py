"""The real Snakefile on a tiny procedural person, on the CPU; then what later runs do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cap4d_core.config import load_config, load_config_file
from cap4d_core.files.basic import read_safetensors, sha256_file
from cap4d_core.files.image_set import read_image_set
from cap4d_core.summary import summarise
from cap4d_core.versions import STAGE_VERSIONS
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
        self.config = CONFIG
        self.root = ROOT
        # What depends on no subject is kept for other workflows.
        self.variables = {
            "CAP4D_TINY_MMDM": str(write_tiny_checkpoint(folder / "weights")),
            "CAP4D_CACHE": str(folder / "cache"),
        }

    def snakemake(self, *words: str) -> str:
        # One core per job and two at once: most of a tiny job is importing.
        result = run_snakemake(
            self.folder, *words, "--snakefile", str(self.root / "Snakefile"), "--cores", "2",
            "--resources", "gpu=2", "--set-threads", *[f"{rule}=1" for rule in GPU_RULES],
            "--configfile", str(self.config),
            environment=self.variables,
            timeout=1500,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        return result.stdout

    def planned(self, *words: str) -> dict[str, int]:
        return job_counts(self.snakemake("-n", "--quiet", "rules", *words))

    def log(self, name: str) -> str:
        return (self.results / "logs" / f"{name}.log").read_text()


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


def test_manifests_say_how_results_were_made(workspace: Workspace) -> None:
    folder = workspace.results / "ada" / "animation" / "talk"
    found = json.loads((folder / "manifest.json").read_text())
    assert found["rule"] == "animate_avatar"
    assert found["stage_version"] == STAGE_VERSIONS["animate_avatar"]
    assert found["outputs"]["renders.mp4"]["sha256"] == sha256_file(folder / "renders.mp4")
    stages = found["made_before"]
    assert stages["sample_views"]["jobs"] == 4 and stages["fit_avatar"]["jobs"] == 1
    assert found["seeds"] and found["assets"] and found["hardware"]["cpu"]
    assert found["software"]["torch"] and found["seconds"] > 0
    assert str(workspace.folder) not in json.dumps(found)


def test_report_of_snakemake_is_complete(workspace: Workspace, tmp_path: Path) -> None:
    workspace.snakemake("--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        names = archive.namelist()
        (page,) = (name for name in names if name.endswith("report.html"))
        text = archive.read(page).decode()
        videos = [name for name in names if name.endswith("renders.mp4")]
        video = archive.read(videos[0])
    assert len(videos) == 1
    assert video == (workspace.results / "ada/animation/talk/renders.mp4").read_bytes()
    for expected in (
        "Avatars",
        "Animations",
        "Evaluation",
        "Overview",
        "prepare_mmdm",
        "sample_views",
        "ada",
    ):
        assert expected in text, expected


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


def test_guidance_reruns_sampling_and_later_but_not_tracking(workspace: Workspace) -> None:
    counts = workspace.planned("--config", "sampling={guidance_scale: 3.5}")
    # All of the section `sampling` is what the three stages of views depend on.
    assert counts == {
        "plan_views": 1, "encode_references": 1, "sample_views": 4, "decode_views": 2,
        **AFTER_SAMPLING,
    }  # fmt: skip


@pytest.fixture
def checkout(workspace: Workspace, tmp_path: Path) -> Iterator[Path]:
    """Another checkout of this project, in which a test may edit files, for the same results."""
    for name in ("Snakefile", "rules", "workflow_scripts", "cap4d_core", "profiles", "docs"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / name, copy_function=os.symlink,
                ignore=shutil.ignore_patterns("__pycache__"),
            )  # fmt: skip
        else:
            shutil.copy(source, tmp_path / name)
    workspace.root = tmp_path
    yield tmp_path
    workspace.root = ROOT


def edit(path: Path, before: str, after: str) -> None:
    """Replaces text in a copy of a linked file."""
    text = path.read_text()
    assert before in text
    path.unlink()
    path.write_text(text.replace(before, after))


def test_documentation_and_formatting_rerun_nothing(workspace: Workspace, checkout: Path) -> None:
    edit(checkout / "docs" / "usage.md", "#", "# New:")
    edit(
        checkout / "rules" / "sample.smk", "    message:\n", "\n\n    # A comment.\n    message:\n"
    )
    edit(checkout / "rules" / "sample.smk", "sampling views, round", "round")
    edit(checkout / "workflow_scripts" / "sample_views.py", "def main", "# Clearer now.\ndef main")
    edit(checkout / "cap4d_core" / "diffusion" / "sampler.py", "import", "# Sorted.\nimport")
    assert workspace.planned() == {}


def test_algorithm_version_reruns_its_stage_and_later(workspace: Workspace, checkout: Path) -> None:
    old = STAGE_VERSIONS["decode_views"]
    edit(
        checkout / "cap4d_core" / "versions.py",
        f'"decode_views": {old}', f'"decode_views": {old + 1}',
    )  # fmt: skip
    assert workspace.planned() == {"decode_views": 2, **AFTER_SAMPLING}


@pytest.fixture(scope="module")
def people(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Another workflow with two people of its own and the assets of the first; run once."""
    space = Workspace(tmp_path_factory.mktemp("people"))
    space.variables = workspace.variables
    demo = workspace.results / "demo"
    rows = ["subject\ttracking"]
    for name in ("bea", "cid"):
        shutil.copytree(demo / "subjects" / "ada", space.folder / "photos" / name)
        rows.append(f"{name}\tphotos/{name}")
    (space.folder / "subjects.tsv").write_text("\n".join(rows) + "\n")
    (space.folder / "driving.tsv").write_text(
        f"driving\tfit\ttrajectory\ntalk\t{demo}/driving/talk/fit.npz"
        f"\t{demo}/driving/talk/orbit.npz\n"
    )
    settings = yaml.safe_load(CONFIG.read_text())
    settings["head_model"] = {"path": str(demo / "head")}
    settings["sampling"]["num_views"] = 0
    settings["subjects"], settings["driving"] = "subjects.tsv", "driving.tsv"
    space.config = space.folder / "config.yaml"
    space.config.write_text(yaml.safe_dump(settings))
    space.snakemake("all", "results/assets/mmdm")
    return space


def test_assets_of_another_workflow_are_taken_from_the_cache(
    workspace: Workspace, people: Workspace
) -> None:
    """Head model, weights, driving tracks: nothing is computed twice."""
    for job in ("prepare_head_model", "prepare_mmdm", "track_driving/talk"):
        assert "taken from the cache, nothing computed" not in workspace.log(job), job
        assert "taken from the cache, nothing computed" in people.log(job), job
    for name in ("assets/mmdm", "assets/head_model", "driving/talk"):
        mine = sorted(p for p in (workspace.results / name).rglob("*.safetensors"))
        mine += sorted(p for p in (workspace.results / name).rglob("*.npz"))
        assert mine, name
        for path in mine:
            other = people.results / path.relative_to(workspace.results)
            assert path.read_bytes() == other.read_bytes(), path
    assert "Nothing to be done" in people.snakemake()


def test_damaged_cached_asset_is_found_and_made_again(
    people: Workspace, saw_fault: Callable[..., None]
) -> None:
    weights = people.results / "assets" / "mmdm"
    expected = {p.name: p.read_bytes() for p in weights.glob("*.safetensors")}
    shutil.rmtree(weights)
    (entry,) = (Path(people.variables["CAP4D_CACHE"]) / "prepare_mmdm").iterdir()
    damaged = max((entry / "files").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.unlink()  # a link to the first workflow's file
    damaged.write_bytes(content)
    people.snakemake("results/assets/mmdm")
    log = people.log("prepare_mmdm")
    assert f"the cached copy is damaged: {damaged.name} has SHA-256" in log
    assert "It is made again" in log and "nothing computed" not in log
    assert {p.name: p.read_bytes() for p in weights.glob("*.safetensors")} == expected
    saw_fault(
        "file in the cache is damaged",
        "that entry; found by its SHA-256 before it is used",
        "the job that makes it",
        "nothing",
    )


def test_changed_photo_reruns_only_its_subject(people: Workspace) -> None:
    """Overwritten in place, which leaves the time of its folder as it was."""
    photo = sorted((people.folder / "photos" / "bea").rglob("*.png"))[0]
    folder_time = photo.parent.stat().st_mtime_ns
    Image.fromarray(255 - np.asarray(Image.open(photo))).save(photo)
    os.utime(photo, (photo.stat().st_atime, photo.stat().st_mtime + 10))
    assert photo.parent.stat().st_mtime_ns == folder_time
    plan = people.snakemake("-n")
    assert set(re.findall(r"^Job \d+: (\w+): ", plan, re.MULTILINE)) == {"bea"}
    assert job_counts(plan) == {
        "track_subject": 1, "crop_references": 1, "fit_avatar": 1, "animate_avatar": 1,
        "write_report": 1, "all": 1,
    }  # fmt: skip


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
