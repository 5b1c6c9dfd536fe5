"""Progress of long loops, readable in a terminal and in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """State of a loop after `done` of `total` units of work."""

    done: int
    total: int
    unit: str = "iteration"
    metrics: Mapping[str, float] = field(default_factory=dict)


class ProgressCallback(Protocol):
    """What long loops call after every unit of work."""

    def __call__(self, progress: Progress) -> None:
        """Takes the state after a unit of work."""


class ProgressLogger:
    """Logs count, rate and time left, at most once per `interval_s` and at the end.

    Lines, not a redrawn bar: the same output serves a terminal, a job log and `tail -f`.
    """

    def __init__(self, name: str, interval_s: float = 10.0) -> None:
        self.name = name
        self.interval_s = interval_s
        self._start = self._last = time.monotonic()
        self._first_done: int | None = None
        self._unit = ""

    def __call__(self, progress: Progress) -> None:
        """Logs the state when it is due."""
        now = time.monotonic()
        if progress.unit != self._unit:
            # Another loop. A resumed one starts above zero: only what this process did counts.
            if self._unit:
                self._start = now
            self._unit, self._first_done = progress.unit, progress.done - 1
        if now - self._last < self.interval_s and progress.done < progress.total:
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        rate = (progress.done - (self._first_done or 0)) / seconds
        left = (progress.total - progress.done) / rate if rate > 0 else float("inf")
        metrics = "".join(f", {key} {value:.4g}" for key, value in progress.metrics.items())
        logger.info(
            "%s: %s %d/%d (%.3g/s, %s left)%s",
            self.name,
            progress.unit,
            progress.done,
            progress.total,
            rate,
            format_duration(left),
            metrics,
        )


def format_duration(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 05 s` or `7 s`."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {secs:02d} s"
    return f"{secs} s"
