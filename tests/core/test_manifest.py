"""manifest.json: complete, ordered, and free of places and secrets."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cap4d_core.job import Job, job_file_path, write_job_file
from cap4d_core.manifest import FILE_NAME, describe, git_commit, manifest, public, upstream_jobs
from tests.core.test_learned_resources import HEADER


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, text: str = "x") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


class Run:
    """Results of a short chain: photos -> tracking -> two shards -> avatar."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "results"
        photos = folder / "private" / "photos"
        write(photos / "a.jpg", "photo")
        self.head = self.results / "assets" / "head_model"
        write(self.head / "flame.npz", "head")
        origin = {"flame.npz": {"source": "/home/someone/flame.pkl", "sha256": sha("pickle")}}
        write(self.head / "provenance.json", json.dumps(origin))
        self.job("prepare_head_model", "", {"source": ["/home/someone"]}, [self.head])
        fit = self.results / "ana" / "tracking" / "fit.npz"
        self.job("track_subject", "ana", {"recording": [str(photos)], "head_model": [self.head]},
                 [fit], {"smoothness": 1.0})  # fmt: skip
        shards = []
        for number in (1, 2):
            shards.append(self.results / "ana" / "rounds" / f"{number}-of-2.safetensors")
            self.job("sample_views", f"ana/1/{number}-of-2", {"fit": [fit]}, [shards[-1]],
                     {"seed": 124, "guidance_scale": 2.0})  # fmt: skip
        # Left from another way of making avatars, which this one does not use.
        self.job("crop_references", "ana", {"fit": [fit]}, [self.results / "ana" / "crops.json"])
        self.avatar = self.results / "ana" / "avatar"
        self.fit_job = self.job(
            "fit_avatar", "ana", {"generated": shards, "head_model": [self.head], "lpips": []},
            [self.avatar / "avatar.safetensors"],
            {"seed": 3, "lpips_weights": "/home/someone/vgg.pth",
             "lpips_url": "https://me:pass@host.org/vgg.pth?token=1"},
        )  # fmt: skip

    def job(
        self, rule: str, name: str, inputs: dict[str, list[Any]], outputs: list[Path],
        settings: dict[str, Any] | None = None,
    ) -> Job:  # fmt: skip
        """Writes what a finished job leaves."""
        log = self.results / "logs" / (f"{rule}/{name}.log" if name else f"{rule}.log")
        for output in outputs:
            if not output.is_dir():
                write(output, f"{rule} {name}")
        job = Job(
            rule,
            {key: [str(path) for path in paths] for key, paths in inputs.items()},
            {"made": [str(path) for path in outputs]},
            {"version": 1} | ({"settings": settings} if settings is not None else {}),
            {"subject": "ana"} if name else {},
            str(log),
            threads=2,
        )
        write_job_file(job_file_path(log), job)
        benchmark = self.results / "benchmarks" / log.relative_to(self.results / "logs")
        write(benchmark.with_suffix(".tsv"), f"{HEADER}\n10.5" + "\t1" * 9 + "\n")
        return job


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_jobs_before_are_those_that_the_inputs_come_from(run: Run) -> None:
    rules = [job.rule for job in upstream_jobs(run.fit_job)]
    assert rules == ["prepare_head_model", "sample_views", "sample_views", "track_subject"]


def test_content(run: Run) -> None:
    found = describe(run.fit_job, run.avatar, 12.345)
    assert found["rule"] == "fit_avatar" and found["seconds"] == 12.35
    assert found["wildcards"] == {"subject": "ana"} and found["stage_version"] == 1
    assert found["seeds"] == {"fit_avatar": 3, "sample_views": 124}
    assert found["inputs"]["generated"] == {
        f"{i}-of-2.safetensors": sha(f"sample_views ana/1/{i}-of-2") for i in (1, 2)
    }
    assert list(found["inputs"]["head_model"]) == ["head_model/"]
    assert list(found["sources"]) == ["track_subject"]
    assert found["assets"] == {"head_model": {"flame.npz": {"sha256": sha("pickle")}}}
    name = "avatar.safetensors"
    assert found["outputs"] == {name: {"bytes": 14, "sha256": sha("fit_avatar ana")}}
    sampled = found["made_before"]["sample_views"]
    assert sampled["jobs"] == 2 and sampled["seconds"] == 21.0
    assert sampled["settings"] == {"guidance_scale": 2.0, "seed": 124}
    assert {"torch", "numpy", "Python", "cap4d_core", "diffusers"} <= set(found["software"])
    assert found["hardware"]["threads"] == 2 and found["hardware"]["cpu"]


def test_no_places_no_names_no_secrets(run: Run, tmp_path: Path) -> None:
    text = json.dumps(describe(run.fit_job, run.avatar, 1.0))
    for word in (str(tmp_path), "/home", "someone", "private", "token", "pass", platform.node()):
        assert word not in text, word
    assert "vgg.pth" in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/a.npz", "a.npz"),
        ("../secret/b.npz", "b.npz"),
        ("~/c", "c"),
        ("data/d.npz", "data/d.npz"),
        ("https://u:p@host.org:8080/x/e.ckpt?sig=1#f", "https://host.org/x/e.ckpt"),
        (["/a/b", 1, None], ["b", 1, None]),
        ({"k": {"path": "/a/b"}}, {"k": {"path": "b"}}),
    ],
)
def test_public(value: Any, expected: Any) -> None:
    assert public(value) == expected


def test_keys_are_in_order_and_the_rest_is_the_same_again(run: Run) -> None:
    first, second = (describe(run.fit_job, run.avatar, 1.0) for _ in range(2))
    assert json.dumps(first | {"finished": ""}) == json.dumps(second | {"finished": ""})
    assert list(first) == sorted(first) and list(first["software"]) == sorted(first["software"])


def test_only_a_finished_job_has_a_manifest(run: Run) -> None:
    with manifest(run.fit_job, run.avatar):
        pass
    assert json.loads((run.avatar / FILE_NAME).read_text())["format"] == 1
    with pytest.raises(ValueError, match="broken"), manifest(run.fit_job, run.avatar):
        raise ValueError("broken")
    assert not (run.avatar / FILE_NAME).exists()


def test_job_outside_a_workflow(tmp_path: Path) -> None:
    job = Job("fit_avatar", {"references": [str(tmp_path / "absent")]}, {}, {})
    found = describe(job, tmp_path, 1.0)
    assert found["made_before"] == {} and found["inputs"] == {"references": {}}


def test_damaged_job_files_are_passed_over(run: Run) -> None:
    next((run.results / "logs" / "track_subject").glob("*.json")).write_text("{")
    rules = {job.rule for job in upstream_jobs(run.fit_job)}
    assert rules == {"prepare_head_model", "sample_views"}


def test_commit_is_that_of_the_package_not_of_a_folder_around_it(tmp_path: Path) -> None:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
                "GIT_COMMITTER_EMAIL": "a@b"}  # fmt: skip

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True,
                       env={**os.environ, **identity})  # fmt: skip

    package = tmp_path / "package"
    write(package / "__init__.py")
    assert git_commit(package) is None
    git("init", "-q")
    assert git_commit(package) is None
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git_commit(package)
    assert commit is not None and len(commit) == 40
    write(package / "__init__.py", "changed")
    assert git_commit(package) == f"{commit}+changes"
