"""Optimisers of the avatar fit: Adam for splats and network, a row-wise Adam for the neck.

A step of B views stands for B steps of one view, so its moments forget B times faster. Learning
rates are multiplied by B^e. Early in a fit all views pull the same way, and B steps of one view
would go B times as far: e = 1 (Goyal et al. 2017). Late, noise rules; the mean over B has sqrt(B)
times less of it: e = 1/2, epsilon shrinks alike (Malladi et al. 2022). In between e falls linearly
with the views seen. B = 1 is the published set-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cap4d_core.avatar.schedules import scheduled_rates
from cap4d_core.settings import FittingSettings

BETAS = (0.9, 0.999)
# Averaging over fewer steps than these stand for would leave Adam without moments.
MIN_BETAS = (0.5, 0.9)
# Of B in the factor of the learning rates, at the start and at the end of a fit.
RATE_EXPONENTS = (1.0, 0.5)
ADAM_EPS = 1e-15
NECK_EPS = 1e-18
SPLAT_GROUPS = ("xyz", "f_dc", "f_rest", "opacity", "scaling", "rotation")


def batch_betas(batch_size: int) -> tuple[float, float]:
    """Moment decays that forget as fast per view as BETAS does at one view per step."""
    first, second = (max(1 - batch_size * (1 - beta), 0.0) for beta in BETAS)
    return max(first, MIN_BETAS[0]), max(second, MIN_BETAS[1])


def rate_factor(batch_size: int, progress: float) -> float:
    """What B views per step multiply the learning rates with, at a share 0..1 of the fit."""
    first, last = RATE_EXPONENTS
    return float(batch_size ** (first + (last - first) * min(max(progress, 0.0), 1.0)))


def splat_rates(settings: FittingSettings) -> dict[str, float]:
    """Initial learning rates by group at one view per step."""
    return {
        "xyz": settings.lr_position,
        "f_dc": settings.lr_feature,
        "f_rest": settings.lr_feature / 20.0,
        "opacity": settings.lr_opacity,
        "scaling": settings.lr_scaling,
        "rotation": settings.lr_rotation,
    }


def make_adam(
    splats: Mapping[str, nn.Parameter], network: nn.Module, settings: FittingSettings
) -> torch.optim.Adam:
    """Adam with one group per splat tensor and one for the network (L2 weight decay, coupled).

    Args:
        splats: tensors by the names in SPLAT_GROUPS.
        network: deformation network.
        settings: rates and batch size.
    """
    rates = splat_rates(settings)
    groups: list[dict[str, object]] = [
        {"params": [splats[name]], "lr": rates[name], "name": name} for name in SPLAT_GROUPS
    ]
    groups.append(
        {
            "params": list(network.parameters()),
            "lr": settings.lr_deform_net,
            "weight_decay": settings.weight_decay_deform_net,
            "name": "deform_net",
        }
    )
    return torch.optim.Adam(
        groups,
        lr=0.0,
        betas=batch_betas(settings.views_per_step),
        eps=ADAM_EPS / math.sqrt(settings.views_per_step),
        fused=True,
    )


class RowAdam:
    """Adam that moves only the rows of a table that a step used (torch's SparseAdam, without sparse
    tensors, whose coalescing would stop the GPU every step).

    One step counter serves all rows. Rows without use keep their moments.
    """

    def __init__(
        self,
        table: nn.Parameter,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = NECK_EPS,
    ) -> None:
        self.table, self.lr, self.betas, self.eps = table, lr, betas, eps
        self.steps = 0
        self.exp_avg = torch.zeros_like(table)
        self.exp_avg_sq = torch.zeros_like(table)

    @torch.no_grad()
    def step(self, index: Tensor) -> None:
        """Steps the given rows (repeats allowed) with the table's dense gradient, then drops it."""
        gradient = self.table.grad
        if gradient is None:
            return
        self.steps += 1
        beta1, beta2 = self.betas
        g = gradient.index_select(0, index)
        m = self.exp_avg.index_select(0, index).lerp(g, 1 - beta1)
        v = self.exp_avg_sq.index_select(0, index).lerp(g * g, 1 - beta2)
        self.exp_avg.index_copy_(0, index, m)
        self.exp_avg_sq.index_copy_(0, index, v)
        step_size = self.lr * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        # Copied, not added: repeated rows hold equal values and must move once.
        moved = self.table.index_select(0, index) - step_size * m / (v.sqrt() + self.eps)
        self.table.index_copy_(0, index, moved)
        self.table.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """State to save."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Takes up saved state."""
        self.exp_avg.copy_(tensors["exp_avg"])
        self.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        self.steps = steps


def set_rates(
    iteration: int, settings: FittingSettings, adam: torch.optim.Adam, neck: RowAdam | None
) -> None:
    """Sets the learning rates of an iteration, see `scheduled_rates` and `rate_factor`."""
    factor = rate_factor(settings.views_per_step, iteration / settings.iterations)
    rates = splat_rates(settings) | scheduled_rates(iteration, settings)
    for group in adam.param_groups:
        group["lr"] = factor * rates[group["name"]]
    if neck is not None:
        neck.lr = factor * rates["neck"]


def group_of(adam: torch.optim.Optimizer, name: str) -> dict[str, object]:
    """The parameter group of that name."""
    return next(group for group in adam.param_groups if group["name"] == name)
