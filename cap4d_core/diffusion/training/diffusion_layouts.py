"""Reads weights of Stable Diffusion 2.1, to start from: folders of diffusers, or one original file.

Folders hold unet/ (UNet2DConditionModel) and vae/ (AutoencoderKL), or one of them directly. The
denoiser here has diffusers' names, so nothing is renamed but the attention of older autoencoders.
Files hold `model.diffusion_model.*` and `first_stage_model.*` in the names of the original code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cap4d_core.diffusion.model_weights import read_released_state
from cap4d_core.diffusion.released_config import config_from_shapes, merge_config
from cap4d_core.diffusion.released_layout import (
    DENOISER_PREFIX,
    autoencoder_key_map,
    denoiser_key_map,
    is_pointwise_convolution,
)
from cap4d_core.errors import ConfigError, InputFileError
from cap4d_core.files.basic import read_json

COND_WEIGHT = f"{DENOISER_PREFIX}cond_linear.weight"
_FILES = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".non_ema")
# What the blocks here are built with; other values of these keys are other networks.
_FIXED_UNET = {
    "use_linear_projection": (True,),
    "act_fn": ("silu",),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "resnet_time_scale_shift": ("default",),
    "dual_cross_attention": (False, None),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "time_embedding_type": ("positional", None),
}
_FIXED_VAE = {
    "act_fn": ("silu",),
    "use_quant_conv": (True, None),
    "use_post_quant_conv": (True, None),
    "mid_block_add_attention": (True, None),
    "shift_factor": (None, 0.0),
}
# diffusers renamed the layers of the autoencoder's attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ForeignWeights:
    """Sizes as a partial `MMDMConfig` dictionary, and tensors in our names.

    denoiser and autoencoder are None where the source has none. notes: to be logged.
    """

    sizes: dict[str, Any]
    denoiser: dict[str, Tensor] | None
    autoencoder: dict[str, Tensor] | None
    notes: list[str] = field(default_factory=list)


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether `path` is a folder of diffusers."""
    path = Path(path)
    if any((path / part / "config.json").is_file() for part in ("unet", "vae")):
        return True
    config = path / "config.json"
    if not config.is_file():
        return False
    content = read_json(config)
    return isinstance(content, Mapping) and "_class_name" in content


def read_diffusers_folder(path: str | Path) -> ForeignWeights:
    """Reads what a folder of diffusers has of a U-Net and an autoencoder.

    Raises:
        UserError: unreadable files, or a network that is not built like Stable Diffusion 2.1's.
    """
    path = Path(path)
    sizes: dict[str, Any] = {}
    found: dict[str, dict[str, Tensor]] = {}
    notes: list[str] = []
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        folder = path / part
        if not (folder / "config.json").is_file():
            if not (path / "config.json").is_file():
                continue
            folder = path
        config = read_json(folder / "config.json", "a network's config.json")
        if config.get("_class_name") != kind:
            continue
        tensors = _read_tensors(folder)
        if part == "unet":
            sizes |= unet_sizes(config, str(folder / "config.json"))
        else:
            sizes["autoencoder"] = vae_sizes(config, str(folder / "config.json"))
            tensors = {_vae_name(name): _as_linear(name, t) for name, t in tensors.items()}
        found[part] = tensors
    if not found:
        raise InputFileError(
            path, "no U-Net and no autoencoder", "unet/ and vae/ as diffusers writes them"
        )
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        predicted = read_json(scheduler).get("prediction_type", "epsilon")
        if predicted != "epsilon":
            notes.append(
                f"{path} predicts '{predicted}', the network here noise ('epsilon'): the loss "
                "starts higher and the output layer is learned anew."
            )
    return ForeignWeights(sizes, found.get("unet"), found.get("vae"), notes)


