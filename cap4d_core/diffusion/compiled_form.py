"""What the forms of a compiled denoiser have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Half-precision forms of one network differ by a few hundredths; wrong kernels by much more.
_PLAUSIBLE_DEVIATION = 0.1

Call = Callable[..., Tensor]


def check(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError if the compiled network computes something else."""
    if not bool(torch.isfinite(expected).all()):
        return  # the sampler reports that
    deviation = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not deviation < _PLAUSIBLE_DEVIATION:
        raise RuntimeError(f"its result deviates from the network's by {deviation:.2g}")


def describe(arguments: Any) -> Any:
    """Plain JSON types; what values of tensors are does not matter."""
    if isinstance(arguments, Tensor):
        kind = str(arguments.dtype).removeprefix("torch.")
        return {"shape": list(arguments.shape), "stride": list(arguments.stride()), "type": kind}
    if isinstance(arguments, tuple):
        return [describe(part) for part in arguments]
    return arguments
