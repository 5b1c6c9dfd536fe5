"""Jobs that an earlier run left in the queue, against stand-ins for squeue and scancel."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cap4d_core.slurm import JOB_NAME_PREFIX, cancel_stale_jobs, stale_jobs

ROOT = Path(__file__).parents[2]
LISTING = """\
11|cap4d_5c6f|/data/run
12|cap4d_5c6f|/data/other
13|editor|/data/run
14|cap4d_77aa|/data/run
"""


def test_only_jobs_of_this_workflow_and_folder() -> None:
    assert stale_jobs(LISTING, Path("/data/run")) == ["11", "14"]
    assert stale_jobs("", Path("/data/run")) == []


def test_prefix_is_that_of_the_profile() -> None:
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert profile["slurm-jobname-prefix"] == JOB_NAME_PREFIX
    assert profile["slurm-status-command"] == "squeue" and profile["slurm-requeue"] is True


def test_cancels_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue lists the job until scancel was called with its id."""
    programs = {
        "squeue": f'[ -e {tmp_path}/cancelled ] || echo "11|cap4d_x|{tmp_path}"',
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }
    for name, line in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cancel_stale_jobs(tmp_path, timeout_s=5) == ["11"]
    assert (tmp_path / "cancelled").read_text() == "11\n"
    assert cancel_stale_jobs(tmp_path, timeout_s=5) == []


def test_nothing_happens_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cancel_stale_jobs(tmp_path) == []
