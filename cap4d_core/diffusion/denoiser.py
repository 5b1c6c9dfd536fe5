"""The multi-view denoiser: Stable Diffusion 2.1's U-Net without text, attending across views.

Built from diffusers' blocks. What differs from `UNet2DConditionModel`:

- no cross attention;
- at levels with `channel_mult >= 2` and in the middle, the tokens of all views of a sample attend
  to each other; views are told apart by their conditioning only, so their order does not matter;
- conditioning maps enter by a linear layer added after the first convolution;
- pixels of reference views are replaced by their clean latents, and each view has its timestep.

Shapes: b samples, V views, (h, w) latent pixels; parameter names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.diffusers_parts import (
    Attention,
    AttnProcessor2_0,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    TimestepEmbedding,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from cap4d_core.diffusion.embeddings import time_projection
from cap4d_core.diffusion.model_config import AutoencoderConfig, ConditioningConfig, MMDMConfig

__all__ = ["AutoencoderConfig", "ConditioningConfig", "MMDMConfig", "MMDMDenoiser"]

RESNET_EPS = 1e-5


class ViewAttention(AttnProcessor2_0):
    """Self-attention within each view, or over the tokens of all views of a sample.

    Runs on torch's fused kernel, whose scores and softmax are float32 for half-precision inputs.
    """

    def __init__(self, across_views: bool) -> None:
        super().__init__()
        self.across_views = across_views

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attends; `hidden_states` is (b * num_views, tokens, C), views of a sample adjacent."""
        if not self.across_views:
            return super().__call__(attn, hidden_states)
        joined = hidden_states.unflatten(0, (-1, num_views)).flatten(1, 2)
        return super().__call__(attn, joined).reshape(hidden_states.shape)


class MMDMDenoiser(nn.Module):
    """Predicts the noise of V views at once, given conditioning maps and reference latents."""

    def __init__(self, config: MMDMConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.level_channels
        first, last = channels[0], channels[-1]
        time_channels = 4 * config.model_channels
        common: dict[str, Any] = {
            "temb_channels": time_channels,
            "resnet_eps": RESNET_EPS,
            "resnet_act_fn": "silu",
            "resnet_groups": config.norm_groups,
        }

        self.time_proj = time_projection(config.model_channels)
        self.time_embedding = TimestepEmbedding(config.model_channels, time_channels)
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel_size=3, padding=1)
        self.cond_linear = nn.Linear(config.condition_channels, first)

        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            sizes: dict[str, Any] = {
                "in_channels": channels[max(level - 1, 0)],
                "out_channels": width,
                "num_layers": config.num_res_blocks,
                "add_downsample": level < len(channels) - 1,
                "downsample_padding": 1,
            }
            if level in config.attention_levels:
                block: nn.Module = CrossAttnDownBlock2D(
                    **sizes, **common, **self._attention_sizes(width)
                )
                _set_attention(block, config.is_multi_view(level))
            else:
                block = DownBlock2D(**sizes, **common)
            self.down_blocks.append(block)

        self.mid_block = UNetMidBlock2DCrossAttn(
            in_channels=last, **common, **self._attention_sizes(last)
        )
        _set_attention(self.mid_block, config.is_multi_view(-1))

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            width = channels[level]
            sizes = {
                "in_channels": channels[max(level - 1, 0)],
                "out_channels": width,
                "prev_output_channel": channels[min(level + 1, len(channels) - 1)],
                "num_layers": config.num_res_blocks + 1,
                "add_upsample": level > 0,
            }
            if level in config.attention_levels:
                block = CrossAttnUpBlock2D(**sizes, **common, **self._attention_sizes(width))
                _set_attention(block, config.is_multi_view(level))
            else:
                block = UpBlock2D(**sizes, **common)
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, first, eps=RESNET_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel_size=3, padding=1)

    def _attention_sizes(self, width: int) -> dict[str, Any]:
        return {
            "num_attention_heads": width // self.config.head_channels,
            "transformer_layers_per_block": self.config.transformer_depth,
            "cross_attention_dim": None,  # leaves out attn2 and norm2
            "use_linear_projection": True,
        }

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: FrameConditioning | Mapping[str, Tensor],
    ) -> Tensor:
        """Noise prediction (epsilon).

        Args:
            latents: (b, V, 4, h, w) noisy latents; values at reference pixels are not used there.
            timesteps: (b, V) integer timesteps.
            conditioning: with leading axes (b, V). V may differ from `config.views_per_call`, but
                trained weights know only that number.

        Returns:
            (b, V, 4, h, w) noise in the type of `latents`; at reference pixels the difference
            latents - z_input.

        Raises:
            ValueError: shapes that do not fit each other or the model.
        """
        if not isinstance(conditioning, FrameConditioning):
            conditioning = FrameConditioning(**conditioning)
        self._check_shapes(latents, timesteps, conditioning)
        num_views = latents.shape[1]
        mask = conditioning.ref_mask.to(latents.dtype)
        is_generated = torch.logical_not(mask).to(latents.dtype)
        clean = conditioning.z_input.to(latents.dtype)

        network_input = (clean * mask + latents * is_generated).flatten(0, 1).to(self.dtype)
        hidden = self.conv_in(network_input)
        maps = self.cond_linear(conditioning.pos_enc.flatten(0, 1).to(self.dtype))
        hidden = hidden + maps.permute(0, 3, 1, 2)
        time = self.time_proj(timesteps.flatten()).to(self.dtype)
        noise = self._unet(hidden, self.time_embedding(time), num_views)
        noise = noise.unflatten(0, (-1, num_views)).to(latents.dtype)
        return (latents - clean) * mask + noise * is_generated

    def _unet(self, hidden: Tensor, time_embedding: Tensor, num_views: int) -> Tensor:
        attention = {"cross_attention_kwargs": {"num_views": num_views}}
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            extra = attention if isinstance(block, CrossAttnDownBlock2D) else {}
            hidden, outputs = block(hidden, time_embedding, **extra)
            skips += outputs
        hidden = self.mid_block(hidden, time_embedding, **attention)
        for block in self.up_blocks:
            used = self.config.num_res_blocks + 1
            extra = attention if isinstance(block, CrossAttnUpBlock2D) else {}
            hidden = block(hidden, skips[-used:], time_embedding, **extra)
            skips = skips[:-used]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))

    def _check_shapes(
        self, latents: Tensor, timesteps: Tensor, conditioning: FrameConditioning
    ) -> None:
        channels, levels = self.config.in_channels, len(self.config.channel_mult)
        shape = tuple(latents.shape)
        if latents.ndim != 5 or latents.shape[2] != channels:
            raise ValueError(f"latents must be (b, V, {channels}, h, w), got {shape}")
        if any(side % 2 ** (levels - 1) for side in latents.shape[-2:]):
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} pixels: both sides must be "
                f"multiples of {2 ** (levels - 1)}"
            )
        if timesteps.shape != latents.shape[:2]:
            raise ValueError(
                f"timesteps must be (b, V) = {shape[:2]}, got {tuple(timesteps.shape)}"
            )
        wanted = (*latents.shape[:2], *latents.shape[-2:], self.config.condition_channels)
        if conditioning.pos_enc.shape != wanted:
            raise ValueError(
                f"pos_enc must be (b, V, h, w, C) = {wanted}, "
                f"got {tuple(conditioning.pos_enc.shape)}"
            )


def _set_attention(block: nn.Module, across_views: bool) -> None:
    for module in block.modules():
        if isinstance(module, Attention):
            module.set_processor(ViewAttention(across_views))  # type: ignore[arg-type]
