"""Jobs: from Snakemake and from job files, logs, errors, rerunning by hand."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cap4d_core.errors import UserError
from cap4d_core.gpu import DEVICE_VARIABLE
from cap4d_core.job import (
    Job,
    execute,
    job_file_path,
    job_from_snakemake,
    read_job_file,
    remove_unfinished,
    write_job_file,
)
from cap4d_core.job_environment import THREAD_VARIABLES, set_numba_cache
from cap4d_core.locks import try_lock

ROOT = Path(__file__).parents[2]


class Named(list[Any]):
    """Stands for Snakemake's Namedlist: a list with names for its parts."""

    def __init__(self, **parts: Any) -> None:
        flat = [x for part in parts.values() for x in ([part] if isinstance(part, str) else part)]
        super().__init__(flat)
        self._parts = parts

    def items(self) -> Any:
        return self._parts.items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._parts.get(name, default)


def example(tmp_path: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "rule": "fit_avatar",
        "input": {"references": ["in/index.json"], "generated": [], "lpips": []},
        "output": {"avatar": [str(tmp_path / "results/ana/avatar/avatar.safetensors")]},
        "params": {"settings": {"iterations": 5, "lr": 1e-3, "plan": None}},
        "wildcards": {"subject": "ana"},
        "threads": 2,
    }
    return Job(**{**values, **changes})


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running a job changes thread counts and hides GPUs."""
    for name in (*THREAD_VARIABLES, "CUDA_VISIBLE_DEVICES", DEVICE_VARIABLE):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")


def test_from_snakemake() -> None:
    snakemake = SimpleNamespace(
        rule="sample_views",
        input=Named(plan="p.npz", previous=["1.st", "2.st"], none=[]),
        output=Named(latents="o.st"),
        params=Named(settings={"sync_steps": [0.1]}),
        wildcards=Named(subject="ana", round="2"),
        log=Named(text="logs/x.log"),
        threads=4,
        resources=SimpleNamespace(get={"gpu": 1}.get),
    )
    job = job_from_snakemake(snakemake)
    assert job.input_file("plan") == Path("p.npz")
    assert job.input_files("previous") == [Path("1.st"), Path("2.st")]
    assert job.input_files("none") == []
    assert (job.num_gpus, job.threads, job.wildcards["round"]) == (1, 4, "2")
    assert job.params == {"settings": {"sync_steps": [0.1]}}
    with pytest.raises(KeyError, match="2 input files named 'previous'"):
        job.input_file("previous")


def test_job_file_round_trip(tmp_path: Path) -> None:
    job = example(tmp_path)
    path = job_file_path(tmp_path / "logs" / "ana.log")
    assert path.name == "ana.job.json"
    write_job_file(path, job)
    assert read_job_file(path) == job
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_job_file(path)
    with pytest.raises(UserError, match="no job file"):
        read_job_file(tmp_path / "none.json")


def test_outputs_and_checkpoints_of_a_rerun_are_elsewhere(tmp_path: Path) -> None:
    job = example(tmp_path)
    moved = job.below(tmp_path / "debug")
    assert moved.output_file("avatar").is_relative_to(tmp_path / "debug")
    assert moved.checkpoint_file("last.pt").is_relative_to(tmp_path / "debug")
    assert job.checkpoint_file("last.pt").parent.parent == job.output_file("avatar").parent
    assert moved.input == job.input


def test_user_errors_are_one_sentence_and_others_have_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def user_error(job: Job) -> None:
        raise UserError("x.npz: no field 'expr'.")

    def defect(job: Job) -> None:
        raise IndexError("list index out of range")

    with caplog.at_level(logging.INFO):
        assert execute(user_error, example(tmp_path)) == 1
        assert "x.npz: no field 'expr'." in caplog.text and "Traceback" not in caplog.text
        caplog.clear()
        assert execute(defect, example(tmp_path)) == 1
        assert "Traceback" in caplog.text and "list index out of range" in caplog.text


def test_out_of_memory_names_the_setting_to_lower(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def main(job: Job) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    job = example(tmp_path, params={"settings": {"batch_size": 8}})
    assert execute(main, job) == 1
    assert "lower fitting.batch_size (now 8)" in caplog.text
    assert "Tried to allocate" in caplog.text and "Traceback" not in caplog.text


def test_threads_are_those_of_the_job(tmp_path: Path) -> None:
    seen = {}

    def main(job: Job) -> None:
        seen.update({name: os.environ[name] for name in THREAD_VARIABLES})

    assert execute(main, example(tmp_path, threads=3)) == 0
    assert set(seen.values()) == {"3"}


def test_numba_cache_only_moves_where_the_package_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    set_numba_cache(environment, tmp_path)
    assert "NUMBA_CACHE_DIR" not in environment
    read_only = tmp_path / "package"
    real_access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != read_only and real_access(path, mode)
    )
    set_numba_cache(environment, read_only)
    assert Path(environment["NUMBA_CACHE_DIR"]).is_dir()
    environment["NUMBA_CACHE_DIR"] = "chosen"
    set_numba_cache(environment, read_only)
    assert environment["NUMBA_CACHE_DIR"] == "chosen"


SCRIPT = """
import os, sys, time
from cap4d_core.errors import UserError
from cap4d_core.job import Job, run

