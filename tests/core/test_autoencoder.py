"""The autoencoder wrapper on a tiny random network."""

from __future__ import annotations

import pytest
import torch

from cap4d_core.diffusion.autoencoder import Autoencoder
from tests.core.mmdm_models import TINY

ATOL = 1e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(TINY.autoencoder).eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_types(autoencoder: Autoencoder, images: torch.Tensor) -> None:
    latents = autoencoder.encode(images)
    assert latents.shape == (3, 4, 8, 12) and latents.dtype == torch.float32
    assert autoencoder.decode(latents).shape == images.shape


def test_batch_size_does_not_change_results(autoencoder: Autoencoder, images: torch.Tensor) -> None:
    latents = autoencoder.encode(images, batch_size=1)
    torch.testing.assert_close(autoencoder.encode(images, batch_size=3), latents, atol=ATOL, rtol=0)
    torch.testing.assert_close(
        autoencoder.decode(latents, batch_size=2),
        autoencoder.decode(latents, batch_size=1),
        atol=ATOL,
        rtol=0,
    )


def test_posterior_draws(autoencoder: Autoencoder, images: torch.Tensor) -> None:
    mean, std = autoencoder.posterior(images)
    scale = autoencoder.config.scaling_factor
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    drawn = autoencoder.encode(images, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, autoencoder.encode(images, noise))
    torch.testing.assert_close(drawn, scale * (mean + std * noise))
    torch.testing.assert_close(autoencoder.encode(images), scale * mean)


def test_log_variance_is_clamped(autoencoder: Autoencoder) -> None:
    moments = torch.tensor([-100.0, 0.0, 100.0]).repeat(8, 1)[None, :, :, None]
    _, std = autoencoder.posterior_of_moments(moments)
    expected = torch.exp(torch.tensor([-15.0, 0.0, 10.0]))
    torch.testing.assert_close(std[0, 0, :, 0], expected)


def test_half_precision_returns_float32(autoencoder: Autoencoder, images: torch.Tensor) -> None:
    half = Autoencoder(TINY.autoencoder).eval().requires_grad_(False)
    half.load_state_dict(autoencoder.state_dict())
    half.to(torch.bfloat16)
    latents = half.encode(images)
    assert latents.dtype == torch.float32
    # bfloat16 keeps 8 bits; a dozen layers.
    exact = autoencoder.encode(images)
    assert float((latents - exact).std() / exact.std()) < 0.1


def test_tiled_decoding_resembles_whole_decoding(autoencoder: Autoencoder) -> None:
    """Tiles blend over their overlap; only borders of tiles see other neighbours."""
    latents = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(2)) * 0.1
    autoencoder.vae.tile_latent_min_size = 24
    autoencoder.vae.tile_sample_min_size = 48
    whole = autoencoder.decode(latents)
    tiled = autoencoder.decode(latents, tiled=True)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert float((tiled - whole).abs().mean() / whole.abs().mean()) < 0.2
    torch.testing.assert_close(autoencoder.decode(latents), whole)  # the switch does not stick


def test_sizes_that_do_not_fit_are_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="images must be"):
        autoencoder.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="noise must be"):
        autoencoder.encode(torch.zeros(1, 3, 16, 16), noise=torch.zeros(1, 4, 4, 4))
