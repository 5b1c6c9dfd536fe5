"""What ends jobs on a cluster: dying nodes, preemption, limits, a killed Snakemake.

The work is one shard of sampling that takes long enough to be interrupted. In every case its result
must have the bits of an undisturbed run.
"""

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
from tests.slurm.cluster import GPUS_PER_NODE, NODES, Cluster
from tests.slurm.conftest import on_slurm
from tests.workflow.tiny_run import RunningSnakemake, TinyRun, log_of, processes_in

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# Steps of the shard; a checkpoint after every fifth.
STEPS = 125
SHARD = "results/ada/views/rounds/1/1-of-1.safetensors"
LOG = "sample_views/ada/1/1-of-1.log"
CHECKPOINT = "ada/views/rounds/1/checkpoints/1-of-1.safetensors"
SawFault = Callable[..., None]


@pytest.fixture(scope="module")
def long_shard(tiny_results: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """All that the shard needs, and the shard itself as `expected`, made without a disturbance."""
    run = tiny_results.copy(tmp_path_factory.mktemp("long") / "run")
    run.settings = (
        f"sampling={{num_inference_steps: {STEPS}, num_shards: 1, sync_steps: []}}",
    )  # fmt: skip
    run.run(SHARD)
    (run.folder / SHARD).rename(run.folder / "expected")
    return run


@pytest.fixture
def run(long_shard: TinyRun, idle_cluster: Cluster, tmp_path: Path) -> TinyRun:
    """The same on the cluster, with everything done but the shard."""
    return on_slurm(long_shard.copy(tmp_path / "run"), idle_cluster, tmp_path / "run")


def stop_at_checkpoint(run: TinyRun, snakemake: RunningSnakemake) -> int:
    """Stops the shard's process as soon as it has saved something; returns the next step.

    However slow the rest of a test is, the job cannot end before it is disturbed.
    """
    path = run.results / CHECKPOINT
    snakemake.wait_until(path.exists, 300, "checkpoint")
    for pid in shard_processes(run):
        os.kill(pid, signal.SIGSTOP)
    return saved_step(path)


def shard_processes(run: TinyRun) -> list[int]:
    """Processes of the script, not those of SLURM and Snakemake around it."""
    found = [
        pid
        for pid in processes_in(run.folder)
        if b".snakemake/scripts" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert found
    return found


def saved_step(path: Path) -> int:
    return int(read_safetensors(path)[1]["next_step"])


def resumed_step(run: TinyRun) -> int:
    """Where the last attempt began, from its log."""
    found = re.search(r"Resuming at step (\d+)", log_of(run.results, LOG))
    assert found, log_of(run.results, LOG)
    return int(found[1])


def assert_same_bits(run: TinyRun) -> None:
    latents = [read_safetensors(run.folder / name)[0]["latents"] for name in (SHARD, "expected")]
    assert torch.equal(*latents)
    assert not (run.results / CHECKPOINT).exists()


def wait_for_second_start(run: TinyRun, snakemake: RunningSnakemake, timeout: float = 300) -> None:
    def has_resumed() -> bool:
        log = run.results / "logs" / LOG
        return log.exists() and "Resuming at step" in log.read_text()

    snakemake.wait_until(has_resumed, timeout, "second start")


def test_node_dies(run: TinyRun, idle_cluster: Cluster, saw_fault: SawFault) -> None:
    snakemake = run.start(SHARD)
    number, node = idle_cluster.wait_for_running_job()
    saved = stop_at_checkpoint(run, snakemake)
    idle_cluster.kill_node(node)
    killed = time.monotonic()
    idle_cluster.start_requeued_job(number)
    noticed = time.monotonic() - killed
    wait_for_second_start(run, snakemake)
    back = time.monotonic() - killed
    snakemake.wait(600)
    assert resumed_step(run) == saved
    assert f"SLURMD_NODENAME {'n2' if node == 'n1' else 'n1'}" in log_of(run.results, LOG)
    assert_same_bits(run)
    saw_fault(
        "node dies in the middle of a shard",
        f"the steps since the last checkpoint (resumed at step {saved} of {STEPS - 1}), no output",
        f"{back:.0f} s ({noticed:.0f} s until SLURM noticed, SlurmdTimeout 10 s; its wait of "
        "2 min before a requeued job starts was cut short)",
        "nothing",
    )


def test_preemption(run: TinyRun, idle_cluster: Cluster, saw_fault: SawFault) -> None:
    snakemake = run.start(SHARD)
    number, _ = idle_cluster.wait_for_running_job()
    saved = stop_at_checkpoint(run, snakemake)
    # All GPUs are taken by somebody more important, for a short time.
    urgent = [
        idle_cluster.call(
            "sbatch", "--parsable", "-p", "urgent", "--gpus", "1", "--mem", "100",
            "-o", "/dev/null", "--wrap", "sleep 2",
        ).strip()
        for _ in range(NODES * GPUS_PER_NODE)
    ]  # fmt: skip
    preempted = time.monotonic()
    idle_cluster.start_requeued_job(number)
    wait_for_second_start(run, snakemake)
    back = time.monotonic() - preempted
    snakemake.wait(600)
    assert resumed_step(run) == saved
    assert_same_bits(run)
    ended = {job.number: job.state for job in idle_cluster.ended_jobs()}
    assert all(ended[int(job)] == "COMPLETED" for job in urgent)
    saw_fault(
        "job is preempted and queued again",
        f"the steps since the last checkpoint (resumed at step {resumed_step(run)}), no output",
        f"{back:.0f} s, of which 2 s the other job (SLURM's wait of 2 min was cut short)",
        "nothing",
    )


def test_time_limit(run: TinyRun, idle_cluster: Cluster, saw_fault: SawFault) -> None:
    """The first attempt has eight seconds of three minutes; the second has ten minutes."""
    run.environment["CAP4D_TIME_LIMIT_MARGIN_S"] = "172"
    limit = ("--set-resources", "sample_views:runtime=3 if attempt == 1 else 10")
    # Checkpoints are due less often than the time is over: what is resumed was saved at the end.
    run.settings = (run.settings[0].replace("}", ", checkpoint_every_steps: 100000}"),)
    output = run.run(SHARD, options=limit)
    failed = re.search(r"stopped after (\d+) of \d+ \(step\)", output)
    assert failed and "The time limit of 3 min is near" in output
    assert resumed_step(run) == int(failed[1])
    assert "time limit 10 min" in log_of(run.results, LOG)
    assert_same_bits(run)
    states = [job.state for job in idle_cluster.ended_jobs()[-2:]]
    assert states == ["FAILED", "COMPLETED"]  # not TIMEOUT: SLURM had nothing to kill
    saw_fault(
        "time limit comes near",
        f"nothing (stopped and resumed at step {failed[1]})",
        "one more job start; the next attempt gets more time",
        "nothing; raise `runtime` if it happens often",
    )


def test_out_of_memory(run: TinyRun, idle_cluster: Cluster, saw_fault: SawFault) -> None:
    limit = ("--set-resources", "sample_views:mem_mb=320 if attempt == 1 else 4000")
    start = time.monotonic()
    output = run.run(SHARD, options=limit)
    assert "Trying to restart job" in output
    assert_same_bits(run)
    first, second = idle_cluster.ended_jobs()[-2:]
    assert first.state in ("FAILED", "OUT_OF_MEMORY") and second.state == "COMPLETED"
    saw_fault(
        "out of memory",
        "the attempt, from its last checkpoint on",
        f"{(second.start - first.end).total_seconds():.0f} s from the kill to the start of the "
        f"next attempt with more memory ({time.monotonic() - start:.0f} s in all)",
        "nothing; raise `mem_mb` if it happens often",
    )


def test_snakemake_is_killed(run: TinyRun, idle_cluster: Cluster, saw_fault: SawFault) -> None:
    """Its jobs go on; the next run must not start a second writer beside them."""
    snakemake = run.start(SHARD)
    number, _ = idle_cluster.wait_for_running_job()
    stop_at_checkpoint(run, snakemake)
    snakemake.kill()
    assert idle_cluster.queue()[number][0] == "RUNNING"
    refused = run.fail(SHARD)
    assert "Directory cannot be locked" in refused and "--unlock" in refused
    assert idle_cluster.queue()[number][0] == "RUNNING"  # a refused run cancels nothing
    run.run(options=("--unlock",))
    start = time.monotonic()
    again = run.start(SHARD)
    wait_for_second_start(run, again)
    back = time.monotonic() - start
    output = again.wait(600)
    assert f"Cancelled SLURM jobs that an earlier run left behind: {number}" in output
    assert_same_bits(run)
    old, new = idle_cluster.ended_jobs()[-2:]
    assert (old.number, old.state, new.state) == (number, "CANCELLED", "COMPLETED")
    assert old.end <= new.start
    saw_fault(
        "Snakemake is killed (SIGKILL), cluster jobs go on",
        f"the steps since the last checkpoint (resumed at step {resumed_step(run)}), no output",
        f"{back:.0f} s after the next start, which cancels the old jobs",
        "`snakemake --unlock`, then the same command",
    )


def test_runs_of_other_results_are_left_alone(run: TinyRun, idle_cluster: Cluster) -> None:
    """Two experiments in one folder: the start of one must not cancel the other's jobs."""
    first = run.start(SHARD)
    number, _ = idle_cluster.wait_for_running_job()
    stop_at_checkpoint(run, first)
    payload = shard_processes(run)
    other = replace(run, settings=("results=results-b", "sampling={num_views: 0}"))
    second = other.start("results-b/demo/driving/talk/fit.npz")
    second.wait_until(lambda: "Execute" in second.output(), 120, "start of the other run")
    assert idle_cluster.queue()[number][0] == "RUNNING"
    for pid in payload:
        os.kill(pid, signal.SIGCONT)
    first.wait(600)
    second.wait(600)
    assert_same_bits(run)
    assert all(
        job.state == "COMPLETED" for job in idle_cluster.ended_jobs() if job.number >= number
    )


def test_interrupted_by_the_user(run: TinyRun, idle_cluster: Cluster) -> None:
    """Ctrl-C cancels the jobs and needs no flag afterwards."""
    snakemake = run.start(SHARD)
    number, _ = idle_cluster.wait_for_running_job()
    saved = stop_at_checkpoint(run, snakemake)
    snakemake.process.send_signal(signal.SIGINT)
    snakemake.process.wait(120)
    assert snakemake.process.returncode == 1
    end = time.monotonic() + 30
    while number in idle_cluster.queue() and time.monotonic() < end:
        time.sleep(0.2)
    assert number not in idle_cluster.queue()
    run.run(SHARD)
    assert resumed_step(run) == saved
    assert_same_bits(run)
