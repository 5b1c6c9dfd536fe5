"""Progress lines of long loops."""

from __future__ import annotations

import logging
import re

import pytest

from cap4d_core import progress
from cap4d_core.progress import Progress, ProgressLogger, format_duration


class Clock:
    """Stands for time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    caplog.set_level(logging.INFO)
    return clock


def run(
    logger: ProgressLogger, clock: Clock, first: int, last: int, unit: str, each: float
) -> None:
    for done in range(first, last + 1):
        clock.now += each
        logger(Progress(done, last, unit, {"loss": 0.5}))


def test_a_line_every_interval_and_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    run(ProgressLogger("ana", interval_s=10), clock, 1, 25, "step", each=1.0)
    lines = [record.message for record in caplog.records]
    assert [re.search(r"step (\d+)/25", line)[1] for line in lines] == ["10", "20", "25"]  # type: ignore[index]
    assert lines[0] == "ana: step 10/25 (1/s, 15 s left), loss 0.5"


def test_resumed_loop_counts_what_this_process_did(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    run(ProgressLogger("ana", interval_s=5), clock, 91, 100, "step", each=1.0)
    assert "step 95/100 (1/s, 5 s left)" in caplog.text


def test_another_unit_starts_counting_anew(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    logger = ProgressLogger("ana", interval_s=1)
    run(logger, clock, 1, 100, "frame", each=10.0)
    run(logger, clock, 1, 11, "overlay", each=2.0)
    assert caplog.records[-2].message.startswith("ana: overlay 10/11 (0.5")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (185, "3 min 05 s"), (3720, "1 h 02 min"), (float("inf"), "unknown time")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
