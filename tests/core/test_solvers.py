"""Solvers of higher order: the same limit as DDIM, sooner; no trace of breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.sampler import SamplingProgress
from cap4d_core.diffusion.sampling import read_shard, sample_views
from cap4d_core.diffusion.sampling_checkpoint import SamplingCheckpoint
from cap4d_core.diffusion.solvers import needs_previous, second_order_factor, step_latents
from cap4d_core.errors import DeadlineError, InputFileError
from cap4d_core.files.basic import read_safetensors
from cap4d_core.progress import Progress
from tests.core.sampling_fixtures import tiny_settings, world
from tests.core.test_sampler import ALPHAS, NOISE, SCHEDULE, sample
from tests.core.test_shards import Run

SOLVER = "dpm-solver++"


def two_modes(latents: Tensor, timesteps: Tensor, _: FrameConditioning) -> Tensor:
    """The exact noise of data at +-1 with a spread of 0.3: a curved path, views on their own."""
    a = ALPHAS[timesteps][..., None, None, None].double()
    x, variance = latents.double(), 0.09 * a + 1 - a
    mean = torch.tanh(x * a.sqrt() / variance)
    clean = mean + 0.09 * a.sqrt() / variance * (x - a.sqrt() * mean)
    return ((x - a.sqrt() * clean) / (1 - a).sqrt()).float()


def error(steps: int, solver: str, truth: Tensor) -> float:
    have = sample(two_modes, num_steps=steps, guidance_scale=1.0, solver=solver)
    return float((have - truth).square().mean().sqrt())


def test_same_limit_with_fewer_steps() -> None:
    truth = sample(two_modes, num_steps=500, guidance_scale=1.0)
    ddim = {n: error(n, "ddim", truth) for n in (10, 20, 40, 100)}
    second = {n: error(n, SOLVER, truth) for n in (10, 20, 40, 100)}
    for n in (10, 20, 40):
        assert second[n] < 0.25 * ddim[n]
    assert second[20] < ddim[100] < ddim[40]
    assert second[100] < 0.5 * ddim[100]


def test_agrees_with_diffusers() -> None:
    steps = 20
    grid = SCHEDULE.log_ratio_grid(steps)
    theirs = DPMSolverMultistepScheduler(
        trained_betas=SCHEDULE.betas_f64.tolist(),
        algorithm_type="dpmsolver++",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    # Betas cannot say that abar_0 is below 1.
    theirs.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod_f64)
    theirs.set_timesteps(timesteps=grid.timesteps[::-1].tolist())
    latents = other = NOISE.double()
    before = None
    for number, index in enumerate(range(len(grid) - 1, -1, -1)):
        noise = two_modes(latents[None], torch.tensor([[int(grid.timesteps[index])]]), None)[0]  # type: ignore[arg-type]
        alpha = float(grid.alphas[index])
        clean = (latents - noise * (1 - alpha) ** 0.5) / alpha**0.5
        latents = step_latents(grid, index, latents, noise, clean, before)
        before = clean
        other = theirs.step(noise, theirs.timesteps[number], other).prev_sample
        # Theirs rounds logarithms to float32.
        torch.testing.assert_close(latents, other.double(), rtol=1e-3, atol=2e-3)


def test_pieces_give_the_same_bits_as_the_whole() -> None:
    whole = sample(num_steps=20, solver=SOLVER)
    for cut in (1, 2, 11):
        clean: list[Tensor] = []

        def keep(progress: Progress, kept: list[Tensor] = clean) -> None:
            assert isinstance(progress, SamplingProgress) and progress.predicted_clean is not None
            kept.append(progress.predicted_clean)

        middle = sample(num_steps=20, solver=SOLVER, end_step=cut, callback=keep)
        rest: dict[str, Any] = {"noise": middle, "start_step": cut, "num_steps": 20}
        assert torch.equal(sample(solver=SOLVER, clean_before=clean[-1], **rest), whole)
        assert not torch.equal(sample(solver=SOLVER, **rest), whole)


def test_first_and_last_step_are_ddim() -> None:
    few, many = SCHEDULE.log_ratio_grid(10), SCHEDULE.log_ratio_grid(20)
    assert second_order_factor(few, len(few) - 1) == second_order_factor(few, 0) == 0
    assert all(second_order_factor(few, i) > 0 for i in range(1, len(few) - 1))
    assert second_order_factor(many, 0) > 0
    one = SCHEDULE.log_ratio_grid(1)
    assert second_order_factor(one, 0) == 0
    assert torch.equal(sample(num_steps=1, solver=SOLVER), sample(num_steps=1))
    factors = [second_order_factor(many, i) for i in range(len(many))]
    assert np.isfinite(factors).all() and max(factors) < 0.5


def test_steps_are_even_in_the_logarithm() -> None:
    for count in (2, 10, 50, 500):
        even, grid = SCHEDULE.ddim(count), SCHEDULE.log_ratio_grid(count)
        assert len(grid) == len(even) and (np.diff(grid.timesteps) > 0).all()
        assert grid.timesteps[[0, -1]].tolist() == even.timesteps[[0, -1]].tolist()
    alphas = SCHEDULE.log_ratio_grid(20).alphas.astype(float)
    lengths = np.diff(np.log(alphas / (1 - alphas)))
    assert lengths.min() / lengths.max() > 0.6


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="ddim"):
        needs_previous("euler")


def test_checkpoints_keep_the_clean_latents(tmp_path: Path) -> None:
    latents, clean = torch.randn(2, 2, 4, 8, 8).unbind(0)
    checkpoint = SamplingCheckpoint(tmp_path / "a.safetensors", "a", 1)
    checkpoint.save(4, latents, clean)
    found = checkpoint.load(0, 10, (2, 4, 8, 8))
    assert found is not None and found[2] is not None
    assert found[0] == 5 and torch.equal(found[1], latents) and torch.equal(found[2], clean)
    checkpoint.save(5, latents)
    found = checkpoint.load(0, 10, (2, 4, 8, 8))
    assert found is not None and found[2] is None


@pytest.mark.slow
def test_jobs_of_a_second_order_solver_hand_on_what_it_needs(tmp_path: Path) -> None:
    changes = {"solver": SOLVER, "num_shards": 1, "checkpoint_every_steps": 1}
    run = Run(tmp_path, tiny_settings(**changes))
    whole = read_shard(run.sample(0, 0))[0]

    def stop_late(progress: Progress) -> None:
        if progress.done == 6:
            raise DeadlineError("time is up")

    w, output = world(), run.files(0, "stopped")[0]
    arguments = (run.plan, run.latents, w.mmdm, w.head_model, [], output, 0, 0, run.settings)
    with pytest.raises(DeadlineError):
        sample_views(*arguments, callback=stop_late)
    sample_views(*arguments)
    assert torch.equal(read_shard(output)[0], whole)

    rounds = Run(tmp_path / "rounds", tiny_settings(solver=SOLVER, sync_steps=[0.5]))
    first = [rounds.sample(0, shard) for shard in range(2)]
    assert all("clean" in read_safetensors(path)[0] for path in first)
    assert torch.isfinite(read_shard(rounds.sample(1, 0))[0]).all()
    # A round of another solver lacks it.
    rounds.settings = tiny_settings(sync_steps=[0.5])
    for shard in range(2):
        rounds.sample(0, shard, "first_order")
    rounds.settings = tiny_settings(solver=SOLVER, sync_steps=[0.5])
    with pytest.raises(InputFileError, match="'clean'"):
        rounds.sample(1, 0, "first_order")
