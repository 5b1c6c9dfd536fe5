"""How latents go from one step of the DDIM grid to the next.

DDIM takes the noise predicted at a step as constant up to the next one: first order. DPM-Solver++
(2M; Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models", algorithm 2) also uses the clean latents predicted one step before: second order at the
same cost, so that fewer steps come as close to the limit of many.

With lambda = log(sqrt(abar) / sqrt(1 - abar)) and step lengths h in lambda, its update is DDIM's
plus

    sqrt(abar_next) (1 - exp(-h)) h / (2 h_before) (clean - clean_before).

Its steps are even in lambda, not in the timestep, see `NoiseSchedule.log_ratio_grid`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from cap4d_core.diffusion.schedule import DDIMGrid, NoiseSchedule

Solver = Literal["ddim", "dpm-solver++"]
# Fewer steps than this end with a first-order one, which is more stable (as the authors advise).
FEW_STEPS = 15


def needs_previous(solver: str) -> bool:
    """Whether a step looks at the clean latents predicted in the step before.

    Raises:
        ValueError: unknown solver.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r}: choose from {', '.join(get_args(Solver))}")
    return solver != "ddim"


def solver_grid(schedule: NoiseSchedule, num_steps: int, solver: str) -> DDIMGrid:
    """The steps that a solver takes; their number depends on `num_steps` only."""
    if needs_previous(solver):
        return schedule.log_ratio_grid(num_steps)
    return schedule.ddim(num_steps)


def second_order_factor(grid: DDIMGrid, index: int) -> float:
    """What (clean - clean_before) is multiplied by when grid entry `index` is stepped from."""
    is_first, is_last = index == len(grid) - 1, index == 0
    if is_first or (is_last and len(grid) < FEW_STEPS):
        return 0.0
    before, now = _log_ratio(grid.alphas[index + 1]), _log_ratio(grid.alphas[index])
    after = _log_ratio(grid.alphas_prev[index])
    if after <= now or now <= before:  # the last step may end where it starts
        return 0.0
    h = after - now
    reached = math.sqrt(float(grid.alphas_prev[index])) * -math.expm1(-h)
    return reached * h / (2 * (now - before))


def _log_ratio(alpha: np.floating | float) -> float:
    value = float(alpha)
    return 0.5 * (math.log(value) - math.log1p(-value))


def step_latents(
    grid: DDIMGrid,
    index: int,
    latents: Tensor,
    noise: Tensor,
    clean: Tensor | None = None,
    clean_before: Tensor | None = None,
) -> Tensor:
    """Latents after the step from grid entry `index`.

    Args:
        grid: factors of DDIM.
        index: 0 is the last step that is run.
        latents: (N, 4, h, w).
        noise: predicted in this step.
        clean: `predicted_clean` of this step; None for DDIM.
        clean_before: of the step before; None for DDIM and in a first step.
    """
    # float() of a float32 is exact, and torch multiplies float32 tensors in float32.
    updated = latents * float(grid.x_factor[index]) + noise * float(grid.e_factor[index])
    if clean is None or clean_before is None:
        return updated
    return updated + (clean - clean_before) * second_order_factor(grid, index)


def predicted_clean(grid: DDIMGrid, index: int, latents: Tensor, noise: Tensor) -> Tensor:
    """Noise-free latents that a noise prediction stands for."""
    alpha = float(grid.alphas[index])
    return (latents - noise * (1 - alpha) ** 0.5) / alpha**0.5
