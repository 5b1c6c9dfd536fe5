"""Convolutions in 8 bits: how far they may be off, and where they are possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cap4d_core.diffusion.float8_convolution import (
    Float8Convolution,
    activate,
    convolve,
    fits,
    is_possible,
)
from tests.core.test_fused_pointwise import normal, some_norm


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_results_are_near_the_exact_ones(kind: torch.dtype) -> None:
    weight, bias = normal(32, 48, 3, 3, seed=1) / 20, normal(32, seed=2).to(kind)
    # Channels of weights of very different size have scales of their own.
    weight *= torch.logspace(-3, 3, 32)[:, None, None, None]
    features = normal(2, 48, 8, 16).mul(3).add(1).to(kind)
    features = features.contiguous(memory_format=torch.channels_last)
    norm = some_norm(8, 48)
    actual = Float8Convolution(weight)(features, norm, bias)
    exact = F.conv2d(F.silu(norm(features.float())), weight, bias.float(), padding=1)
    assert actual.dtype == kind and actual.is_contiguous(memory_format=torch.channels_last)
    difference, size = ((t.transpose(0, 1).flatten(1)).norm(dim=1) for t in (actual - exact, exact))
    errors = difference / size
    # Sums of some channels nearly cancel.
    assert 1e-3 < errors.max() < 0.12 and errors.median() < 0.05


def test_large_inputs_saturate() -> None:
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = torch.eye(16)
    norm = nn.GroupNorm(4, 16)
    norm.bias.data.fill_(1e6)
    with torch.no_grad():
        result = Float8Convolution(weight)(normal(1, 16, 8, 8), norm, torch.zeros(16))
    torch.testing.assert_close(result, torch.full((1, 16, 8, 8), 28.0))


def test_which_layers_fit() -> None:
    features = torch.zeros(1, 32, 8, 8)
    assert fits(nn.Conv2d(32, 16, 3, padding=1), features)
    assert not fits(nn.Conv2d(32, 16, 1), features)
    assert not fits(nn.Conv2d(32, 16, 3, stride=2, padding=1), features)
    assert not fits(nn.Conv2d(32, 20, 3, padding=1), features)
    assert not fits(nn.Conv2d(32, 16, 3, padding=1), torch.zeros(1, 32, 4, 4))


@pytest.mark.parametrize(("capability", "possible"), [((8, 9), False), ((9, 0), True)])
def test_gpus_without_the_memory_accelerator_keep_16_bits(
    capability: tuple[int, int], possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=(32, 16, 3, 3))
    layer: Any = SimpleNamespace(weight=weight)
    assert is_possible(layer) == possible


def test_compilers_know_shapes() -> None:
    pixels, kernel = (t.to(torch.float8_e4m3fn) for t in (normal(1, 8, 8, 16), normal(9, 32, 16)))
    for operator, arguments in (
        (convolve, (pixels, kernel, torch.ones(32), torch.zeros(32))),
        (activate, (normal(1, 8, 8, 16), torch.ones(1, 16), torch.zeros(1, 16))),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