def read_original_file(path: str | Path) -> ForeignWeights:
    """Reads a single file in the original layout (.safetensors, or .ckpt with tensors only).

    Raises:
        UserError: unreadable, or not built like Stable Diffusion 2.1.
    """
    path = Path(path)
    state = _safetensors(path) if path.suffix == ".safetensors" else read_released_state(path)
    first = f"{DENOISER_PREFIX}input_blocks.0.0.weight"
    if first not in state:
        raise InputFileError(
            path, f"no tensor '{first}'", "Stable Diffusion 2.1 or a released MMDM checkpoint"
        )
    inner = state.get(f"{DENOISER_PREFIX}input_blocks.1.1.proj_in.weight")
    if inner is not None and inner.ndim == 4:
        raise InputFileError(
            path,
            "convolutions around attention, as in Stable Diffusion 1",
            "the layout of Stable Diffusion 2.1",
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    # Absent in Stable Diffusion, where there is no conditioning by maps.
    shapes.setdefault(COND_WEIGHT, (shapes[first][0], 50))
    config = merge_config({}, config_from_shapes(shapes, str(path)), str(path))
    autoencoder = {
        ours: state[key][..., 0, 0] if is_pointwise_convolution(key) else state[key]
        for key, ours in autoencoder_key_map(config.autoencoder).items()
        if key in state
    }
    denoiser = {ours: state[k] for k, ours in denoiser_key_map(config).items() if k in state}
    known = set(denoiser_key_map(config))
    denoiser |= {
        key.removeprefix(DENOISER_PREFIX): tensor
        for key, tensor in state.items()
        if key.startswith(DENOISER_PREFIX) and key not in known
    }
    return ForeignWeights(config.to_dict(), denoiser, autoencoder or None)


def unet_sizes(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Sizes of a UNet2DConditionModel as a partial `MMDMConfig` dictionary.

    Raises:
        ConfigError: a variant that the denoiser here is not built like, all differences listed.
    """
    problems = _differences(config, _FIXED_UNET)
    widths = list(config.get("block_out_channels", ()))
    kinds = list(config.get("down_block_types", ()))
    if not widths or len(kinds) != len(widths):
        raise ConfigError(source, [f"block_out_channels {widths}, down_block_types {kinds}"])
    for kind in kinds:
        if kind not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            problems.append(f"down_block_types: {kind} is not supported")
    if any(width % widths[0] for width in widths):
        problems.append(f"block_out_channels: {widths} are no multiples of the first")
    # Despite its name diffusers takes attention_head_dim as the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    sides = {width // count for width, count in zip(widths, heads, strict=False)}
    if len(sides) != 1 or len(heads) != len(widths):
        problems.append(
            f"attention_head_dim: {heads} heads give heads of {sorted(sides)} channels; one "
            "size at all levels is needed, as in Stable Diffusion 2 (version 1 has others)"
        )
    layers = config.get("layers_per_block", 2)
    depth = config.get("transformer_layers_per_block", 1)
    for name, value in (("layers_per_block", layers), ("transformer_layers_per_block", depth)):
        if not isinstance(value, int):
            problems.append(f"{name}: {value!r}; one number is needed")
    if problems:
        raise ConfigError(source, problems)
    return {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": layers,
        "attention_levels": [i for i, kind in enumerate(kinds) if kind.startswith("CrossAttn")],
        "head_channels": sides.pop(),
        "transformer_depth": depth,
        "norm_groups": config.get("norm_num_groups", 32),
    }


def vae_sizes(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Sizes of an AutoencoderKL as an `AutoencoderConfig` dictionary.

    Raises:
        ConfigError: another kind of autoencoder.
    """
    problems = _differences(config, _FIXED_VAE)
    widths = list(config.get("block_out_channels", ()))
    if not widths or any(width % widths[0] for width in widths):
        problems.append(f"block_out_channels: {widths} are no multiples of the first")
    kinds = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
    if set(kinds) - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        problems.append(f"block types {kinds} are not supported")
    if problems:
        raise ConfigError(source, problems)
    return {
        "image_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "base_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "norm_groups": config.get("norm_num_groups", 32),
        "scaling_factor": config.get("scaling_factor", 0.18215),
    }


def _differences(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{key}: {config[key]!r}; only {allowed[0]!r} is supported"
        for key, allowed in fixed.items()
        if config.get(key, allowed[0]) not in allowed
    ]


def _vae_name(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Pointwise convolutions in attention are linear layers here."""
    return tensor[..., 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    for suffix in (".safetensors", ".bin"):
        for stem in _FILES:
            for variant in _VARIANTS:
                file = folder / f"{stem}{variant}{suffix}"
                if file.is_file():
                    if suffix == ".safetensors":
                        return _safetensors(file)
                    return read_released_state(file)  # tensors only; runs no code
    raise InputFileError(
        folder, "no weights", "diffusion_pytorch_model.safetensors (or .bin, with tensors only)"
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputFileError(
            path, f"unreadable content ({error})", "a safetensors file", "Download it again."
        ) from None


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
