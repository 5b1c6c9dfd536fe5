"""SLURM jobs that an earlier run of the workflow left behind.

A Snakemake that is killed outright cannot cancel its jobs, and a new one does not find them: both
would write the same files at the same time.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

# `slurm-jobname-prefix` of profiles/slurm.
JOB_NAME_PREFIX = "cap4d"


def cancel_stale_jobs(folder: Path, timeout_s: float = 60.0) -> list[str]:
    """Cancels own jobs submitted by this workflow from `folder` and waits until they are gone.

    Returns:
        Their ids; nothing where SLURM is not installed.
    """
    if shutil.which("squeue") is None:
        return []
    stale = stale_jobs(_squeue("%i|%j|%Z"), folder)
    if not stale:
        return []
    subprocess.run(["scancel", *stale], check=False, capture_output=True)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and set(_squeue("%i").split()) & set(stale):
        time.sleep(2)
    return stale


def stale_jobs(listing: str, folder: Path) -> list[str]:
    """Ids in `id|name|working directory` lines that belong to this workflow and folder."""
    rows = [line.strip().split("|", 2) for line in listing.splitlines() if line.count("|") >= 2]
    return [
        number
        for number, name, directory in rows
        if name.startswith(JOB_NAME_PREFIX) and Path(directory) == folder
    ]


def _squeue(columns: str) -> str:
    result = subprocess.run(
        ["squeue", "--me", "-h", "-o", columns], capture_output=True, text=True, check=False
    )
    return result.stdout
