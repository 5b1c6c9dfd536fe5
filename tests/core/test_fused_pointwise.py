"""Norms and gates by own kernels: the same functions as torch's, on a CPU by torch itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.diffusion.fast_denoiser import FastDenoiser
from cap4d_core.diffusion.fused_pointwise import (
    fits,
    geglu,
    group_norm,
    normalise,
    partial_moments,
    tile_of,
)
from tests.core.mmdm_models import random_denoiser
from tests.core.test_fast_denoiser import CONFIGS, deviation, fast_noise, inputs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def some_norm(groups: int, channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels).requires_grad_(False)
    norm.weight.copy_(normal(channels, seed=1))
    norm.bias.copy_(normal(channels, seed=2))
    return norm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 48, 8, 16), (3, 320, 4, 4), (1, 16, 6, 10)])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_group_norm(shape: tuple[int, ...], silu: bool, mean: float) -> None:
    features, norm = channels_last(*shape) * 3 + mean, some_norm(8, shape[1])
    exact = norm.double()(features.double())
    actual = group_norm(features, norm.float(), silu)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # A mean of 1000 leaves numbers of 3 with three digits less.
    tolerance = 1e-5 if mean == 0 else 2e-3
    expected = (F.silu(exact) if silu else exact).float()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_results_are_rounded_once() -> None:
    features, norm = channels_last(2, 64, 8, 8), some_norm(8, 64)
    half = features.bfloat16()
    exact = F.silu(norm(half.float()))
    torch.testing.assert_close(group_norm(half, norm, True), exact.bfloat16(), rtol=0.004, atol=0)
    product = normal(20, 96).bfloat16()
    values, gates = product.float().chunk(2, dim=-1)
    assert torch.equal(geglu(product), (values * F.gelu(gates)).bfloat16())


def test_which_norms_fit() -> None:
    assert fits(nn.GroupNorm(8, 48))
    assert not fits(nn.GroupNorm(8, 40)) and not fits(nn.GroupNorm(8, 48, affine=False))


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560, 16])
@pytest.mark.parametrize("pixels", [64, 256, 1024, 4096, 60])
def test_tiles_cover_images(pixels: int, channels: int) -> None:
    rows, columns, tiles = tile_of(pixels, channels)
    assert pixels % (rows * tiles) == 0 and channels % columns == 0
    assert all(n & (n - 1) == 0 for n in (rows, columns))


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("float8", [False, True])
def test_network(references: int, float8: bool) -> None:
    config = CONFIGS["released shape"]
    latents, c = inputs(config, references, torch.float32)
    denoiser = random_denoiser(config)
    with torch.no_grad():
        plain = FastDenoiser(denoiser, float8=float8)
        expected = fast_noise(plain, latents, c, references, guided=True)
        fast = FastDenoiser(denoiser, float8=float8, fused=True)
        actual = fast_noise(fast, latents, c, references, guided=True)
    # Numbers near the middle of two 8-bit ones are rounded the other way, and what follows differs.
    assert 0 < deviation(actual, expected) < (0.08 if float8 else 1e-5)


def test_compilers_know_shapes() -> None:
    pixels = normal(2, 8, 16, 48)
    each = torch.ones(2, 48)
    for operator, arguments in (
        (partial_moments, (pixels,)),
        (normalise, (pixels, each, each, True)),
        (geglu, (normal(5, 32),)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
