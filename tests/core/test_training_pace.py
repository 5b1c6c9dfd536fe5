"""Progress and learning rate of training runs."""

from __future__ import annotations

import pytest

from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.training_settings import OptimizerSettings

SETTINGS = OptimizerSettings(steps=1000, warmup_steps=10, learning_rate=1e-3)


def test_rate_rises_and_falls() -> None:
    assert Pace(SETTINGS).learning_rate() == pytest.approx(1e-4)
    assert Pace(SETTINGS, step=500).learning_rate() == pytest.approx(5e-4)
    assert Pace(SETTINGS, step=1000).learning_rate() == 0.0
    assert Pace(SETTINGS, step=1000).is_done


def test_finished_run_taken_further_has_its_own_schedule() -> None:
    """Warm-up and decay count from where the first run ended."""
    pace = Pace(SETTINGS, total_seconds=500.0, step=8000, seconds=300.0)
    pace.first_step, pace.first_seconds = 8000, 300.0
    assert pace.progress == 0.0
    assert pace.learning_rate() == pytest.approx(1e-4)
    pace.step, pace.seconds = 8100, 400.0
    assert pace.progress == pytest.approx(0.5)
    assert pace.learning_rate() == pytest.approx(5e-4)
    pace.seconds = 500.0
    assert pace.is_done
