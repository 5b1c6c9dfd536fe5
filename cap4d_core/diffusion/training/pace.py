"""How far a run is, how long it may go on, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from cap4d_core.training_settings import OptimizerSettings


@dataclass
class Pace:
    """Progress of a run by steps, or by time where `total_seconds` is given.

    By time the number of steps follows from the machine: a run in slices ends with the rate it
    should end with, however fast it was. Resuming by steps is exact; by time it cannot be.

    Args:
        settings: steps, warm-up and rates.
        total_seconds: training time over all slices; None = by steps.
        deadline: `time.monotonic()` at which this process stops; None = at the end.
        step: steps made.
        seconds: training time so far, while the clock stood still last.
        first_step: where the present schedule of the rate began; above 0 when a finished run is
            taken further.
        first_seconds: the training time there.
    """

    settings: OptimizerSettings
    total_seconds: float | None = None
    deadline: float | None = None
    step: int = 0
    seconds: float = 0.0
    first_step: int = 0
    first_seconds: float = 0.0
    _running_since: float | None = field(default=None, repr=False)
    _followed: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Lets the clock run."""
        self._running_since = time.monotonic()

    def pause(self) -> None:
        """Stops the clock."""
        self.seconds, self._running_since = self.elapsed, None

    def follow(self, elapsed: float | None) -> None:
        """Takes the time from another process, so that all have the same rate; None = own clock."""
        self._followed = elapsed

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier processes included."""
        if self._followed is not None:
            return self._followed
        if self._running_since is None:
            return self.seconds
        return self.seconds + time.monotonic() - self._running_since

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.total_seconds is not None:
            first, last, now = self.first_seconds, self.total_seconds, self.elapsed
        else:
            first, last, now = self.first_step, self.settings.steps, self.step
        return min((now - first) / max(last - first, 1e-9), 1.0)

    @property
    def is_done(self) -> bool:
        """Whether the run is complete."""
        return self.progress >= 1.0

    @property
    def is_slice_over(self) -> bool:
        """Whether this process should stop."""
        return self.is_done or (self.deadline is not None and time.monotonic() >= self.deadline)

    def learning_rate(self) -> float:
        """Rate of the step about to be made."""
        settings = self.settings
        made = self.step - self.first_step
        warmup = min((made + 1) / max(settings.warmup_steps, 1), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.progress))
        share = settings.final_rate + (1.0 - settings.final_rate) * cosine
        return settings.learning_rate * warmup * share
