"""Several processes that train together, one per GPU: who am I, and what all must agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Place of this process: rank of size."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def agree(self, values: list[float], device: torch.device) -> list[float]:
        """The first process's values, in all of them."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        agreed: list[float] = shared.tolist()
        return agreed

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """The means over all processes of values that all of them have; waits for them."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float32, device=device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def wait(self) -> None:
        """Returns when all are here."""
        if self.size > 1:
            dist.barrier()
