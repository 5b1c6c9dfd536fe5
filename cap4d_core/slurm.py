"""SLURM jobs that an earlier run of the workflow left behind.

A Snakemake that is killed outright cannot cancel its jobs, and a new one does not find them: both
would write the same files at the same time. The executor names all jobs of one run alike
("run ID"); every run writes that name into its results folder, where the next one finds it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cap4d_core.errors import UserError

# `slurm-jobname-prefix` of profiles/slurm.
JOB_NAME_PREFIX = "cap4d"
_POLL_S = 1.0


def run_id(snakemake_logs: Iterable[str | Path]) -> str | None:
    """Name that the SLURM executor gives to the jobs of this run; None under other executors."""
    for log in snakemake_logs:
        try:
            found = re.search(r"^SLURM run ID: (\S+)$", Path(log).read_text("utf-8"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found[1]
    return None


def cancel_jobs(names: Sequence[str], timeout_s: float = 120.0) -> tuple[list[str], list[str]]:
    """Cancels own jobs of these names and waits until they are gone.

    Returns:
        Ids of the cancelled jobs, and of those that are still there after `timeout_s`.

    Raises:
        UserError: squeue does not answer.
    """
    if not names or shutil.which("squeue") is None:
        return [], []
    stale = jobs_named(_squeue("%i|%j"), names)
    if not stale:
        return [], []
    subprocess.run(["scancel", *stale], check=False, capture_output=True)
    end = time.monotonic() + timeout_s
    left = stale
    while left and time.monotonic() < end:
        time.sleep(_POLL_S)
        left = jobs_named(_squeue("%i|%j"), names)
    return stale, left


def jobs_named(listing: str, names: Sequence[str]) -> list[str]:
    """Ids in `id|name` lines whose name is one of `names`."""
    rows = [line.strip().split("|", 1) for line in listing.splitlines() if "|" in line]
    return [number for number, name in rows if name in names]


def _squeue(columns: str) -> str:
    result = subprocess.run(
        ["squeue", "--me", "-h", "-o", columns], capture_output=True, text=True, check=False
    )
    if result.returncode:
        # An empty answer would look like an empty queue.
        raise UserError(
            f"squeue failed: {result.stderr.strip() or 'no message'}. Jobs of an earlier run may "
            "still be at work; run the same command again when SLURM answers."
        )
    return result.stdout
