"""The time limit of a cluster job, seen from inside.

SLURM signals only the first process of a job, which is Snakemake: a script would be killed without
a word. So a job knows its own limit and ends before it, after writing a checkpoint where the stage
keeps one; the next attempt goes on from there.

Light: the standard library.
"""

from __future__ import annotations

import os
import time

from cap4d_core.errors import DeadlineError, UserError
from cap4d_core.progress import Progress, ProgressCallback, format_duration

# Seconds before the limit at which a job ends; the default is a fifth of the limit, at most 120.
MARGIN_VARIABLE = "CAP4D_TIME_LIMIT_MARGIN_S"
_FRACTION, _MAX_MARGIN_S = 0.2, 120.0
# Set by schedulers other than SLURM that enforce the limit (profiles/kubernetes).
LIMITED_VARIABLE = "CAP4D_TIME_LIMITED"
# Close to the start of the script: only Snakemake's own start, some seconds, comes before it.
_PROCESS_START = time.monotonic()


class StopBeforeLimit:
    """A progress callback that ends the job when its time is nearly over."""

    def __init__(self, callback: ProgressCallback, limit_min: float, seconds: float) -> None:
        self._callback = callback
        self._limit_min = limit_min
        self._stop = _PROCESS_START + seconds

    def __call__(self, progress: Progress) -> None:
        """Passes the progress on.

        Raises:
            DeadlineError: the time is nearly over and work is left.
        """
        self._callback(progress)
        left = progress.total - progress.done
        if left > 0 and time.monotonic() >= self._stop:
            raise DeadlineError(
                f"The time limit of {self._limit_min:g} min is near: stopped after {progress.done} "
                f"of {progress.total} ({progress.unit}). The next attempt gets more time and goes "
                "on from the checkpoint, where the stage keeps one; or raise 'runtime' of this "
                "rule in the profile."
            )


def stop_before_limit(callback: ProgressCallback, limit_min: float | None) -> ProgressCallback:
    """The callback, with a deadline where a scheduler enforces the limit.

    Args:
        callback: what to call with the progress.
        limit_min: the job's `runtime` in minutes; None where it has none.

    Raises:
        UserError: CAP4D_TIME_LIMIT_MARGIN_S is no number.
    """
    if limit_min is None or not os.environ.keys() & {"SLURM_JOB_ID", LIMITED_VARIABLE}:
        return callback
    return StopBeforeLimit(callback, limit_min, limit_min * 60 - margin_s(limit_min))


def margin_s(limit_min: float) -> float:
    """Seconds between the end of the work and the limit.

    Raises:
        UserError: CAP4D_TIME_LIMIT_MARGIN_S is no number.
    """
    text = os.environ.get(MARGIN_VARIABLE)
    if not text:
        return min(_FRACTION * limit_min * 60, _MAX_MARGIN_S)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{MARGIN_VARIABLE} is '{text}'; expected a number of seconds.") from None


def describe_limit(limit_min: float) -> str:
    """For the head of a log: the limit and when the job ends by itself."""
    seconds = limit_min * 60 - margin_s(limit_min)
    return f"time limit {limit_min:g} min, ends by itself after {format_duration(max(seconds, 0))}"
