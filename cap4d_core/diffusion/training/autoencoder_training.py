"""Training of the KL autoencoder on crops: absolute, squared and optional perceptual errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.seeding import derived_seed
from cap4d_core.diffusion.training.trainer import LossFunction, LossTerms
from cap4d_core.training_settings import AutoencoderTrainingSettings

# LPIPS or another distance of images (B, 3, H, W) in -1..1; a scalar.
Perceptual = Callable[[Tensor, Tensor], Tensor]


class AutoencoderPass(nn.Module):
    """Encoder, posterior sample and decoder in one call, as training needs them."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.vae = autoencoder.vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and log variance of the posterior."""
        moments = self.vae.quant_conv(self.vae.encoder(images))
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.vae.decoder(self.vae.post_quant_conv(latents)), mean, log_variance


def autoencoder_loss(
    images: Callable[[], Tensor],
    autoencoder: Autoencoder,
    settings: AutoencoderTrainingSettings,
    seed: int,
    rank: int = 0,
    perceptual: Perceptual | None = None,
) -> LossFunction:
    """Loss on random pictures.

    Args:
        images: gives the (N, 3, H, W) uint8 pictures that may be drawn, on the device of training
            or on the CPU; asked at every batch, so that their number may grow.
        autoencoder: the network being trained.
        settings: weights of the terms, batch size.
        seed: of the draws; together with rank and the number of the batch.
        rank: of this process.
        perceptual: distance behind `perceptual_weight`.
    """

    def loss(network: Callable[..., Any], number: int) -> LossTerms:
        pool, device = images(), autoencoder.device
        generator = torch.Generator(device).manual_seed(
            derived_seed("pictures", seed, rank, number) % 2**63
        )
        draws = torch.rand(settings.batch_size, generator=generator, device=device)
        index = (draws * len(pool)).long().clamp(max=len(pool) - 1)
        batch = pool[index.to(pool.device)].to(device, non_blocking=True).float() / 127.5 - 1.0
        size = [side // autoencoder.config.downscale for side in batch.shape[-2:]]
        shape = (len(batch), autoencoder.config.latent_channels, *size)
        noise = torch.randn(shape, generator=generator, device=device)
        decoded, mean, log_variance = network(batch, noise)
        errors = decoded.float() - batch
        squared, absolute = errors.square().mean(), errors.abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        total = (
            settings.mse_weight * squared
            + settings.l1_weight * absolute
            + settings.kl_weight * divergence
        )
        terms = {"mse": squared, "l1": absolute, "kl": divergence}
        if perceptual is not None and settings.perceptual_weight > 0:
            terms["perceptual"] = perceptual(decoded.float(), batch)
            total = total + settings.perceptual_weight * terms["perceptual"]
        return {"loss": total, **terms}

    return loss


@torch.no_grad()
def encode_all(
    autoencoder: Autoencoder, images: Tensor, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations (N, C, h, w) float16, unscaled, of uint8 pictures.

    They are stored where the pictures are.
    """
    means, stds = [], []
    for part in images.split(batch_size):
        batch = part.to(autoencoder.device).float() / 127.5 - 1.0
        mean, std = autoencoder.posterior(batch, batch_size)
        means.append(mean.to(images.device, torch.float16))
        stds.append(std.to(images.device, torch.float16))
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def reconstruction_psnr(autoencoder: Autoencoder, images: Tensor, batch_size: int = 64) -> float:
    """PSNR in dB of decoded posterior means over all pixels of uint8 pictures."""
    total, count = 0.0, 0
    for part in images.split(batch_size):
        batch = part.to(autoencoder.device).float() / 127.5 - 1.0
        decoded = autoencoder.decode(autoencoder.encode(batch, batch_size=batch_size), batch_size)
        error = (decoded.clamp(-1, 1) - batch) / 2.0
        total += float(error.square().sum(dtype=torch.float64))
        count += error.numel()
    return float(-10.0 * torch.tensor(max(total / count, 1e-12)).log10())
