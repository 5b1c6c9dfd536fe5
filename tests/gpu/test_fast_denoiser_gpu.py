"""The fast denoiser on a CUDA device against the plain one, and decoding in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.compiled_network import CompiledNetwork
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.decoding import _Decoder
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.diffusion.denoiser_setup import compiled_denoiser
from cap4d_core.diffusion.fast_denoiser import FastDenoiser
from cap4d_core.diffusion.fast_sampling import FastSamplingDenoiser
from cap4d_core.diffusion.float8_convolution import LEAST_CAPABILITY as LEAST_FOR_CONVOLUTIONS
from cap4d_core.diffusion.float8_convolution import Float8Convolution
from cap4d_core.diffusion.float8_linear import LEAST_CAPABILITY, Float8Product, gate
from cap4d_core.diffusion.grouping import SeededGrouping
from cap4d_core.diffusion.model_config import AutoencoderConfig
from cap4d_core.diffusion.pictures import image_from_network
from cap4d_core.diffusion.sampler import StepPlan, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.settings import SamplingSettings
from tests.core.mmdm_models import random_denoiser
from tests.core.test_fast_denoiser import CONFIGS, fast_noise, frames, inputs, plain_noise, run

pytestmark = pytest.mark.gpu

CONFIG = CONFIGS["released shape"]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Float32 products and convolutions without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_float32_equals_the_plain_denoiser(references: int, merge: bool, fused: bool) -> None:
    denoiser = random_denoiser(CONFIG).cuda()
    latents, c = inputs(CONFIG, references, torch.float32)
    latents, c = latents.cuda(), c.to("cuda")
    expected = plain_noise(denoiser, latents, c, references, guided=True)
    layout = torch.channels_last if fused else torch.contiguous_format
    fast = FastDenoiser(denoiser, merge_upsampling=merge, memory_format=layout, fused=fused)
    actual = fast_noise(fast, latents, c, references, guided=True)
    assert relative(actual, expected) < 1e-4


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize(
    ("merge", "fused", "compiled"),
    [
        (False, False, False), (True, False, False), (True, False, True),
        (True, True, False), (True, True, True),
    ],
)  # fmt: skip
def test_bfloat16_is_as_near_to_float32_as_the_plain_denoiser(
    references: int, merge: bool, fused: bool, compiled: bool
) -> None:
    latents, c = inputs(CONFIG, references, torch.float32)
    latents, c = latents.cuda(), c.to("cuda")
    with torch.no_grad():
        exact = plain_noise(random_denoiser(CONFIG).cuda(), latents, c, references, guided=True)
        layout = torch.channels_last
        denoiser = random_denoiser(CONFIG).to("cuda", torch.bfloat16, memory_format=layout)
        plain = relative(plain_noise(denoiser, latents, c, references, guided=True), exact)
        fast = FastDenoiser(denoiser, merge_upsampling=merge, memory_format=layout, fused=fused)
        call = compiled_denoiser(fast) if compiled else None
        error = relative(fast_noise(fast, latents, c, references, True, call), exact)
    assert call is None or call.is_compiled
    # Bfloat16 has 8 bits; both forms round equally often, but not the same values.
    assert 1e-4 < plain < 0.05 and error < 1.5 * plain


def needs(capability: tuple[int, int]) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < capability,
        reason=f"needs a GPU of compute capability {capability}",
    )


needs_float8 = needs(LEAST_CAPABILITY)


@needs_float8
def test_products_of_8_bits_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 320, generator=generator)
    tokens = torch.randn(3, 100, 320, generator=generator).bfloat16()
    product = Float8Product(weight.bfloat16())
    expected = product(tokens)
    actual = product.cuda()(tokens.cuda())
    assert relative(actual.cpu(), expected) < 0.01  # sums of another order, bfloat16 results
    part = product(tokens.cuda(), slice(320, None))
    torch.testing.assert_close(part, actual[..., 320:], rtol=0.02, atol=0.05)


@needs(LEAST_FOR_CONVOLUTIONS)
@pytest.mark.parametrize(
    ("batch", "side", "channels"), [(3, 8, (64, 48)), (2, 16, (320, 144)), (1, 64, (320, 320))]
)
def test_convolutions_of_8_bits_are_those_of_the_cpu(
    batch: int, side: int, channels: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_in, num_out = channels
    weight = torch.randn(num_out, num_in, 3, 3, generator=generator) / (9 * num_in) ** 0.5
    features = torch.randn(batch, num_in, side, side, generator=generator).bfloat16()
    features = features.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(num_out, generator=generator).bfloat16()
    norm = nn.GroupNorm(16, num_in).requires_grad_(False)
    convolution = Float8Convolution(weight)
    expected = convolution(features, norm, bias)
    actual = convolution.cuda()(features.cuda(), norm.cuda(), bias.cuda())
    assert relative(actual.cpu(), expected) < 0.01  # a few numbers are rounded the other way


@needs_float8
@pytest.mark.parametrize("width", [96, 1280, 5120])
def test_gates_of_8_bits_are_those_of_the_cpu(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(300, 2 * width, generator=generator)
    product[17] = 0
    expected, expected_scale = gate(product)
    actual, scale = gate(product.cuda())
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-5, atol=0)
    restored = actual.cpu().float() * scale.cpu()
    assert relative(restored, expected.float() * expected_scale) < 0.005


@needs_float8
@pytest.mark.parametrize("compiled", [False, True])
def test_network_in_8_bits(tmp_path: Path, compiled: bool) -> None:
    latents, c = inputs(CONFIG, 1, torch.float32)
    with torch.no_grad():
        imitated = FastDenoiser(random_denoiser(CONFIG), float8=True)
        expected = fast_noise(imitated, latents, c, 1, guided=True)
        layout = torch.channels_last
        denoiser = random_denoiser(CONFIG).to("cuda", torch.bfloat16, memory_format=layout)
        fast = FastDenoiser(denoiser, None, True, layout, float8=True)
        call = compiled_denoiser(fast, tmp_path) if compiled else None
        actual = fast_noise(fast, latents.cuda(), c.to("cuda"), 1, True, call)
    assert fast.float8_products and (call is None or call.is_compiled)
    assert relative(actual.cpu(), expected) < 0.1


def test_compiled_form_is_kept(tmp_path: Path) -> None:
    """The next job loads it, with its own weights, and computes the same bits."""
    latents, c = inputs(CONFIG, 1, torch.float32)
    latents, c = latents.cuda(), c.to("cuda")
    layout = torch.channels_last
    results = []
    for seed, loaded in ((0, False), (0, True), (1, True)):
        denoiser = random_denoiser(CONFIG, seed).to("cuda", torch.bfloat16, memory_format=layout)
        fast = FastDenoiser(denoiser, merge_upsampling=True, memory_format=layout)
        call = compiled_denoiser(fast, tmp_path)
        with torch.no_grad():
            results.append(fast_noise(fast, latents, c, 1, True, call))
            expected = fast_noise(fast, latents, c, 1, True)
        assert call.is_compiled and call.was_loaded == loaded
        assert relative(results[-1], expected) < 0.05
    assert torch.equal(results[0], results[1]) and relative(results[2], results[0]) > 0.1


def test_whole_run_and_resumed_run() -> None:
    """In float32, like the plain denoiser; cut in two, the same bits."""
    from tests.core.mmdm_models import TINY

    denoiser = random_denoiser(TINY).cuda()
    views, references = frames(TINY, 12, 0.0, 2).to("cuda"), frames(TINY, 3, 1.0, 1).to("cuda")
    noise = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(5)).cuda()

    def sample(model: Any, latents: Tensor, start: int, end: int) -> Tensor:
        return sample_stochastic_io(
            model, NoiseSchedule(), references, views, 5, 2.0, 4, 2, latents,
            SeededGrouping(3, 12, 2, 2, ("k",)), start, end, batches_per_call=2,
        )  # fmt: skip

    fast = FastSamplingDenoiser(FastDenoiser(denoiser), same_shapes=True)
    whole = sample(fast, noise, 0, 5)
    assert relative(whole, sample(denoiser, noise, 0, 5)) < 1e-4
    assert relative(whole.cpu(), run(random_denoiser(TINY), 2)) < 1e-3
    again = FastSamplingDenoiser(FastDenoiser(denoiser), same_shapes=True)
    assert torch.equal(sample(again, sample(again, noise, 0, 2), 2, 5), whole)


def test_work_ahead_does_not_wait_for_the_device() -> None:
    from tests.core.mmdm_models import TINY

    fast = FastSamplingDenoiser(FastDenoiser(random_denoiser(TINY).cuda()), same_shapes=True)
    views, references = frames(TINY, 12, 0.0, 2).to("cuda"), frames(TINY, 3, 1.0, 1).to("cuda")
    step = fast.prepare(references, views, 2.0, 2)
    grouping = SeededGrouping(3, 12, 2, 2, ("k",))
    latents = torch.randn(12, 4, 8, 8, device="cuda")
    plans = [StepPlan(500 - i, *grouping.step(i)) for i in range(2)]
    step(plans[0], latents)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step.announce(plans[1])
        ahead = step(plans[1], latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = fast.prepare(references, views, 2.0, 2)
    assert torch.equal(again(plans[1], latents), ahead)


def test_released_size() -> None:
    """Bfloat16 at full size: fast against plain, one guided batch with four references."""
    config = MMDMConfig()
    views, references = frames(config, 4, 0.0, 3), frames(config, 4, 1.0, 4)
    together = FrameConditioning.cat([references, views])
    batch = FrameConditioning.stack([together]).to("cuda")
    with torch.device("cuda"):
        torch.manual_seed(0)
        denoiser = MMDMDenoiser(config).eval().requires_grad_(False)
    denoiser = denoiser.to(torch.bfloat16, memory_format=torch.channels_last)
    latents = torch.randn(1, 8, 4, 64, 64, device="cuda")
    with torch.no_grad():
        expected = plain_noise(denoiser, latents, batch, 4, guided=True)
        fast = FastDenoiser(denoiser, memory_format=torch.channels_last)
        actual = fast_noise(fast, latents, batch, 4, guided=True)
    assert relative(actual, expected) < 0.03


@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_in_float16(tmp_path: Path, compiled: bool) -> None:
    """At most one of 255 levels from float32 for nearly all pixels."""
    config = AutoencoderConfig()
    with torch.device("cuda"):
        torch.manual_seed(0)
        autoencoder = Autoencoder(config).eval().requires_grad_(False)
    # Random weights give flat grey; stretch the last layer to the full range of images.
    latent = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    flat = autoencoder.decode(latent.cuda())
    last = autoencoder.vae.decoder.conv_out
    last.weight.mul_(0.5 / flat.std())
    last.bias.zero_()
    exact = image_from_network(autoencoder.decode(latent.cuda())[0].cpu().numpy())
    assert exact.std() > 30
    device = torch.device("cuda")
    kernels = tmp_path if compiled else None
    with torch.no_grad():
        decoder = _Decoder(autoencoder, device, True, SamplingSettings(), kernels)
        half = decoder.start(latent)()
    if compiled:
        assert isinstance(decoder.half, CompiledNetwork) and decoder.half.is_compiled
        assert list(tmp_path.rglob("decoder-*.bin"))
    levels = np.abs(half.astype(int) - exact.astype(int))
    assert levels.mean() < 0.25 and (levels > 1).mean() < 0.001
