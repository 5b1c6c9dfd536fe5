"""Warm workers: jobs share a process, and nothing outlives what it should."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cap4d_core.diffusion.references import encode_references
from cap4d_core.diffusion.view_plan import plan_views
from cap4d_core.gpu import LOCK_DIR_VARIABLE, POOL_VARIABLE, acquire, lock_folder
from cap4d_core.job import MEMORY_ELSEWHERE, Job, note_memory_elsewhere, read_job_file
from cap4d_core.job import write_job_file as write_job
from cap4d_core.kept import Keeper, file_states
from cap4d_core.warm_worker import SWITCH, is_wanted, run_in_worker, stop_worker
from tests.core.sampling_fixtures import tiny_settings, world

GPU = "GPU-0"
SAMPLE = Path(__file__).parents[2] / "workflow_scripts" / "sample_views.py"
TOY = """
import os, time
from pathlib import Path
from cap4d_core.errors import UserError
from cap4d_core.kept import KEEPER

def main(job):
    print("working on", job.wildcards["name"], flush=True)
    made = KEEPER.get("thing", 1, lambda: job.wildcards["name"])
    Path(job.output["pid"][0]).write_text(f"{os.getpid()} {made}")
    if job.params.get("fail"):
        raise UserError("cannot be done")
    time.sleep(job.params.get("seconds", 0))
    Path(job.output["done"][0]).touch()
"""
CLIENT = """
import json, signal, sys
from pathlib import Path
from cap4d_core.gpu import acquire, lock_folder
from cap4d_core.job import Job
from cap4d_core.warm_worker import run_in_worker
# Ignored where the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
lease = acquire(1, ["GPU-0"], lock_folder())
job = Job(**json.loads(sys.argv[1]))
print("code", run_in_worker(job, "GPU-0", 2, lease.descriptors, Path(sys.argv[2])))
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where scripts, outputs and locks are; short, because names of sockets are limited."""
    path = Path(tempfile.mkdtemp(prefix="warm"))
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(path / "locks"))
    (path / "toy.py").write_text(TOY)
    yield path
    stop_worker(GPU)
    shutil.rmtree(path)


def toy(folder: Path, name: str, **params: object) -> Job:
    output = {"pid": [str(folder / f"{name}.pid")], "done": [str(folder / f"{name}.done")]}
    return Job("toy", {}, output, dict(params), {"name": name})


def worker_of(job: Job, timeout_s: float = 30.0) -> int:
    """Process that works on a job."""
    file, end = Path(job.output["pid"][0]), time.monotonic() + timeout_s
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return int(file.read_text().split()[0])


def state_of(pid: int) -> str:
    """As ps shows it; Z if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def is_alive(pid: int) -> bool:
    return state_of(pid) != "Z"


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def client(folder: Path, job: Job) -> subprocess.Popen[str]:
    import json
    from dataclasses import asdict

    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(asdict(job)), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_jobs_share_a_worker_until_it_is_in_the_way(folder: Path) -> None:
    first, second = toy(folder, "a"), toy(folder, "b")
    assert run_in_worker(first, GPU, 2, [], folder) == 0
    assert run_in_worker(second, GPU, 2, [], folder) == 0
    pid = worker_of(first)
    assert worker_of(second) == pid != os.getpid() and is_alive(pid)
    assert Path(second.output["pid"][0]).read_text().split()[1] == "a"  # kept from the first
    stop_worker(GPU)
    assert not list(lock_folder().glob("*.sock"))
    wait_for_end(pid)
    stop_worker(GPU)  # nothing there


def test_output_goes_to_the_log_of_the_job(folder: Path) -> None:
    for name in "ab":
        process = client(folder, toy(folder, name))
        text = process.communicate(timeout=60)[0]
        assert f"working on {name}" in text and "in the warm worker" in text and "code 0" in text


def test_a_failed_job_ends_the_worker(folder: Path) -> None:
    bad, good = toy(folder, "bad", fail=True), toy(folder, "good")
    assert run_in_worker(bad, GPU, 2, [], folder) == 1
    assert run_in_worker(good, GPU, 2, [], folder) == 0
    assert worker_of(bad) != worker_of(good)
    wait_for_end(worker_of(bad))


def test_another_environment_gets_another_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = toy(folder, "a"), toy(folder, "b")
    assert run_in_worker(first, GPU, 2, [], folder) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_in_worker(second, GPU, 2, [], folder) == 0
    assert worker_of(first) != worker_of(second)
    wait_for_end(worker_of(first))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_worker_ends_with_the_job(folder: Path, number: signal.Signals) -> None:
    """Its GPU is free again, and the next job gets a new worker."""
    job = toy(folder, "long", seconds=60)
    process = client(folder, job)
    pid = worker_of(job)
    process.send_signal(number)
    process.communicate(timeout=30)
    wait_for_end(pid)
    assert not Path(job.output["done"][0]).exists()
    acquire(1, [GPU], lock_folder(), timeout_s=10).release()
    following = toy(folder, "next")
    assert run_in_worker(following, GPU, 2, [], folder) == 0
    assert worker_of(following) != pid


