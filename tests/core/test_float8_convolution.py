"""Convolutions in 8 bits: how far they may be off, and where they are possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cap4d_core.diffusion.float8_convolution import Float8Convolution, convolve, fits


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_results_are_near_the_exact_ones(kind: torch.dtype) -> None:
    weight, bias = normal(32, 48, 3, 3, seed=1) / 20, normal(32, seed=2).to(kind)
    # Channels of weights of very different size have scales of their own.
    weight *= torch.logspace(-3, 3, 32)[:, None, None, None]
    features = F.silu(normal(2, 48, 8, 16)).to(kind).contiguous(memory_format=torch.channels_last)
    actual = Float8Convolution(weight)(features, bias)
    exact = F.conv2d(features.float(), weight, bias.float(), padding=1)
    assert actual.dtype == kind and actual.is_contiguous(memory_format=torch.channels_last)
    difference, size = ((t.transpose(0, 1).flatten(1)).norm(dim=1) for t in (actual - exact, exact))
    errors = difference / size
    assert 1e-3 < errors.max() < 0.06


def test_large_inputs_saturate() -> None:
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    result = Float8Convolution(weight)(torch.full((1, 16, 8, 8), 1e6), torch.zeros(16))
    torch.testing.assert_close(result, torch.full((1, 16, 8, 8), 28.0))


def test_which_layers_fit() -> None:
    features = torch.zeros(1, 32, 8, 8)
    assert fits(nn.Conv2d(32, 16, 3, padding=1), features)
    assert not fits(nn.Conv2d(32, 16, 1), features)
    assert not fits(nn.Conv2d(32, 16, 3, stride=2, padding=1), features)
    assert not fits(nn.Conv2d(32, 20, 3, padding=1), features)
    assert not fits(nn.Conv2d(32, 16, 3, padding=1), torch.zeros(1, 32, 4, 4))


def test_compilers_know_its_shape() -> None:
    torch.library.opcheck(
        convolve,
        (
            normal(1, 8, 8, 16).to(torch.float8_e4m3fn),
            normal(9, 32, 16).to(torch.float8_e4m3fn),
            torch.ones(32),
            torch.zeros(32),
        ),
        test_utils="test_faketensor",
    )
