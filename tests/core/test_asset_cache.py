"""The cache between workflows: hits, misses, damage, races."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cap4d_core.batch import asset_cache
from cap4d_core.batch.asset_cache import (
    CACHE_VARIABLE,
    compiled_folder,
    content_hash,
    through_cache,
)
from cap4d_core.job import Job


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Work:
    """Counts how often it is done; writes two files."""

    def __init__(self, folder: Path, text: str = "made") -> None:
        self.folder, self.text, self.times = folder, text, 0

    def __call__(self) -> None:
        self.times += 1
        (self.folder / "sub").mkdir(parents=True)
        (self.folder / "sub" / "a.bin").write_text(self.text)
        (self.folder / "last.json").write_text("{}")


Run = Callable[..., Work]


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Run:
    """Runs the job in a workflow's folder of its own."""

    def run_in(workflow: str, source: str = "input", params: int = 1, version: int = 1) -> Work:
        folder = tmp_path / workflow / "results" / "assets"
        (tmp_path / workflow).mkdir(exist_ok=True)
        (tmp_path / workflow / "source").write_text(source)
        shutil.rmtree(folder, ignore_errors=True)
        values = {"version": version, "size": params, "irrelevant": workflow}
        job = Job("prepare_thing", {}, {"folder": [str(folder)]}, values)
        work = Work(folder)
        inputs = {"source": tmp_path / workflow / "source"}
        through_cache(job, folder, inputs, work, params=["size"])
        assert (folder / "sub" / "a.bin").read_text() == "made"
        assert (folder / "last.json").read_text() == "{}"
        return work

    return run_in


def only_entry(cache: Path) -> Path:
    (entry,) = (cache / "prepare_thing").iterdir()
    return entry


def test_second_workflow_takes_what_the_first_made(run: Run, cache: Path, tmp_path: Path) -> None:
    assert run("one").times == 1
    assert run("two").times == 0
    # Not a second copy on the disk, and nothing else is left there.
    inodes = {(tmp_path / w / "results/assets/sub/a.bin").stat().st_ino for w in ("one", "two")}
    assert inodes == {(only_entry(cache) / "files" / "sub" / "a.bin").stat().st_ino}
    assert not [p for p in tmp_path.rglob("*") if ".tmp-" in p.name or ".new-" in p.name]


@pytest.mark.parametrize("change", [{"source": "other"}, {"params": 2}, {"version": 2}], ids=str)
def test_other_contents_settings_and_versions_are_others(run: Run, change: dict[str, int]) -> None:
    assert run("one").times == 1
    assert run("two", **change).times == 1
    assert run("three").times == 0


@pytest.mark.parametrize("damage", ["changed", "truncated", "gone", "no list"])
def test_damaged_entry_is_said_and_made_again(
    run: Run, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run("one")
    path = only_entry(cache) / "files" / "sub" / "a.bin"
    os.unlink(path) if damage != "no list" else None
    if damage == "changed":
        path.write_text("edam")
    elif damage == "truncated":
        path.write_text("ma")
    elif damage == "no list":
        (only_entry(cache) / "entry.json").write_text('{"files"')
    with caplog.at_level(logging.WARNING):
        assert run("two").times == 1
    expected = {
        "changed": "has SHA-256", "truncated": "has 2 bytes, 4 were written",
        "gone": "is unreadable", "no list": "entry.json is unreadable",
    }  # fmt: skip
    assert expected[damage] in caplog.text and "It is made again" in caplog.text
    assert run("three").times == 0  # the entry is whole again


def test_single_outputs_are_new_files(cache: Path, tmp_path: Path) -> None:
    """Snakemake would run everything after a file that is older than its input."""
    (tmp_path / "source").write_text("x")
    for workflow, times in (("one", 1), ("two", 0)):
        folder = tmp_path / workflow
        job = Job("track", {}, {"fit": [str(folder / "last.json")]}, {"version": 1})
        work = Work(folder)
        through_cache(job, folder, {"source": tmp_path / "source"}, work)
        assert work.times == times
        if workflow == "one":
            for file in (cache / "track").rglob("*"):
                os.utime(file, (1, 1))
    assert (tmp_path / "two" / "last.json").stat().st_mtime > 1e9


def test_without_a_cache_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    work = Work(tmp_path / "out")
    # Not even the inputs are read.
    through_cache(
        Job("x", {}, {}, {"version": 1}), tmp_path / "out", {"a": tmp_path / "absent"}, work
    )
    assert work.times == 1 and compiled_folder() is None


def test_cache_that_cannot_be_written_only_costs_a_warning(
    run: Run, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert run("one").times == 1
    assert "not kept in the cache" in caplog.text


def test_two_workflows_may_store_at_once(
    run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = asset_cache._store

    def store_after_another(entry: Path, folder: Path, *others: object) -> None:
        store(entry, folder, *others)  # type: ignore[arg-type]
        store(entry, folder, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(asset_cache, "_store", store_after_another)
    assert run("one").times == 1
    only_entry(cache)
    assert run("two").times == 0


def test_a_failed_job_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no")

    (tmp_path / "source").write_text("x")
    job = Job("x", {}, {}, {"version": 1})
    with pytest.raises(ValueError, match="no"):
        through_cache(job, tmp_path / "out", {"source": tmp_path / "source"}, fail)
    assert not (cache / "x").exists()


def test_content_hash_goes_by_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("x")
        (tmp_path / name / "provenance.json").write_text(name)  # says where it was made
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "sub" / "file").rename(tmp_path / "b" / "sub" / "other")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    file = tmp_path / "a" / "sub" / "file"
    assert content_hash(file) == content_hash([file]) != content_hash([file, file])


def test_compiled_kernels_share_a_folder(cache: Path) -> None:
    assert compiled_folder() == cache.resolve() / "compiled"
