"""Reading a model's weights, lazily, from either format: the released checkpoint or our folder.

Both are memory-mapped: tensors occupy memory only once they are touched.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.released_config import (
    config_from_shapes,
    merge_config,
    read_released_config,
)
from cap4d_core.diffusion.released_layout import (
    TABLE_NAMES,
    UNUSED_NAMES,
    autoencoder_key_map,
    convert_to_ours,
    denoiser_key_map,
    is_pointwise_convolution,
)
from cap4d_core.diffusion.renderer_tables import check_tables
from cap4d_core.errors import ConfigError, InputFileError, UserError
from cap4d_core.files.basic import read_json, require_file

FORMAT_VERSION = 1
RELEASED_CONFIG = "config_dump.yaml"
CHECKPOINT = "an MMDM checkpoint (.ckpt, a torch file holding a dict of tensors)"
FOLDER = "a model folder written by prepare_mmdm"


@dataclass(frozen=True)
class ModelWeights:
    """Config and tensors of a model, in our names.

    Attributes:
        config: sizes and settings.
        denoiser: state dict of `MMDMDenoiser`.
        autoencoder: state dict of diffusers' `AutoencoderKL`.
        tables: constant tables of the conditioning renderer (freqs, faces, faces_uvs, face_mask,
            props), or None when the file has none.
        config_source: where the config comes from, in words.
        provenance: of a prepared folder; empty for a checkpoint.
    """

    config: MMDMConfig
    denoiser: dict[str, Tensor]
    autoencoder: dict[str, Tensor]
    tables: dict[str, Tensor] | None
    config_source: str
    provenance: dict[str, Any]


def is_prepared_folder(path: str | Path) -> bool:
    """Whether `path` looks like a folder written by `prepare_mmdm`."""
    return (Path(path) / "config.json").is_file()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or the only .ckpt in it or its `checkpoints/`.

    Raises:
        InputFileError: nothing there, or several.
    """
    path = Path(path)
    if not path.is_dir():
        return require_file(path, CHECKPOINT)
    found = sorted([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")])
    if not found:
        raise InputFileError(path, "a folder without .ckpt", f"{CHECKPOINT} or {FOLDER}")
    if len(found) > 1:
        names = ", ".join(str(f.relative_to(path)) for f in found)
        raise InputFileError(path, f"several checkpoints ({names})", "one", "Give its path.")
    return found[0]


def weight_files(path: str | Path) -> list[Path]:
    """What decides the model that `path` means: the checkpoint and its config, or a whole folder.

    Raises:
        InputFileError: as `find_checkpoint`.
    """
    if is_prepared_folder(path):
        return [Path(path)]
    checkpoint = find_checkpoint(path)
    configs = [folder / RELEASED_CONFIG for folder in checkpoint.parents[:2]]
    return [checkpoint, *[config for config in configs if config.is_file()][:1]]


def read_released_state(path: Path) -> dict[str, Tensor]:
    """The flat state dict of a released checkpoint, memory-mapped; runs no code from the file.

    Raises:
        InputFileError: not a torch file, truncated, holding anything but tensors.
    """
    require_file(path, CHECKPOINT)
    with open(path, "rb") as handle:
        start = handle.read(64).lstrip()
    if start.startswith(b"<"):
        raise InputFileError(path, "a web page", CHECKPOINT, "The download failed; repeat it.")
    if start.startswith(b"version https://git-lfs"):
        raise InputFileError(path, "a Git LFS pointer", CHECKPOINT, "Fetch the file itself.")
    try:
        # The format before torch 1.6 is no zip archive: no checksums, and it cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputFileError(
            path,
            f"Python objects besides tensors, or no torch file ({first_line})",
            CHECKPOINT,
            "Such a file can run code when opened, so it is refused.",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputFileError(
            path,
            f"an unreadable file of {path.stat().st_size} bytes ({first_line})",
            CHECKPOINT,
            "It may be truncated; compare its size and SHA-256 with the source and download again.",
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # saved by a training framework
    if not isinstance(content, Mapping):
        raise InputFileError(path, f"a {type(content).__name__}", CHECKPOINT)
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = f"entries that are no tensors ({', '.join(others)})" if others else "an empty dict"
        raise InputFileError(path, found, CHECKPOINT)
    return {str(key): value for key, value in content.items()}


def _check_sums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        hint = "Download it again."
        raise InputFileError(path, f"damaged content ({damaged})", CHECKPOINT, hint)


def read_released(path: Path, config: MMDMConfig | str | Path | None = None) -> ModelWeights:
    """Reads a checkpoint in the released layout.

    Args:
        path: the .ckpt file.
        config: the model's config: a YAML in the released layout, a JSON in ours, or the object.
            Default: `config_dump.yaml` beside the checkpoint or its folder; else the tensor shapes
            and, for what they do not tell, the released model's settings.

    Raises:
        UserError: unreadable file, contradicting config, missing, unexpected or misshapen tensors
            (all listed).
    """
    state = read_released_state(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    measured = config_from_shapes(shapes, str(path))
    stated, source = _stated_config(path, config)
    try:
        merged = merge_config(stated, measured, source)
    except ConfigError as error:
        advice = "Give the model's own config (its config_dump.yaml) if these settings are not its."
        raise ConfigError(error.source, [*error.problems, advice]) from None

    denoiser_keys = denoiser_key_map(merged)
    autoencoder_keys = autoencoder_key_map(merged.autoencoder)
    expected: dict[str, tuple[int, ...] | None] = {}
    with torch.device("meta"):
        denoiser, autoencoder = MMDMDenoiser(merged), Autoencoder(merged.autoencoder).vae
    for keys, module in ((denoiser_keys, denoiser), (autoencoder_keys, autoencoder)):
        ours = module.state_dict()
        expected |= {key: _released_shape(key, ours[name].shape) for key, name in keys.items()}
    # All tables or none; their sizes belong to the head model.
    has_tables = any(key in state for key in TABLE_NAMES)
    if has_tables:
        expected |= dict.fromkeys(TABLE_NAMES)
    check_tensors(path, expected, {k: v for k, v in shapes.items() if k not in UNUSED_NAMES})
    tables = {name: state[key] for key, name in TABLE_NAMES.items()} if has_tables else None
    if tables is not None:
        check_tables(path, tables)
    return ModelWeights(
        config=merged,
        denoiser=convert_to_ours(state, denoiser_keys),
        autoencoder=convert_to_ours(state, autoencoder_keys),
        tables=tables,
        config_source=source,
        provenance={},
    )


def read_prepared(folder: Path) -> ModelWeights:
    """Reads a folder written by `prepare_mmdm`.

    Raises:
        UserError: a file is missing or unreadable, of another format version, or does not fit the
            config.
    """
    config_file = folder / "config.json"
    content = read_json(config_file, FOLDER)
    version = content.get("format_version") if isinstance(content, Mapping) else None
    if version != FORMAT_VERSION:
        raise InputFileError(
            config_file,
            f"format version {version}",
            f"version {FORMAT_VERSION}",
            "Delete the folder and run prepare_mmdm again.",
        )
    config = MMDMConfig.from_dict(content["model"], str(config_file))
    with torch.device("meta"):
        denoiser, autoencoder = MMDMDenoiser(config), Autoencoder(config.autoencoder).vae
    parts = []
    for name, module in (("denoiser", denoiser), ("autoencoder", autoencoder)):
        file = folder / f"{name}.safetensors"
        tensors = _read_lazily(file)
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        check_tensors(file, expected, {key: tuple(t.shape) for key, t in tensors.items()})
        parts.append(tensors)
    tables_file = folder / "conditioning.safetensors"
    tables = _read_lazily(tables_file) if tables_file.exists() else None
    if tables is not None:
        check_tables(tables_file, tables)
    provenance = read_json(folder / "provenance.json", FOLDER)
    return ModelWeights(config, parts[0], parts[1], tables, str(config_file), provenance)


def check_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...] | None],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Demands exactly the expected names, in the expected shapes (None: any).

    Raises:
        UserError: lists all missing, unexpected and misshapen tensors.
    """
    problems = [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected]
    for key, shape in expected.items():
        if shape is not None and key in found and found[key] != shape:
            problems.append(f"shape: {key} is {found[key]}, expected {shape}")
    if problems:
        count = f"{len(problems)} tensors do not fit the model's config"
        raise UserError("\n  ".join([f"{path}: {count}:", *problems]))


def _stated_config(
    path: Path, config: MMDMConfig | str | Path | None
) -> tuple[dict[str, Any], str]:
    if isinstance(config, MMDMConfig):
        return config.to_dict(), "the given config"
    if config is not None:
        config = Path(config)
        if config.suffix == ".json":
            content = read_json(config, "a model config")
            parsed = MMDMConfig.from_dict(content.get("model", content), str(config))
            return parsed.to_dict(), str(config)
        return read_released_config(config), str(config)
    for folder in (path.parent, path.parent.parent):
        beside = folder / RELEASED_CONFIG
        if beside.is_file():
            return read_released_config(beside), str(beside)
    return {}, f"the tensor shapes of {path.name} with the released model's settings"


def _released_shape(key: str, shape: torch.Size) -> tuple[int, ...]:
    return (*shape, 1, 1) if is_pointwise_convolution(key) else tuple(shape)


def _read_lazily(path: Path) -> dict[str, Tensor]:
    require_file(path, FOLDER, "Run prepare_mmdm again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        hint = "Delete the folder and run prepare_mmdm again."
        raise InputFileError(path, f"unreadable content ({error})", FOLDER, hint) from None
