"""One run per results folder, and no jobs of an earlier run in its way.

Snakemake's own lock covers runs that start in the same folder. Two that start elsewhere and share
`results:` would not see each other; nor would a run see the cluster jobs of one that was killed.

    {results}/.workflow/lock     held while a run lives
    {results}/.workflow/slurm    names of the SLURM jobs of the last run
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from cap4d_core.errors import UserError
from cap4d_core.locks import FileLock, describe_holder, try_lock
from cap4d_core.slurm import cancel_jobs, run_id

FOLDER = ".workflow"
# Until the process ends.
_held: list[FileLock] = []


def claim_results(results: str | Path, snakemake_logs: Iterable[str | Path]) -> None:
    """Takes a results folder for this run; called once, before its first job.

    Args:
        results: the folder, made when needed.
        snakemake_logs: log files of this run; they name its SLURM jobs.

    Raises:
        UserError: another run writes there, or its jobs cannot be stopped.
    """
    folder = Path(results) / FOLDER
    try:
        lock = try_lock(folder / "lock")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None
    if lock is None:
        raise UserError(
            f"{results}: another run writes there ({describe_holder(folder / 'lock')}). Wait until "
            "it ends, or give this run another 'results:' folder in its configuration."
        )
    _held.append(lock)
    jobs = folder / "slurm"
    earlier = jobs.read_text("utf-8").split() if jobs.exists() else []
    cancelled, left = cancel_jobs(earlier)
    if cancelled:
        print(
            f"Cancelled SLURM jobs that an earlier run left behind: {' '.join(cancelled)}",
            file=sys.stderr,
        )
    if left:
        raise UserError(
            f"SLURM jobs of an earlier run still write to {results}: {' '.join(left)}. They were "
            "cancelled; run the same command again when squeue no longer lists them."
        )
    own = run_id(snakemake_logs)
    if own is not None:
        jobs.write_text(f"{own}\n", "utf-8")
    else:
        jobs.unlink(missing_ok=True)
