"""A diffusion model with random weights that makes 32 x 32 images, in the released layout."""

from __future__ import annotations

from pathlib import Path

import yaml

from cap4d_core.diffusion.denoiser import AutoencoderConfig, MMDMConfig
from cap4d_core.diffusion.released_layout import (
    random_released_state_dict,
    write_released_checkpoint,
)
from cap4d_core.diffusion.renderer_tables import TABLE_NAMES
from tests.core.mmdm_models import triangle_tables

CONFIG = MMDMConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    head_channels=16,
    views_per_call=4,
    latent_size=16,
    autoencoder=AutoencoderConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1),
)


def write_tiny_checkpoint(folder: Path) -> Path:
    """Writes the checkpoint without renderer tables: those of the head model are taken."""
    state = random_released_state_dict(CONFIG, triangle_tables())
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in state.items() if key not in TABLE_NAMES}
    write_released_checkpoint(folder / "tiny.ckpt", kept)
    network = {
        "model_channels": CONFIG.model_channels,
        "num_head_channels": CONFIG.head_channels,
        "time_steps": CONFIG.views_per_call,
        "image_size": CONFIG.latent_size,
    }
    (folder / "config_dump.yaml").write_text(yaml.safe_dump({"network": network}))
    return folder
