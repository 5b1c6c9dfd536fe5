"""Locks: between processes, after SIGKILL, and what they protect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cap4d_core import run_guard
from cap4d_core.errors import UserError
from cap4d_core.locks import describe_holder, try_lock, wait_for_lock
from cap4d_core.run_guard import claim_results

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from cap4d_core.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held" if lock else "busy", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "held"
    return process


def test_killed_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    other = hold(path, 60)
    assert try_lock(path) is None
    assert f"process {other.pid} on " in describe_holder(path)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    lock = try_lock(path)
    assert lock is not None and f"process {os.getpid()} on " in describe_holder(path)
    lock.release()
    assert not path.exists()


def test_waits_and_says_for_whom(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = hold(path, 1.5)
    told: list[str] = []
    start = time.monotonic()
    wait_for_lock(path, told.append).release()
    assert time.monotonic() - start > 0.5
    assert len(told) == 1 and f"process {other.pid}" in told[0]
    other.wait()


def test_a_removed_file_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    """Two holders of two files of the same name would both think they were alone."""
    path = tmp_path / "lock"
    first = try_lock(path)
    assert first is not None
    first.release()
    second = try_lock(path)
    assert second is not None and try_lock(path) is None
    second.release()


def test_one_run_per_results_folder(tmp_path: Path) -> None:
    other = hold(tmp_path / "results" / run_guard.FOLDER / "lock", 60)
    with pytest.raises(UserError, match=f"another run writes there .process {other.pid} on"):
        claim_results(tmp_path / "results", [])
    other.kill()
    other.wait()
    claim_results(tmp_path / "results", [])
    run_guard._held.pop().release()


def test_jobs_of_the_run_before_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def cancel(names: list[str]) -> tuple[list[str], list[str]]:
        asked.append(names)
        return (["7"], ["7"] if names == ["cap4d_hangs"] else []) if names else ([], [])

    monkeypatch.setattr(run_guard, "cancel_jobs", cancel)
    log = tmp_path / "log"
    for name in ("cap4d_1", "cap4d_2"):
        log.write_text(f"SLURM run ID: {name}\n")
        claim_results(tmp_path / "results", [log])
        run_guard._held.pop().release()
    assert asked == [[], ["cap4d_1"]]
    assert "Cancelled SLURM jobs that an earlier run left behind: 7" in capsys.readouterr().err
    (tmp_path / "results" / run_guard.FOLDER / "slurm").write_text("cap4d_hangs\n")
    with pytest.raises(UserError, match=r"still write to .*: 7"):
        claim_results(tmp_path / "results", [log])
    run_guard._held.pop().release()