def main(job: Job) -> None:
    mode = job.params["mode"]
    if mode == "fail":
        raise UserError("the file is bad")
    if mode == "hang":
        print("hanging", flush=True)
        time.sleep(60)
    print("from python")
    os.system("echo from a child process")
    path = job.output_file("text")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.wildcards["subject"])

class Snakemake: pass

if __name__ == "__main__":
    run(main, globals().get("snakemake"))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text(SCRIPT)
    return path


def job_file(tmp_path: Path, mode: str) -> Path:
    path = tmp_path / "logs" / "ana.job.json"
    output = {"text": ["results/ana/out.txt"]}
    write_job_file(path, Job("work", {}, output, {"mode": mode}, {"subject": "ana"}))
    return path


def call(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *words],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_rerun_by_hand_writes_below_debug(script: Path, tmp_path: Path) -> None:
    file = job_file(tmp_path, "work")
    result = call(script, str(file))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "debug/results/ana/out.txt").read_text() == "ana"
    assert not (tmp_path / "results").exists()
    assert "from python" in result.stdout  # a terminal, not a log file
    assert call(script, str(file), "--in-place").returncode == 0
    assert (tmp_path / "results/ana/out.txt").exists()


def test_rerun_reports_errors(script: Path, tmp_path: Path) -> None:
    result = call(script, str(job_file(tmp_path, "fail")))
    assert result.returncode == 1
    assert "the file is bad" in result.stderr and "Traceback" not in result.stderr
    missing = call(script, "none.json")
    assert missing.returncode == 1 and "no job file" in missing.stderr


def runner(script: Path, folder: Path) -> Path:
    """A file that runs the script as Snakemake does."""
    path = folder / "runner.py"
    path.write_text(f"""
import runpy, types
class Items(dict):
    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else dict.__getitem__(self, key)
snakemake = types.SimpleNamespace(
    rule="work", input=Items(), output=Items(text="out.txt"), params=Items(mode="work"),
    wildcards=Items(subject="ana"), log=Items(text="logs/work/ana.log"),
    threads=1, resources=Items(runtime=90),
)
runpy.run_path({str(script)!r}, init_globals={{"snakemake": snakemake}}, run_name="__main__")
""")
    return path


def test_log_takes_everything_children_included(script: Path, tmp_path: Path) -> None:
    result = call(runner(script, tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    log = (tmp_path / "logs/work/ana.log").read_text()
    for expected in ("work subject=ana", "torch", "from python", "from a child process", "done in"):
        assert expected in log
    again = read_job_file(tmp_path / "logs/work/ana.job.json")
    assert again.wildcards == {"subject": "ana"} and again.runtime_min == 90


def test_termination_is_logged(script: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(script), str(job_file(tmp_path, "hang"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "hanging"
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "terminated by signal SIGTERM" in errors
    assert time.monotonic() - start < 20  # it slept for a minute otherwise


def test_full_disk_is_said_with_the_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def python(job: Job) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.npz")

    def library(job: Job) -> None:
        try:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        except RuntimeError:
            raise ValueError("could not save") from None

    for main in (python, library):
        caplog.clear()
        assert execute(main, example(tmp_path)) == 1
        assert f"The disk is full, or a quota is used up ({tmp_path}: " in caplog.text
        assert "Traceback" not in caplog.text
        assert "fit_avatar: The disk is full" in capfd.readouterr().err


def test_unfinished_files_of_killed_attempts_go(tmp_path: Path) -> None:
    job = example(tmp_path)
    folder = job.output_file("avatar").parent
    folder.mkdir(parents=True)
    for name in ("avatar.tmp-12.safetensors", "avatar.safetensors", "other.tmp-3.safetensors"):
        (folder / name).touch()
    remove_unfinished(job)
    assert {path.name for path in folder.iterdir()} == {
        "avatar.safetensors", "other.tmp-3.safetensors"
    }  # fmt: skip


def test_same_job_waits_for_an_earlier_process(script: Path, tmp_path: Path) -> None:
    """As after a Snakemake that was killed and whose jobs went on."""
    lock = try_lock(tmp_path / "logs" / "work" / "ana.lock")
    assert lock is not None
    process = subprocess.Popen(
        [sys.executable, str(runner(script, tmp_path))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert f"held by process {os.getpid()} on " in process.stderr.readline()
    assert not (tmp_path / "logs/work/ana.log").exists()
    lock.release()
    assert process.wait(30) == 0
    assert "done in" in (tmp_path / "logs/work/ana.log").read_text()
    assert not (tmp_path / "logs/work/ana.lock").exists()
