"""GPU leases: one job per device, whatever happens to the jobs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cap4d_core import gpu
from cap4d_core.errors import NoGpuError

ROOT = Path(__file__).parents[2]
Environment = dict[str, str]
LISTING = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa1111-0000)
  MIG 1g.18gb     Device  0: (UUID: MIG-cccc-1)
  MIG 1g.18gb     Device  1: (UUID: MIG-cccc-2)
GPU 1: NVIDIA RTX A6000 (UUID: GPU-bbbb2222-0000)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fake pool of three GPUs with locks of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CUDA", "CAP4D"))}
    return clean | {
        gpu.LOCK_DIR_VARIABLE: str(tmp_path / "locks"),
        gpu.POOL_VARIABLE: "0,1,2",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def start(environment: Environment) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `lease -- command` processes and ends those that are left."""
    started = []

    def popen(*words: str, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cap4d_core", "lease", *words],
            env=environment | changes,
            text=True,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def lease(environment: Environment, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cap4d_core", "lease", *words],
        env=environment,
        text=True,
        capture_output=True,
    )


def holding(process: subprocess.Popen[str]) -> str:
    """Waits until a command started with `echo` has its lease; returns its device."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = ("--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exec sleep 60")


def test_exit_code_and_device(environment: Environment) -> None:
    result = lease(environment, "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 7")
    assert result.returncode == 7
    assert result.stdout.strip() in ("0", "1", "2")


def test_concurrent_jobs_get_devices_of_their_own(
    start: Callable[..., subprocess.Popen[str]], environment: Environment
) -> None:
    jobs = [start(*HOLD) for _ in range(3)]
    assert {holding(job) for job in jobs} == {"0", "1", "2"}
    refused = lease(environment, "--timeout", "0.3", "--", "true")
    assert refused.returncode == 1
    assert "No GPU became free within 0.3 s" in refused.stderr


def test_killed_job_frees_its_device(
    start: Callable[..., subprocess.Popen[str]], environment: Environment
) -> None:
    jobs = [start(*HOLD) for _ in range(3)]
    devices = [holding(job) for job in jobs]
    jobs[1].kill()
    result = lease(environment, "--timeout", "20", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert result.stdout.strip() == devices[1]


def test_orphan_keeps_its_device(
    start: Callable[..., subprocess.Popen[str]], environment: Environment
) -> None:
    """A worker that outlives the killed job still uses the GPU, so nobody else may have it."""
    one = {gpu.POOL_VARIABLE: "0"}
    job = start("--", "sh", "-c", "sleep 60 & echo $!; wait", **one)
    orphan = int(holding(job))
    job.kill()
    job.wait()
    try:
        refused = lease(environment | one, "--timeout", "0.3", "--", "true")
        assert refused.returncode == 1
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert lease(environment | one, "--timeout", "20", "--", "true").returncode == 0


def test_several_devices_all_or_nothing(environment: Environment) -> None:
    result = lease(environment, "-n", "2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert len(set(result.stdout.strip().split(","))) == 2
    too_many = lease(environment, "-n", "4", "--", "true")
    assert too_many.returncode == 1 and "4 GPUs asked for, 3 may be used" in too_many.stderr


WORKER = """
import os, random, sys, time
device, folder = os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1]
marker = os.path.join(folder, device)
def owner_lives():
    try:
        pid = int(open(marker).read())
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError):
        return False
if os.path.exists(marker) and owner_lives():
    open(os.path.join(folder, "clash"), "a").write(device)
with open(marker, "w") as handle:
    handle.write(str(os.getpid()))
time.sleep(random.uniform(0.01, 0.1))
if open(marker).read() != str(os.getpid()):
    open(os.path.join(folder, "clash"), "a").write(device)
os.remove(marker)
"""


def test_stress_no_device_is_used_twice(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Many short jobs on three devices while some are killed at random moments."""
    worker, folder = tmp_path / "worker.py", tmp_path / "busy"
    worker.write_text(WORKER)
    folder.mkdir()
    chance = random.Random(0)
    jobs = [start("--", sys.executable, str(worker), str(folder)) for _ in range(20)]
    for _ in range(6):
        time.sleep(0.1)
        victim = chance.choice(jobs)
        if victim.poll() is None:
            victim.kill()
    codes = {job.wait(timeout=60) for job in jobs}
    assert not (folder / "clash").exists()
    assert codes <= {0, -signal.SIGKILL}


def test_device_list_with_mig_slices() -> None:
    assert gpu.parse_device_list(LISTING) == [
        gpu.Device("0:0", "MIG-cccc-1"),
        gpu.Device("0:1", "MIG-cccc-2"),
        gpu.Device("1", "GPU-bbbb2222-0000"),
    ]
    assert gpu.parse_device_list("No devices found.\n") == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["MIG-cccc-1", "MIG-cccc-2", "GPU-bbbb2222-0000"]),
        ("", []),
        ("1", ["GPU-bbbb2222-0000"]),
        ("GPU-bbbb", ["GPU-bbbb2222-0000"]),
        ("MIG-cccc-2,1", ["MIG-cccc-2", "GPU-bbbb2222-0000"]),
        ("7", ["7"]),  # renumbered by a container: still leased, by that name
        ("1,-1,MIG-cccc-1", ["GPU-bbbb2222-0000"]),
    ],
)
def test_visible_devices_by_uuid(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "list_devices", lambda: gpu.parse_device_list(LISTING))
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpu.visible_gpus(given) == expected


def test_slurm_assignment_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SLURM numbers devices anew in every job: locks must not be shared between jobs."""
    monkeypatch.setattr(gpu, "list_devices", list)
    monkeypatch.delenv(gpu.DEVICE_VARIABLE, raising=False)
    monkeypatch.setenv(gpu.LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    leases = []
    for job in ("11", "12"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        leases.append(gpu.lease_for_job(1, timeout_s=0.1))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    for held in leases:
        assert held is not None
        held.release()


def test_without_gpu_jobs_run_on_the_cpu_unless_cuda_is_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "list_devices", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(gpu.DEVICE_VARIABLE, "auto")
    assert gpu.lease_for_job(1) is None
    monkeypatch.setenv(gpu.DEVICE_VARIABLE, "cuda")
    with pytest.raises(NoGpuError, match="there is no GPU here"):
        gpu.lease_for_job(1)
    monkeypatch.setenv(gpu.DEVICE_VARIABLE, "gpu")
    with pytest.raises(NoGpuError, match="must be auto, cuda or cpu"):
        gpu.lease_for_job(1)


def test_job_that_asked_for_no_gpu_sees_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(gpu.POOL_VARIABLE, "0")
    monkeypatch.setenv(gpu.LOCK_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv(gpu.DEVICE_VARIABLE, raising=False)
    assert gpu.lease_for_job(0) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_lock_files_of_other_users(tmp_path: Path) -> None:
    """Locks that may only be read still work as locks."""
    lock = tmp_path / "0.lock"
    lock.touch()
    lock.chmod(0o444)
    first = gpu.acquire(1, ["0"], tmp_path, timeout_s=0)
    with pytest.raises(NoGpuError):
        gpu.acquire(1, ["0"], tmp_path, timeout_s=0)
    first.release()
    gpu.acquire(1, ["0"], tmp_path, timeout_s=0).release()
