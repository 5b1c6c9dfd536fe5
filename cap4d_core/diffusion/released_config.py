"""The model config of a released checkpoint: read from its YAML, or worked out from tensor shapes.

Shapes give every size except the channels of one attention head, the number of views per call, the
latent size and the schedule; those come from the YAML beside the checkpoint, else they are the
released model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.released_layout import AUTOENCODER_PREFIX, DENOISER_PREFIX
from cap4d_core.errors import ConfigError, InputFileError
from cap4d_core.files.basic import require_file

Shapes = Mapping[str, Sequence[int]]

# released key -> our key, in each part of the YAML
_NETWORK = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "num_head_channels": "head_channels",
    "transformer_depth": "transformer_depth",
    "condition_channels": "condition_channels",
    "time_steps": "views_per_call",
    "image_size": "latent_size",
}
_SCHEDULE = {
    "timesteps": "num_train_timesteps",
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "zero_snr_shift": "zero_snr",
    "shift_schedule": "shift_snr",
    "n_frames": "num_frames",
    "minus_one_shift": "minus_one_shift",
    "sqrt_shift": "sqrt_shift",
    "negative_shift": "negative_shift",
}
_AUTOENCODER = {
    "in_channels": "image_channels",
    "z_channels": "latent_channels",
    "ch": "base_channels",
    "ch_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
}
_CONDITIONING = {
    "positional_channels": "positional_channels",
    "positional_multiplier": "positional_multiplier",
    "super_resolution": "super_resolution",
    "std_expr_deformation": "std_expr_deformation",
}
# Settings of the released program that have one supported value.
_FIXED_NETWORK = {
    "temporal_mode": "3d",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "dims": 2,
    "resblock_updown": False,
    "use_scale_shift_norm": False,
}


def _mappings(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        for child in node.values():
            yield from _mappings(child)
    elif isinstance(node, list):
        for child in node:
            yield from _mappings(child)


def _translate(node: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: node[theirs] for theirs, ours in names.items() if theirs in node}


def config_from_released(
    content: Mapping[str, Any], source: str = "the released config"
) -> dict[str, Any]:
    """Settings that a config in the released layout states, as a partial `MMDMConfig` dictionary.

    The parts are recognised by their keys (`model_channels`, `ch_mult`, ...) at any depth, so the
    whole YAML or only the denoiser's arguments may be given.

    Raises:
        ConfigError: a network variant that this package does not build.
    """
    result: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    conditioning: dict[str, Any] = {}
    problems: list[str] = []
    for node in _mappings(content):
        if "model_channels" in node:
            result |= _translate(node, _NETWORK)
            if "attention_resolutions" in node and "channel_mult" in node:
                factors = {2**level: level for level in range(len(node["channel_mult"]))}
                result["attention_levels"] = sorted(
                    factors[f] for f in node["attention_resolutions"] if f in factors
                )
            for key, value in _FIXED_NETWORK.items():
                if node.get(key, value) != value:
                    problems.append(f"{key}: {node[key]!r}; only {value!r} is supported")
        elif "ch_mult" in node:
            autoencoder = result.setdefault("autoencoder", {})
            autoencoder |= _translate(node, _AUTOENCODER)
            if node.get("attn_resolutions"):
                problems.append("attn_resolutions of the autoencoder: only [] is supported")
        else:
            if "scale_factor" in node:
                result.setdefault("autoencoder", {})["scaling_factor"] = node["scale_factor"]
            found = _translate(node, _SCHEDULE)
            if found and "image_size" in node:
                found["image_size"] = node["image_size"]
            schedule |= found
            conditioning |= _translate(node, _CONDITIONING)
    if schedule:
        result["schedule"] = schedule
    if conditioning:
        result["conditioning"] = conditioning
    if problems:
        raise ConfigError(source, problems)
    return result


def read_released_config(path: str | Path) -> dict[str, Any]:
    """Reads `config_dump.yaml` of the released layout; see `config_from_released`.

    Raises:
        InputFileError: missing or not YAML. ConfigError: unsupported variant.
    """
    what = "a model config in the released layout (config_dump.yaml)"
    path = require_file(path, what)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputFileError(path, f"no readable YAML ({error})", what) from None
    if not isinstance(content, Mapping):
        raise InputFileError(path, f"a YAML {type(content).__name__}", what)
    return config_from_released(content, str(path))


def config_from_shapes(shapes: Shapes, source: str) -> dict[str, Any]:
    """What tensor shapes of a released state dict say, as a partial `MMDMConfig` dictionary.

    Raises:
        InputFileError: tensors that every such model has are absent.
    """
    try:
        return _denoiser_sizes(shapes) | {"autoencoder": _autoencoder_sizes(shapes)}
    except (KeyError, IndexError) as error:
        raise InputFileError(
            source,
            f"no tensor {error.args[0]!r}",
            "a state dict with 'model.diffusion_model.*' and 'first_stage_model.*' tensors",
            "Is it the released MMDM checkpoint?",
        ) from None


def _denoiser_sizes(shapes: Shapes) -> dict[str, Any]:
    def shape(name: str) -> Sequence[int]:
        return shapes[DENOISER_PREFIX + name]

    def names(prefix: str) -> list[str]:
        start = DENOISER_PREFIX + prefix
        return [key for key in shapes if key.startswith(start)]

    width = shape("input_blocks.0.0.weight")[0]
    levels: list[list[int]] = [[]]  # output channels of the resnets of each level
    attention_levels: set[int] = set()
    index = 1
    while names(f"input_blocks.{index}."):
        if names(f"input_blocks.{index}.0.op."):
            levels.append([])
        else:
            levels[-1].append(shape(f"input_blocks.{index}.0.in_layers.2.weight")[0])
            if names(f"input_blocks.{index}.1."):
                attention_levels.add(len(levels) - 1)
        index += 1
    depths = [
        int(m[1]) + 1
        for key in names("middle_block.1.")
        if (m := re.search(r"transformer_blocks\.(\d+)\.", key))
    ]
    return {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "model_channels": width,
        "channel_mult": [level[0] // width for level in levels],
        "num_res_blocks": len(levels[0]),
        "attention_levels": sorted(attention_levels),
        "transformer_depth": max(depths, default=1),
        "condition_channels": shape("cond_linear.weight")[1],
    }


def _autoencoder_sizes(shapes: Shapes) -> dict[str, Any]:
    def shape(name: str) -> Sequence[int]:
        return shapes[AUTOENCODER_PREFIX + name]

    def count(pattern: str) -> int:
        found = (re.match(re.escape(AUTOENCODER_PREFIX) + pattern, key) for key in shapes)
        return max((int(m[1]) + 1 for m in found if m), default=0)

    width = shape("encoder.conv_in.weight")[0]
    num_levels = count(r"encoder\.down\.(\d+)\.")
    return {
        "image_channels": shape("encoder.conv_in.weight")[1],
        "latent_channels": shape("post_quant_conv.weight")[0],
        "base_channels": width,
        "channel_mult": [
            shape(f"encoder.down.{i}.block.0.conv1.weight")[0] // width for i in range(num_levels)
        ],
        "num_res_blocks": count(r"encoder\.down\.0\.block\.(\d+)\."),
    }


def merge_config(stated: Mapping[str, Any], measured: Mapping[str, Any], source: str) -> MMDMConfig:
    """Config from the YAML's statements and the file's shapes.

    Raises:
        ConfigError: they contradict each other, or the sizes are impossible; all listed.
    """
    problems: list[str] = []
    content = _merged(stated, measured, "", problems)
    if problems:
        raise ConfigError(source, problems)
    # The latent size of the schedule is that of the network unless said otherwise.
    if "latent_size" in content:
        content["schedule"] = {"image_size": content["latent_size"]} | content.get("schedule", {})
    return MMDMConfig.from_dict(content, source)


def _merged(
    stated: Mapping[str, Any], measured: Mapping[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    result = dict(stated)
    for key, value in measured.items():
        if isinstance(value, Mapping):
            result[key] = _merged(stated.get(key, {}), value, f"{where}{key}.", problems)
            continue
        said = stated.get(key, value)
        if (list(said) if isinstance(value, list) else said) != value:
            problems.append(f"{where}{key}: the config says {said}, the weights have {value}")
        result[key] = value
    return result
