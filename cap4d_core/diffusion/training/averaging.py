"""Exponential moving average of weights: what is used after training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages the parameters of a module in float32 (Polyak averaging with a warm-up).

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the random start fades.

    Args:
        module: whose parameters; buffers are not averaged.
        decay: share of the old average kept at each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.names = [name for name, _ in module.named_parameters()]
        self.sources = [p.detach() for p in module.parameters()]
        self.values = [p.clone() for p in self.sources]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present parameters in."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.sources, 1.0 - kept)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name; a module without buffers loads them directly."""
        return {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in zip(self.names, self.values, strict=True)
        }

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Takes up what `state` gave."""
        self.updates = updates
        with torch.no_grad():
            for name, value in zip(self.names, self.values, strict=True):
                value.copy_(state[name])
