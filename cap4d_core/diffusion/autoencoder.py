"""Images to latents and back: diffusers' `AutoencoderKL` with the model's latent scaling.

Images are (B, 3, H, W), RGB in [-1, 1]; latents are (B, 4, H / f, W / f), scaled to about unit
variance, with f = `AutoencoderConfig.downscale`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.diffusers_parts import AutoencoderKL, DiagonalGaussianDistribution
from cap4d_core.diffusion.model_config import AutoencoderConfig


class Autoencoder(nn.Module):
    """KL autoencoder; computes in its own type and returns float32.

    Batches are processed `batch_size` images at a time to bound memory, without effect on results.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.channel_mult)
        self.vae: Any = AutoencoderKL(
            in_channels=config.image_channels,
            out_channels=config.image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.base_channels * m for m in config.channel_mult),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            scaling_factor=config.scaling_factor,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.vae.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.quant_conv.weight.device

    def encode(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Scaled latents: scaling_factor * (mean + std * noise).

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W multiples of `config.downscale`.
            noise: (B, 4, h, w) standard normal draws of the posterior.
            generator: draws the noise if `noise` is not given, on the generator's device, so a CPU
                generator gives the same noise whatever the images' device. Without either, the
                posterior mean is returned.
            batch_size: images encoded at a time.

        Returns:
            (B, 4, h, w) float32 latents on the device of `images`.

        Raises:
            ValueError: shapes that do not fit.
        """
        mean, std = self.posterior(images, batch_size)
        if noise is None and generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        if noise is None:
            return mean * self.config.scaling_factor
        if noise.shape != mean.shape:
            raise ValueError(f"noise must be {tuple(mean.shape)}, got {tuple(noise.shape)}")
        return (mean + std * noise.to(mean)) * self.config.scaling_factor

    def posterior(self, images: Tensor, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | image), unscaled, each (B, 4, h, w) float32."""
        factor = self.config.downscale
        if images.ndim != 4 or images.shape[1] != self.config.image_channels:
            raise ValueError(
                f"images must be (B, {self.config.image_channels}, H, W), got {tuple(images.shape)}"
            )
        if any(side % factor for side in images.shape[-2:]):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels: both sides must be "
                f"multiples of {factor}"
            )
        means, stds = [], []
        for part in images.split(batch_size):
            moments = self.vae.encode(part.to(self.device, self.dtype)).latent_dist.parameters
            mean, std = self.posterior_of_moments(moments)
            means.append(mean.to(images.device))
            stds.append(std.to(images.device))
        return torch.cat(means), torch.cat(stds)

    @staticmethod
    def posterior_of_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from (B, 2 * 4, h, w) moments; log variance in [-30, 20]."""
        distribution = DiagonalGaussianDistribution(moments.float())
        return distribution.mean, distribution.std

    def decode(self, latents: Tensor, batch_size: int = 1, tiled: bool = False) -> Tensor:
        """Images of scaled latents; not clamped.

        Args:
            latents: (B, 4, h, w) scaled latents.
            batch_size: images decoded at a time.
            tiled: decode overlapping tiles and blend them: bounded memory for any image size, at
                small seams. Without effect on latents no larger than one tile.

        Returns:
            (B, 3, H, W) float32, about [-1, 1], on the device of `latents`.
        """
        if tiled:
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()
        images = []
        for part in latents.split(batch_size):
            moved = part.to(self.device)
            image = self._decode_tiled(moved) if tiled else self.decode_whole(moved)
            images.append(image.to(latents.device))
        return torch.cat(images)

    def decode_whole(self, latents: Tensor) -> Tensor:
        """As `decode`, all at once and untiled, in operations that a compiler can look into."""
        inner = self.vae.post_quant_conv(self._unscaled(latents))
        image: Tensor = self.vae.decoder(inner)
        return image.float()

    def _decode_tiled(self, latents: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(self._unscaled(latents)).sample
        return image.float()

    def _unscaled(self, latents: Tensor) -> Tensor:
        return (latents.float() / self.config.scaling_factor).to(self.dtype)
