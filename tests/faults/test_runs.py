"""Faults of whole runs: two at once, a killed one, a killed job."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cap4d_core.files.basic import read_safetensors
from tests.workflow.tiny_run import TinyRun, log_of, processes_in

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(900)]

SawFault = Callable[..., None]
SHARD = "results/ada/views/rounds/1/1-of-1.safetensors"
CHECKPOINT = "results/ada/views/rounds/1/checkpoints/1-of-1.safetensors"


@pytest.fixture(scope="module")
def long_shard(tiny_results: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A shard of some ten seconds, made without a disturbance (`expected`) and then removed."""
    run = tiny_results.copy(tmp_path_factory.mktemp("long") / "run")
    run.settings = ("sampling={num_inference_steps: 250, num_shards: 1, sync_steps: []}",)
    run.run(SHARD)
    (run.folder / SHARD).rename(run.folder / "expected")
    return run


def assert_same_bits(run: TinyRun) -> None:
    latents = [read_safetensors(run.folder / name)[0]["latents"] for name in (SHARD, "expected")]
    assert torch.equal(*latents)


def test_two_runs(long_shard: TinyRun, tmp_path: Path, saw_fault: SawFault) -> None:
    run = long_shard.copy(tmp_path / "run")
    first = run.start(SHARD)
    first.wait_until((run.folder / CHECKPOINT).exists, 120, "checkpoint")
    same_folder = run.fail(SHARD)
    assert "Directory cannot be locked" in same_folder
    # Elsewhere, but with the same results.
    other = replace(run, folder=tmp_path / "other")
    other.folder.mkdir()
    other = replace(other, settings=(*run.settings, f"results={run.results}"))
    shared = other.fail(str(run.folder / SHARD))
    held = re.search(
        r"another run writes there \(process (\d+) on \S+, started in (\S+) at", shared
    )
    assert held and int(held[1]) == first.process.pid and held[2] == str(run.folder), shared
    assert "Wait until it ends, or give this run another 'results:' folder" in shared
    assert "Traceback" not in shared
    first.wait(300)
    assert_same_bits(run)
    saw_fault(
        "two runs in one folder", "nothing", "the second one ends at once and says why",
        "wait for the first",
    )  # fmt: skip
    saw_fault(
        "two runs of different folders, one results folder", "nothing",
        "the second one ends at once and names host, process and folder of the first",
        "wait for the first, or another `results:`",
    )  # fmt: skip


def test_killed_run(long_shard: TinyRun, tmp_path: Path, saw_fault: SawFault) -> None:
    """Its job goes on; the same job of the next run waits instead of writing the same files."""
    run = long_shard.copy(tmp_path / "run")
    first = run.start(SHARD)
    first.wait_until((run.folder / CHECKPOINT).exists, 120, "checkpoint")
    first.kill()
    orphans = processes_in(run.folder)
    assert orphans
    assert "--unlock" in run.fail(SHARD)
    run.run(options=("--unlock",))
    start = time.monotonic()
    output = run.run(SHARD)
    assert re.search(rf"1-of-1\.lock: held by process ({'|'.join(map(str, orphans))}) on", output)
    assert_same_bits(run)
    assert not processes_in(run.folder)
    saw_fault(
        "Snakemake is killed (SIGKILL), local jobs go on",
        "nothing or one job: the job of the next run waits for the old process, then runs",
        f"{time.monotonic() - start:.0f} s (a shard of some ten seconds, run to its end twice)",
        "`snakemake --unlock`, then the same command",
    )


def test_killed_job(long_shard: TinyRun, tmp_path: Path) -> None:
    """SIGKILL of one job, as by the kernel when memory is short; the retry goes on."""
    run = long_shard.copy(tmp_path / "run")
    snakemake = run.start(SHARD, options=("--retries", "1"))
    snakemake.wait_until((run.folder / CHECKPOINT).exists, 120, "checkpoint")
    for pid in processes_in(run.folder):
        if pid != snakemake.process.pid:
            os.kill(pid, signal.SIGKILL)
    assert "Trying to restart job" in snakemake.wait(300)
    assert "Resuming at step" in log_of(run.results, "sample_views/ada/1/1-of-1.log")
    assert_same_bits(run)
