"""Linear layers in 8 bits: how far they may be off, and that they are where they are asked for."""

from __future__ import annotations

import pytest
import torch

from cap4d_core.diffusion.denoiser_setup import choose_route
from cap4d_core.diffusion.fast_denoiser import FastDenoiser
from cap4d_core.diffusion.float8_linear import Float8Product, fits, gate, quantise
from cap4d_core.diffusion.network_setup import choose_precision
from cap4d_core.errors import UserError
from tests.core.mmdm_models import random_denoiser
from tests.core.sampling_fixtures import tiny_settings
from tests.core.test_fast_denoiser import CONFIGS, deviation, fast_noise, inputs

# Half a unit in the last of 3 bits of mantissa.
ROUNDING = 2.0**-4


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_numbers_are_rounded_to_three_bits_whatever_their_size() -> None:
    values = normal(64, 32) * torch.logspace(-6, 6, 64)[:, None]
    values[7] = 0
    quantised, scale = quantise(values)
    restored = quantised.float() * scale
    # Below a hundredth of the largest, steps become absolute.
    floor = values.abs().amax(1, keepdim=True) / 100
    assert ((restored - values).abs() <= ROUNDING * torch.maximum(values.abs(), floor)).all()
    assert (restored[7] == 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_are_near_the_exact_ones(kind: torch.dtype) -> None:
    weight, tokens = normal(48, 64).to(kind), normal(2, 5, 64).to(kind)
    # An outlier must not spoil the other rows.
    tokens[1, 3, 9] = 1e4
    product = Float8Product(weight)
    exact = torch.nn.functional.linear(tokens.float(), weight.float())
    actual = product(tokens)
    assert actual.dtype == kind and actual.shape == (2, 5, 48)
    errors = (actual.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-3 < errors.max() < 0.06
    torch.testing.assert_close(product(tokens, slice(16, None)), actual[..., 16:])


def test_gates_are_near_the_exact_ones() -> None:
    product = normal(20, 96)
    values, gates = product.chunk(2, dim=-1)
    exact = values * torch.nn.functional.gelu(gates)
    quantised, scale = gate(product)
    assert quantised.dtype == torch.float8_e4m3fn
    largest = exact.abs().amax(1, keepdim=True)
    restored = quantised.float() * scale
    torch.testing.assert_close(restored.abs().amax(1, keepdim=True), largest)
    assert ((restored - exact).abs() <= ROUNDING * torch.maximum(exact.abs(), largest / 100)).all()
    torch.library.opcheck(gate, (product,), test_utils="test_faketensor")


def test_layers_of_other_widths_stay_as_they_are() -> None:
    assert fits(torch.zeros(32, 16)) and not fits(torch.zeros(32, 20))
    assert not fits(torch.zeros(16, 16, 1, 1))


@pytest.mark.parametrize("references", [1, 2])
def test_network_in_8_bits(references: int) -> None:
    config = CONFIGS["released shape"]
    denoiser = random_denoiser(config)
    latents, c = inputs(config, references, torch.float32)
    with torch.no_grad():
        exact = fast_noise(FastDenoiser(denoiser), latents, c, references, guided=True)
        fast = FastDenoiser(denoiser, float8=True)
        coarse = fast_noise(fast, latents, c, references, guided=True)
    kinds = [operation.kind.name for operation in fast.program.operations]
    layers = 6 * kinds.count("TRANSFORMER") + 2 * kinds.count("RESNET")
    assert len(fast.float8_products) == layers
    assert 1e-4 < deviation(coarse, exact) < 0.1


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_route(tiny_settings(precision="fp8"), cpu, 15, 100).float8
    assert not choose_route(tiny_settings(), cpu, 15, 100).float8
    with pytest.raises(UserError, match="needs the fast path"):
        choose_route(tiny_settings(precision="fp8", fast_path="off"), cpu, 15, 100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9.*has 8\.6"):
        choose_precision("fp8", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_precision("fp8", cuda) == "fp8"
