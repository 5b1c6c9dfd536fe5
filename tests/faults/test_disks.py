"""Faults of disks: full, truncated, late, with wrong clocks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workflow.snakemake_runs import ROOT
from tests.workflow.tiny_run import TinyRun, log_of

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(900)]

SawFault = Callable[..., None]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own that is full after so many megabytes."""
    folder.mkdir(parents=True)
    options = f"size={megabytes}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "cap4d-test", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_kb: int) -> Path:
    """A file that leaves only so much room."""
    path = folder / "filler"
    free = shutil.disk_usage(folder).free
    path.write_bytes(bytes(max(free - leave_kb * 1000, 0)))
    return path


def unfinished_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp-*"))


def test_full_disk(tiny_results: TinyRun, tmp_path: Path, saw_fault: SawFault) -> None:
    """Results, logs and Snakemake's own records on the disk that fills up."""
    disk = tmp_path / "disk"
    size = sum(p.stat().st_size for p in tiny_results.folder.rglob("*") if p.is_file())
    with small_disk(disk, 2 * size // 1_000_000 + 30):
        run = tiny_results.copy(disk / "run")
        run.environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        run.log_folder = tmp_path
        weights = run.results / "assets" / "mmdm"
        expected = {p.name: p.read_bytes() for p in weights.glob("*.safetensors")}
        assert sum(map(len, expected.values())) > 6_000_000
        shutil.rmtree(weights)
        # Room for logs, records and some of the weights.
        filler = fill(disk, leave_kb=4000)
        # The estimate before a run would see it coming.
        unchecked = ("--config", "check_disk_space=false")
        assert "only" in (refused := run.fail("results/assets/mmdm")) and "are free" in refused
        output = run.fail("results/assets/mmdm", options=unchecked)
        assert "The disk is full, or a quota is used up" in output, output
        assert f"{run.results / 'assets'}" in output  # where
        assert not weights.exists() and not unfinished_files(run.results)
        # Not even a log can be written now: Snakemake itself stops.
        with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as handle:
            while True:
                handle.write(bytes(4096))
        assert "No space left on device" in run.fail("results/assets/mmdm", options=unchecked)
        filler.unlink()
        start = time.monotonic()
        run.run("results/assets/mmdm")
        again = time.monotonic() - start
        assert {p.name: p.read_bytes() for p in weights.glob("*.safetensors")} == expected
    saw_fault(
        "disk full during a write",
        "the job that wrote; no truncated file",
        f"that job again ({again:.0f} s with the start of Snakemake)",
        "make room, the same command again",
    )


def test_truncated_output(tiny_results: TinyRun, tmp_path: Path, saw_fault: SawFault) -> None:
    """A disk that lost the end of a file after the job was done (a server that lost power)."""
    run = tiny_results.copy(tmp_path / "run")
    shard = run.results / "ada/views/rounds/2/2-of-2.safetensors"
    expected = shard.read_bytes()
    times = shard.stat()
    shard.write_bytes(expected[: len(expected) // 2])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    index = run.results / "ada/views/generated_images/index/2-of-2.json"
    index.unlink()
    output = run.fail()
    # Named in the console, with what to do; nothing was made from half a file.
    assert re.search(r"2/2-of-2\.safetensors: found unreadable content", output), output
    assert "Delete it and run the workflow again." in output
    assert not index.exists()
    shard.unlink()
    start = time.monotonic()
    run.run("sample_all")
    again = time.monotonic() - start
    assert shard.read_bytes() == expected and index.exists()
    saw_fault(
        "crash leaves a truncated output",
        "that file, and what is made from it",
        f"two jobs ({again:.0f} s)",
        "delete the file that the log names, the same command again",
    )


def test_truncated_checkpoint(tiny_results: TinyRun, tmp_path: Path, saw_fault: SawFault) -> None:
    run = tiny_results.copy(tmp_path / "run")
    shard = run.results / "ada/views/rounds/2/2-of-2.safetensors"
    expected = shard.read_bytes()
    checkpoint = shard.parent / "checkpoints" / shard.name
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_bytes(expected[:100])
    unfinished = shard.with_name("2-of-2.tmp-4711.safetensors")
    unfinished.write_bytes(expected[:100])
    shard.unlink()
    run.run(str(shard.relative_to(run.folder)))
    assert shard.read_bytes() == expected
    assert not checkpoint.exists() and not unfinished.exists()
    log = log_of(run.results, "sample_views/ada/2/2-of-2.log")
    assert "Starting anew" in log and "removing" in log
    saw_fault(
        "crash leaves a truncated checkpoint",
        "the steps of the interrupted job",
        "at once: the job starts anew",
        "nothing",
    )


LATE = """
rule all:
    input: "second.txt"
rule first:
    output: "first.txt"
    # As on a network disk: the job is done, other machines see the file later.
    shell: "(sleep {seconds}; echo done > {output}.late; mv {output}.late {output}) "
           "> /dev/null 2>&1 & sleep 0.1"
rule second:
    input: "first.txt"
    output: "second.txt"
    shell: "cat {input} > {output}"
"""


def small_workflow(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs rules of a test's own with the entries of the default profile."""
    folder.mkdir(exist_ok=True)
    (folder / "Snakefile").write_text(text)
    return subprocess.run(
        [
            sys.executable, "-m", "snakemake", "--cores", "1",
            "--workflow-profile", str(ROOT / "profiles" / "default"), *words,
        ],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip


def test_late_files(tmp_path: Path, saw_fault: SawFault) -> None:
    seconds = 4
    text = LATE.replace("{seconds}", str(seconds))
    start = time.monotonic()
    result = small_workflow(tmp_path / "a", text)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "a" / "second.txt").read_text() == "done\n"
    waited = time.monotonic() - start
    impatient = small_workflow(tmp_path / "b", text, "--latency-wait", "1")
    assert impatient.returncode == 1
    assert "filesystem latency" in impatient.stdout, impatient.stdout
    saw_fault(
        "files appear late (slow network disk)",
        "nothing",
        f"waits for them: {waited:.0f} s for a file that came {seconds} s late; gives up after "
        "`latency-wait` (15 s, on SLURM 60 s)",
        "nothing; raise `latency-wait` on very slow disks",
    )


SKEWED = """
rule all:
    input: "third.txt"
rule first:
    output: "first.txt"
    shell: "echo 1 > {output}; touch -d '{skew} seconds' {output}"
rule second:
    input: "first.txt"
    output: "second.txt"
    shell: "echo 2 > {output}; touch -d '{other} seconds' {output}"
rule third:
    input: "second.txt"
    output: "third.txt"
    shell: "echo 3 > {output}"
"""


@pytest.mark.parametrize(("skew", "other"), [(-100, -200), (100, -100), (200, 100)])
def test_wrong_clocks(tmp_path: Path, skew: int, other: int, saw_fault: SawFault) -> None:
    """Files dated by nodes whose clocks are minutes off, before or after the others'."""
    text = SKEWED.replace("{skew}", f"{skew:+d}").replace("{other}", f"{other:+d}")
    first = small_workflow(tmp_path / "run", text)
    assert first.returncode == 0, first.stdout
    second = small_workflow(tmp_path / "run", text)
    assert "Nothing to be done" in second.stdout, second.stdout
    saw_fault(
        "clocks of nodes are wrong",
        "nothing: outputs get the time of the machine that runs Snakemake (seen with clocks up to "
        "200 s before and behind)",
        "at once",
        "nothing",
    )
