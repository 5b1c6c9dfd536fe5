"""The denoiser on a CUDA device, against the CPU and at full size."""

from __future__ import annotations

import pytest
import torch

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from tests.core.mmdm_models import TINY, random_denoiser, random_frames

pytestmark = pytest.mark.gpu


@pytest.fixture
def exact_float32() -> object:
    """Convolutions in float32, not TF32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Relative deviation of generated views: float32 sums in another order; 11 and 8 bits.
    [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("exact_float32")
def test_cuda_agrees_with_cpu(
    dtype: torch.dtype, bound: float, layout: torch.memory_format
) -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=2, num_references=1)
    expected = denoiser(latents, timesteps, cond)[:, 1:]
    denoiser = denoiser.to("cuda", dtype, memory_format=layout)
    actual = denoiser(latents.cuda(), timesteps.cuda(), cond.to("cuda"))[:, 1:].cpu()
    assert float((actual - expected).std() / expected.std()) < bound


def test_full_size_call_fits_in_memory() -> None:
    """A guided call of 2 x 8 views at 64 x 64 in bfloat16 needs less than 6 GB."""
    config = MMDMConfig()
    with torch.device("meta"):
        denoiser = MMDMDenoiser(config)
    denoiser = denoiser.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    size, views = config.latent_size, config.views_per_call
    latents = torch.randn(2, views, 4, size, size, device="cuda")
    mask = torch.zeros(2, views, 1, size, size, device="cuda")
    mask[:, :4] = 1
    maps = torch.randn(2, views, size, size, config.condition_channels, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        out = denoiser(
            latents,
            torch.full((2, views), 500, device="cuda"),
            FrameConditioning(maps, latents, mask),
        )
    assert out.shape == latents.shape and bool(torch.isfinite(out).all())
    assert torch.cuda.max_memory_allocated() < 6e9
