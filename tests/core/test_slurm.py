"""Jobs that an earlier run left in the queue, against stand-ins for squeue and scancel."""

from __future__ import annotations

from pathlib import Path

import pytest
import yte

from cap4d_core.errors import UserError
from cap4d_core.slurm import JOB_NAME_PREFIX, cancel_jobs, jobs_named, run_id

ROOT = Path(__file__).parents[2]
LISTING = """\
11|cap4d_5c6f
12|cap4d_5c6f0
13|editor
14|cap4d_77aa
"""


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **lines: str) -> None:
    """Puts shell scripts in front of the path."""
    for name, line in lines.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_only_jobs_of_the_named_runs() -> None:
    assert jobs_named(LISTING, ["cap4d_5c6f"]) == ["11"]
    assert jobs_named(LISTING, ["cap4d_5c6f", "cap4d_77aa"]) == ["11", "14"]
    assert jobs_named("", ["cap4d_5c6f"]) == []


def test_prefix_is_that_of_the_profile() -> None:
    text = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
    profile = yte.process_yaml(text)
    assert profile["slurm-jobname-prefix"] == JOB_NAME_PREFIX
    assert profile["slurm-status-command"] == "squeue" and profile["slurm-requeue"] is True


def test_run_is_named_in_the_log_of_the_executor(tmp_path: Path) -> None:
    log = tmp_path / "snakemake.log"
    log.write_text("Building DAG of jobs...\nSLURM run ID: cap4d_24c4\nUsing shell: bash\n")
    assert run_id([tmp_path / "none.log", log]) == "cap4d_24c4"
    log.write_text("Building DAG of jobs...\n")
    assert run_id([log]) is None


def test_cancels_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue lists the job until scancel was called with its id."""
    programs(
        tmp_path,
        monkeypatch,
        squeue=f'[ -e {tmp_path}/cancelled ] || echo "11|cap4d_x"',
        scancel=f'echo "$@" > {tmp_path}/cancelled',
    )
    assert cancel_jobs(["cap4d_x"], timeout_s=5) == (["11"], [])
    assert (tmp_path / "cancelled").read_text() == "11\n"
    assert cancel_jobs(["cap4d_x"], timeout_s=5) == ([], [])


def test_says_which_jobs_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, squeue='echo "11|cap4d_x"', scancel="true")
    assert cancel_jobs(["cap4d_x"], timeout_s=0.1) == (["11"], ["11"])


def test_silent_squeue_is_not_an_empty_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue='echo "Unable to contact controller" >&2; exit 1')
    with pytest.raises(UserError, match="squeue failed: Unable to contact controller"):
        cancel_jobs(["cap4d_x"])
    assert cancel_jobs([]) == ([], [])  # nothing to look for


def test_nothing_happens_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cancel_jobs(["cap4d_x"]) == ([], [])
