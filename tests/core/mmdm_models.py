"""Tiny multi-view diffusion models for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import AutoencoderConfig, MMDMConfig, MMDMDenoiser

TINY = MMDMConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(0, 1),
    head_channels=8,
    norm_groups=8,
    condition_channels=6,
    views_per_call=4,
    latent_size=8,
    autoencoder=AutoencoderConfig(
        base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4
    ),
)

# In a checkpoint the group count cannot be seen, so it must be the released one (32).
TINY_RELEASED = MMDMConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(0,),
    head_channels=64 // 4,
    condition_channels=10,
    views_per_call=4,
    latent_size=8,
    autoencoder=AutoencoderConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1),
)


def random_denoiser(config: MMDMConfig = TINY, seed: int = 0) -> MMDMDenoiser:
    """Randomly initialised, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MMDMDenoiser(config).eval().requires_grad_(False)


def random_frames(
    config: MMDMConfig, batch: int, num_references: int, seed: int = 0
) -> tuple[Tensor, Tensor, FrameConditioning]:
    """Latents (b, V, 4, h, w), timesteps (b, V), conditioning; references come first."""
    generator = torch.Generator().manual_seed(seed)
    v, s = config.views_per_call, config.latent_size
    mask = torch.zeros(batch, v, 1, s, s)
    mask[:, :num_references] = 1
    return (
        torch.randn(batch, v, config.in_channels, s, s, generator=generator),
        torch.randint(0, 1000, (batch, v), generator=generator),
        FrameConditioning(
            torch.randn(batch, v, s, s, config.condition_channels, generator=generator),
            torch.randn(batch, v, config.in_channels, s, s, generator=generator),
            mask,
        ),
    )


def triangle_tables() -> dict[str, Tensor]:
    """Renderer tables of two triangles."""
    return {
        "freqs": 2.0 ** torch.arange(7),
        "faces": torch.tensor([[0, 1, 2], [2, 1, 3]]),
        "faces_uvs": torch.tensor([[0, 1, 2], [2, 1, 3]]),
        "face_mask": torch.tensor([True, False]),
        "props": torch.tensor([[0, 0, 0.5], [1, 0, 0], [0, 1, 0], [1, 1, -0.5]]),
    }
