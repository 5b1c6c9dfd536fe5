"""Names of the released checkpoint, and state dicts in its layout.

The released file is one flat state dict:

- `model.diffusion_model.*`: the denoiser, in the names of the original latent-diffusion code;
- `first_stage_model.*`: the autoencoder, likewise;
- `cond_stage_model.*`: five constant tables of the conditioning renderer;
- `logvar`: zeros, unused.

Every parameter has exactly one counterpart here. The only change of shape: the 1x1 convolutions of
the autoencoder's attention are linear layers in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import AutoencoderConfig, MMDMConfig
from cap4d_core.files.basic import atomic_path

DENOISER_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
TABLES_PREFIX = "cond_stage_model."

# released name -> name in conditioning.safetensors and `MMDM.tables`
TABLE_NAMES = {
    f"{TABLES_PREFIX}pos_encoding.freqs": "freqs",
    f"{TABLES_PREFIX}renderer.faces": "faces",
    f"{TABLES_PREFIX}renderer.faces_uvs": "faces_uvs",
    f"{TABLES_PREFIX}renderer.face_mask": "face_mask",
    f"{TABLES_PREFIX}renderer.props": "props",
}
UNUSED_NAMES = frozenset({"logvar"})

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "conv_shortcut": "nin_shortcut",
}
_AUTOENCODER_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def denoiser_module_names(config: MMDMConfig) -> dict[str, str]:
    """Our module -> released module (no prefix), blocks as well as the layers inside resnets."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "cond_linear": "cond_linear",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    for level in range(levels):
        # Encoder: conv_in is input block 0; a level has its resnets and then a down-sampler.
        for j in range(blocks):
            released = f"input_blocks.{1 + level * (blocks + 1) + j}"
            names[f"down_blocks.{level}.resnets.{j}"] = f"{released}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"{released}.1"
        down = 1 + level * (blocks + 1) + blocks
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down}.0.op"
        # Decoder: coarsest level first; the up-sampler follows the last attention, if there is one.
        up = levels - 1 - level
        for j in range(blocks + 1):
            released = f"output_blocks.{up * (blocks + 1) + j}"
            names[f"up_blocks.{up}.resnets.{j}"] = f"{released}.0"
            names[f"up_blocks.{up}.attentions.{j}"] = f"{released}.1"
        index = 2 if level in config.attention_levels else 1
        last = f"output_blocks.{up * (blocks + 1) + blocks}"
        names[f"up_blocks.{up}.upsamplers.0.conv"] = f"{last}.{index}.conv"
    for ours, theirs in list(names.items()):
        if ".resnets." in ours:
            names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _RESNET.items()}
    return names


def autoencoder_module_names(config: AutoencoderConfig) -> dict[str, str]:
    """Our module -> released module (no prefix)."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.channel_mult)
    resnets: dict[str, str] = {}
    for part in ("encoder", "decoder"):
        names |= {
            f"{part}.conv_in": f"{part}.conv_in",
            f"{part}.conv_norm_out": f"{part}.norm_out",
            f"{part}.conv_out": f"{part}.conv_out",
        }
        resnets[f"{part}.mid_block.resnets.0"] = f"{part}.mid.block_1"
        resnets[f"{part}.mid_block.resnets.1"] = f"{part}.mid.block_2"
        for a, b in _AUTOENCODER_ATTENTION.items():
            names[f"{part}.mid_block.attentions.0.{a}"] = f"{part}.mid.attn_1.{b}"
    for i in range(levels):
        mirrored = levels - 1 - i  # the released decoder counts levels from the finest
        for j in range(config.num_res_blocks):
            resnets[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(config.num_res_blocks + 1):
            resnets[f"decoder.up_blocks.{mirrored}.resnets.{j}"] = f"decoder.up.{i}.block.{j}"
        down = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        names[down] = f"encoder.down.{i}.downsample.conv"
        up = f"decoder.up_blocks.{mirrored}.upsamplers.0.conv"
        names[up] = f"decoder.up.{i}.upsample.conv"
    for ours, theirs in resnets.items():
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _AUTOENCODER_RESNET.items()}
    return names


def _key_map(module: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Released key -> our key for all tensors of `module`, by the longest named parent module."""
    keys: dict[str, str] = {}
    for ours in module.state_dict():
        parent, rest = ours.rsplit(".", 1)
        while parent not in names:
            parent, middle = parent.rsplit(".", 1)
            rest = f"{middle}.{rest}"
        keys[f"{prefix}{names[parent]}.{rest}"] = ours
    return keys


def denoiser_key_map(config: MMDMConfig) -> dict[str, str]:
    """Released key (with prefix) -> key of `MMDMDenoiser.state_dict()`."""
    with torch.device("meta"):
        module = MMDMDenoiser(config)
    return _key_map(module, denoiser_module_names(config), DENOISER_PREFIX)


def autoencoder_key_map(config: AutoencoderConfig) -> dict[str, str]:
    """Released key (with prefix) -> key of `Autoencoder.vae.state_dict()`."""
    with torch.device("meta"):
        module = Autoencoder(config).vae
    return _key_map(module, autoencoder_module_names(config), AUTOENCODER_PREFIX)


def is_pointwise_convolution(released_key: str) -> bool:
    """Whether the released tensor is a 1x1 convolution whose counterpart is a linear layer."""
    parts = released_key.split(".")
    return (
        released_key.startswith(AUTOENCODER_PREFIX)
        and "attn_1" in parts
        and parts[-2] != "norm"
        and parts[-1] == "weight"
    )


def convert_to_ours(
    released: Mapping[str, Tensor], key_map: Mapping[str, str]
) -> dict[str, Tensor]:
    """Renames (and reshapes, for pointwise convolutions) the tensors named in `key_map`.

    Raises:
        KeyError: a tensor is missing.
    """
    result = {}
    for key, ours in key_map.items():
        tensor = released[key]
        result[ours] = tensor[..., 0, 0] if is_pointwise_convolution(key) else tensor
    return result


def export_released_state_dict(
    denoiser: MMDMDenoiser, autoencoder: Autoencoder, tables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A flat state dict in the released layout, float32; shares memory where types allow.

    Args:
        denoiser: weights for `model.diffusion_model`.
        autoencoder: weights for `first_stage_model`.
        tables: the five tables of `TABLE_NAMES` by our names.
    """
    config = denoiser.config
    result = {"logvar": torch.zeros(config.schedule.num_train_timesteps)}
    ours = denoiser.state_dict()
    for released, key in denoiser_key_map(config).items():
        result[released] = ours[key].float()
    ours = autoencoder.vae.state_dict()
    for released, key in autoencoder_key_map(autoencoder.config).items():
        tensor = ours[key].float()
        result[released] = tensor[..., None, None] if is_pointwise_convolution(released) else tensor
    for released, name in TABLE_NAMES.items():
        result[released] = tables[name]
    return result


def random_released_state_dict(
    config: MMDMConfig, tables: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """A state dict in the released layout with freshly initialised weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser, autoencoder = MMDMDenoiser(config), Autoencoder(config.autoencoder)
    return export_released_state_dict(denoiser.eval(), autoencoder.eval(), tables)


def write_released_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a state dict as the original program reads it (a torch file), atomically."""
    with atomic_path(path) as temporary:
        torch.save({key: tensor.detach().cpu() for key, tensor in state.items()}, temporary)