def test_the_lease_goes_along_with_the_job(folder: Path) -> None:
    """A worker that is stopped still holds the GPU of the job that was killed."""
    job = toy(folder, "long", seconds=60)
    process = client(folder, job)
    pid = worker_of(job)
    os.kill(pid, signal.SIGSTOP)
    while state_of(pid) != "T":
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=30)
    with pytest.raises(Exception, match="No GPU became free"):
        acquire(1, [GPU], lock_folder(), timeout_s=0.5)
    os.kill(pid, signal.SIGCONT)
    wait_for_end(pid)
    acquire(1, [GPU], lock_folder(), timeout_s=10).release()


def test_a_dead_worker_leaves_the_job_to_its_process(folder: Path) -> None:
    job = toy(folder, "long", seconds=60)
    process = client(folder, job)
    os.kill(worker_of(job), signal.SIGKILL)
    text = process.communicate(timeout=30)[0]
    assert "code None" in text and "this process goes on" in text


def test_an_idle_worker_ends(folder: Path) -> None:
    code = (
        "import socket; from pathlib import Path; from cap4d_core.warm_worker import serve; "
        f"a, b = socket.socketpair(); a.close(); serve(Path({str(folder / 's')!r}), 'k', b, 0.1)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
    assert not (folder / "s").exists()


def sampled_shards(folder: Path, environment: dict[str, str]) -> dict[tuple[str, str], bytes]:
    """Two shards, sampled in one worker ("1") and in processes of their own ("0")."""
    settings, inputs = tiny_settings(num_inference_steps=4, sync_steps=[2]), world()
    plan, latents = folder / "plan.npz", folder / "references" / "latents.safetensors"
    plan_views(inputs.tracking, inputs.head_model, plan, settings, "ana")
    encode_references(
        inputs.tracking, inputs.head_model, inputs.mmdm, latents.parent, settings, "cpu"
    )
    results = {}
    for switch in ("1", "0"):
        for shard in ("1-of-2", "2-of-2"):
            output = folder / switch / f"{shard}.safetensors"
            files = {
                "plan": [str(plan)],
                "references": [str(latents)],
                "mmdm": [str(inputs.mmdm)],
                "head_model": [str(inputs.head_model)],
            }
            job = Job(
                "sample_views", files, {"latents": [str(output)]},
                {"settings": settings.model_dump(mode="json")},
                {"subject": "ana", "round": "1", "scatteritem": shard}, num_gpus=1,
            )  # fmt: skip
            write_job(folder / "a.job.json", job)
            done = subprocess.run(
                [sys.executable, str(SAMPLE), str(folder / "a.job.json"), "--in-place"],
                env=os.environ | environment | {SWITCH: switch},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert ("in the warm worker" in done.stderr) == (switch == "1")
            results[switch, shard] = output.read_bytes()
    return results


@pytest.mark.slow
def test_sampling_jobs_give_the_same_bits(folder: Path) -> None:
    """Two shards in one worker, and without one."""
    results = sampled_shards(folder, {POOL_VARIABLE: GPU})
    for shard in ("1-of-2", "2-of-2"):
        assert results["1", shard] == results["0", shard]
    assert results["1", "1-of-2"] != results["1", "2-of-2"]


def test_where_workers_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", SWITCH):
        monkeypatch.delenv(name, raising=False)
    assert is_wanted("sample_views") and not is_wanted("fit_avatar")
    for name, value in ((SWITCH, "0"), ("SLURM_JOB_ID", "7")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert not is_wanted("sample_views")


def test_job_files_say_where_the_memory_was(folder: Path) -> None:
    file, job = folder / "a.job.json", toy(folder, "a")
    write_job(file, job)
    note_memory_elsewhere(file)
    assert f'"{MEMORY_ELSEWHERE}": true' in file.read_text() and read_job_file(file) == job


def test_keeper(tmp_path: Path) -> None:
    keeper = Keeper()
    made = [keeper.get("a", key, object) for key in (1, 1)]
    assert made[0] is not made[1]
    keeper.enabled = True
    made = [keeper.get("a", key, object) for key in (1, 1, 2, 1)]
    assert made[0] is made[1] and len({id(m) for m in made}) == 3
    before = file_states(tmp_path)
    (tmp_path / "weights").write_text("new")
    assert file_states(tmp_path) != before and file_states(tmp_path / "none") == ()
