"""What training starts from: weights in the layout of Stable Diffusion 2.1, our own, nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.model_config import AutoencoderConfig, MMDMConfig
from cap4d_core.diffusion.released_layout import TABLE_NAMES, random_released_state_dict
from cap4d_core.diffusion.training.start_weights import (
    given_autoencoder,
    read_source,
    read_start,
    start_denoiser,
)
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import write_safetensors
from cap4d_core.training_settings import TrainingDataSettings, TrainingSettings
from tests.core.mmdm_models import triangle_tables

DATA = TrainingDataSettings(demo_subjects=2)
# Widths, heads and groups of a small Stable Diffusion 2.1.
UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.25,
}


@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet/, vae/ and scheduler/ as diffusers writes them; text changes nothing in this U-Net."""
    folder = tmp_path_factory.mktemp("sd21")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(**UNET)
        vae: Any = AutoencoderKL(**VAE)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if ".attn2.to_out." in name:
                    parameter.zero_()
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "epsilon"}))
    return folder


def settings_from(folder: Path, **model: object) -> TrainingSettings:
    return TrainingSettings(data=DATA, start=str(folder), model={"latent_size": 16, **model})


def one_view(config: MMDMConfig, latents: Tensor) -> FrameConditioning:
    """Random maps, nothing given."""
    height, width = latents.shape[-2:]
    maps = torch.randn(*latents.shape[:2], height, width, config.condition_channels)
    return FrameConditioning(maps, torch.zeros_like(latents), torch.zeros_like(latents[:, :, :1]))


def test_the_network_begins_as_the_one_it_came_from(
    diffusion_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With one view and no effect of text the noise is Stable Diffusion's, whatever the maps."""
    caplog.set_level(logging.INFO)
    start = read_start(settings_from(diffusion_folder))
    denoiser = start_denoiser(start, seed=0).eval()
    unet = UNet2DConditionModel.from_pretrained(diffusion_folder / "unet").eval()
    latents, times = torch.randn(2, 1, 4, 16, 16), torch.tensor([[3], [700]])
    with torch.no_grad():
        made = denoiser(latents, times, one_view(start.config, latents))
        wanted = unet(latents[:, 0], times[:, 0], torch.randn(2, 5, 12)).sample
    torch.testing.assert_close(made[:, 0], wanted, rtol=1e-4, atol=1e-5)
    assert float(wanted.std()) > 0.01
    text = caplog.text
    assert "cond_linear.weight, cond_linear.bias start at zero" in text
    assert "of text attention left out" in text and "start at random" not in text


def test_the_autoencoder_is_the_given_one(diffusion_folder: Path) -> None:
    start = read_start(settings_from(diffusion_folder))
    ours = given_autoencoder(start)
    theirs = AutoencoderKL.from_pretrained(diffusion_folder / "vae").eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mean
        decoded = theirs.decode(latents).sample
    torch.testing.assert_close(ours.encode(images), 0.25 * latents, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.decode(0.25 * latents), decoded, rtol=1e-4, atol=1e-5)


def test_sizes_come_from_the_weights_and_the_schedule_from_the_size(diffusion_folder: Path) -> None:
    config = read_start(settings_from(diffusion_folder, views_per_call=4)).config
    assert (config.model_channels, config.channel_mult) == (16, (1, 2))
    assert (config.head_channels, config.attention_levels) == (8, (0,))
    assert (config.schedule.image_size, config.schedule.num_frames) == (16, 4)


def test_other_parameterisations_are_named(
    diffusion_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("unet", "vae"):
        (tmp_path / part).symlink_to(diffusion_folder / part)
    (tmp_path / "scheduler").mkdir()
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    read_source(tmp_path)
    assert "predicts 'v_prediction'" in caplog.text


def test_other_networks_are_refused(diffusion_folder: Path, tmp_path: Path) -> None:
    config = json.loads((diffusion_folder / "unet" / "config.json").read_text())
    (tmp_path / "unet").mkdir()
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "unet" / weights).symlink_to(diffusion_folder / "unet" / weights)
    # Stable Diffusion 1: eight heads at every level, convolutions around attention.
    changed = config | {"attention_head_dim": 2, "use_linear_projection": False}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"attention_head_dim.*one size at all levels"):
        read_source(tmp_path)
    with pytest.raises(InputFileError, match=r"training\.start"):
        read_source(tmp_path / "absent")


def test_one_file_in_the_original_layout(tmp_path: Path) -> None:
    """As published, without the layer of the conditioning maps."""
    config = MMDMConfig(
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        head_channels=64,
        latent_size=16,
        autoencoder=AutoencoderConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1),
    )
    state = {
        key: tensor.clone()
        for key, tensor in random_released_state_dict(config, triangle_tables()).items()
        if key not in TABLE_NAMES and "cond_linear" not in key
    }
    write_safetensors(tmp_path / "v2-1.safetensors", state)
    start = read_start(settings_from(tmp_path / "v2-1.safetensors"))
    denoiser = start_denoiser(start, seed=0)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(denoiser.conv_in.weight, state[key])
    assert not denoiser.cond_linear.weight.any()
    given_autoencoder(start)


def test_damaged_weights_are_refused(diffusion_folder: Path) -> None:
    start = read_start(settings_from(diffusion_folder))
    assert start.denoiser is not None and start.denoiser.denoiser is not None
    start.denoiser.denoiser["conv_in.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        start_denoiser(start, seed=0)
