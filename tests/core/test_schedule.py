"""Noise schedule and step grid: laws that hold for any parameters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cap4d_core.diffusion.schedule import NoiseSchedule, ScheduleConfig
from cap4d_core.diffusion.step_grid import (
    ddim_step_count,
    ddim_timesteps,
    is_valid_step_count,
    jumps_at_the_end,
    validate_step_count,
)
from cap4d_core.errors import UserError

CONFIGS = [
    ScheduleConfig(),
    ScheduleConfig(num_frames=4, image_size=32, minus_one_shift=False, sqrt_shift=False),
    ScheduleConfig(negative_shift=True, zero_snr=False),
    ScheduleConfig(num_train_timesteps=200, beta_end=0.05),
    ScheduleConfig(shift_snr=False),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_alphas_fall_from_one_towards_zero(config: ScheduleConfig) -> None:
    abar = NoiseSchedule(config).alphas_cumprod_f64
    assert abar.shape == (config.num_train_timesteps,)
    assert (np.diff(abar) < 0).all()
    assert 0 < abar[-1] < 0.1 and 0.99 < abar[0] < 1


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.shift_snr])
def test_shift_multiplies_the_signal_to_noise_ratio(config: ScheduleConfig) -> None:
    schedule = NoiseSchedule(config)
    before, after = schedule.alphas_cumprod_before_shift_f64, schedule.alphas_cumprod_f64
    ratio = (after / (1 - after)) / (before / (1 - before))
    # 1 - abar loses digits near abar = 1.
    np.testing.assert_allclose(ratio, config.shift_ratio, rtol=1e-10)


def test_shift_ratio_of_the_released_model() -> None:
    assert ScheduleConfig().shift_ratio == pytest.approx(1 / np.sqrt(7))
    assert ScheduleConfig(image_size=128).shift_ratio == pytest.approx(1 / np.sqrt(28))
    with pytest.raises(ValueError, match="num_frames >= 2"):
        NoiseSchedule(ScheduleConfig(num_frames=1))


def test_betas_rebuild_the_alphas() -> None:
    schedule = NoiseSchedule()
    rebuilt = schedule.alphas_cumprod_f64[0] * np.cumprod(1 - schedule.betas_f64[1:])
    np.testing.assert_allclose(rebuilt, schedule.alphas_cumprod_f64[1:], rtol=1e-9)


def test_posterior_mean_keeps_a_noiseless_path() -> None:
    """With x_t = sqrt(abar_t) x_0 the posterior mean is sqrt(abar_{t-1}) x_0."""
    s = NoiseSchedule()
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * s.sqrt_alphas_cumprod
    # Timestep 0 is left out: its beta is 0 by convention, which no real step has.
    np.testing.assert_allclose(mean[1:], np.sqrt(s.alphas_cumprod_prev[1:]), atol=2e-6)


@pytest.mark.parametrize("steps", [1, 6, 10, 50, 100])
@pytest.mark.parametrize("config", CONFIGS[:3])
def test_ddim_step_moves_along_the_forward_process(config: ScheduleConfig, steps: int) -> None:
    """With the true noise, x_t goes exactly to x_{t_prev} of the same clean signal."""
    schedule = NoiseSchedule(config)
    grid = schedule.ddim(steps)
    clean, noise = 0.7, -1.3
    alphas, prev = grid.alphas.astype(np.float64), grid.alphas_prev
    x = np.sqrt(alphas) * clean + np.sqrt(1 - alphas) * noise
    moved = grid.x_factor.astype(np.float64) * x + grid.e_factor.astype(np.float64) * noise
    # Factors are rounded to float32; x_factor reaches hundreds at the noisy end.
    tolerance = 4e-7 * grid.x_factor
    assert (np.abs(moved - (np.sqrt(prev) * clean + np.sqrt(1 - prev) * noise)) < tolerance).all()


def test_grid_chains_down_to_the_first_timestep() -> None:
    grid = NoiseSchedule().ddim(50)
    assert len(grid) == 50 and grid.timesteps[0] == 1
    np.testing.assert_array_equal(grid.alphas_prev[1:].astype(np.float32), grid.alphas[:-1])
    assert grid.alphas_prev[0] == NoiseSchedule().alphas_cumprod[0]


def test_every_accepted_step_count_stays_inside_the_schedule() -> None:
    rejected = []
    for steps in range(1, 1001):
        if is_valid_step_count(steps):
            timesteps = ddim_timesteps(steps)
            assert timesteps[0] >= 1 and timesteps[-1] <= 999
            assert len(timesteps) == ddim_step_count(steps) == -(-1000 // (1000 // steps))
        else:
            rejected.append(steps)
    expected = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}
    assert set(rejected) == expected


@pytest.mark.parametrize(
    ("steps", "choices"),
    [(3, "2 or 4"), (36, "35 or 38"), (105, "100 or 112"), (1000, "500"), (0, "1"), (-4, "1")],
)
def test_rejection_names_the_closest_step_counts(steps: int, choices: str) -> None:
    with pytest.raises(UserError, match=f"Use {choices}\\.$"):
        validate_step_count(steps)


def test_step_grid_is_light() -> None:
    code = (
        "import sys, cap4d_core.diffusion.step_grid;"
        "sys.exit(bool({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("steps", "jumps"), [(10, False), (12, True), (25, False), (100, False)])
def test_grids_that_start_with_a_leap_out_of_pure_noise(steps: int, jumps: bool) -> None:
    grid = NoiseSchedule(ScheduleConfig()).ddim(steps)
    factor = (float(grid.alphas[-2]) / float(grid.alphas[-1])) ** 0.5
    assert (factor > 10) == jumps
    assert jumps_at_the_end(steps) == jumps
