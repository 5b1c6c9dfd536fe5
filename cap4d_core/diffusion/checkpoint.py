"""Importing and loading multi-view diffusion models.

`prepare_mmdm` turns a released checkpoint into a folder that loads fast and safely:

    denoiser.safetensors      weights in diffusers' names, float32 or bfloat16
    autoencoder.safetensors   weights of AutoencoderKL, float32
    conditioning.safetensors  constant tables of the conditioning renderer
    config.json               `MMDMConfig`
    provenance.json           source file, its hash, versions; written last
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import cap4d_core
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.model_weights import (
    FORMAT_VERSION,
    ModelWeights,
    find_checkpoint,
    is_prepared_folder,
    read_prepared,
    read_released,
)
from cap4d_core.diffusion.renderer_tables import check_tables, choose_tables, typed_tables
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import sha256_file, write_json
from cap4d_core.files.safetensors_stream import write_safetensors_stream
from cap4d_core.progress import Progress, ProgressCallback

logger = logging.getLogger(__name__)

# Threads that read weights.
_READERS = 4

StoredType = Literal["fp32", "bf16"]
_STORED_TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class MMDM:
    """A loaded model.

    Attributes:
        config: sizes and settings.
        denoiser: in the requested type, evaluation mode, no gradients.
        autoencoder: float32 unless asked otherwise.
        schedule: noise schedule.
        tables: constant tables of the conditioning renderer in released terms: freqs (7,) f32,
            faces (F, 3) i64, faces_uvs (F, 3) i64, face_mask (F,) bool, props (V, 3) f32. None when
            a checkpoint has none; the head model's are to be used then.
        provenance: where the weights come from.
    """

    config: MMDMConfig
    denoiser: MMDMDenoiser
    autoencoder: Autoencoder
    schedule: NoiseSchedule
    tables: dict[str, Tensor] | None
    provenance: dict[str, Any]


def load_mmdm(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    autoencoder_dtype: torch.dtype = torch.float32,
    config: MMDMConfig | str | Path | None = None,
) -> MMDM:
    """Loads a model for inference.

    Args:
        path: a folder written by `prepare_mmdm`, a released .ckpt, or a folder with one.
        dtype: type of the denoiser (float32, bfloat16 or float16).
        device: where to put the networks; tables stay on the CPU.
        autoencoder_dtype: type of the autoencoder; float32 costs little and keeps images exact.
        config: only for a checkpoint whose config is neither beside it nor the released one.

    Raises:
        UserError: unreadable file, or tensors that do not fit the config (all listed).
    """
    path = Path(path)
    if is_prepared_folder(path):
        weights = read_prepared(path)
        provenance = weights.provenance
        if dtype == torch.float32 and provenance.get("stored_dtype") == "bf16":
            logger.warning(
                "%s holds bfloat16 weights; computing in float32 does not restore the lost digits. "
                "Run prepare_mmdm with dtype fp32 for full precision.",
                path,
            )
    else:
        file = find_checkpoint(path)
        weights = read_released(file, config)
        provenance = {"source": {"name": file.name}, "config_source": weights.config_source}
    with torch.device("meta"):
        denoiser = MMDMDenoiser(weights.config)
        autoencoder = Autoencoder(weights.config.autoencoder)
    _assign(denoiser, weights.denoiser, dtype, device)
    _assign(autoencoder.vae, weights.autoencoder, autoencoder_dtype, device)
    return MMDM(
        config=weights.config,
        denoiser=denoiser.eval().requires_grad_(False),
        autoencoder=autoencoder.eval().requires_grad_(False),
        schedule=NoiseSchedule(weights.config.schedule),
        tables=None if weights.tables is None else typed_tables(weights.tables),
        provenance=provenance,
    )


def prepare_mmdm(
    source: str | Path,
    output_dir: str | Path,
    head_tables: Mapping[str, Any] | None = None,
    dtype: StoredType = "fp32",
    *,
    config: MMDMConfig | str | Path | None = None,
    sha256: str | None = None,
    callback: ProgressCallback | None = None,
) -> MMDMConfig:
    """Imports a checkpoint (or copies a prepared folder) into `output_dir`.

    Tensors are converted one by one, so memory stays below 1.5 times the size of the source. Tables
    of the conditioning renderer are taken from the checkpoint, because the weights were trained
    with them; where the head model's differ, that is logged and recorded.

    Args:
        source: released .ckpt, a folder with one, or a folder written by this function.
        output_dir: folder to write.
        head_tables: the head model's own tables, by the names in `MMDM.tables` (any subset);
            compared, and used when the checkpoint has none.
        dtype: type the denoiser is stored in. bf16 halves the file; then float32 and float16
            sampling work with rounded weights.
        config: see `read_released`.
        sha256: expected hash of the .ckpt.
        callback: called per tensor.

    Raises:
        UserError: wrong hash, unreadable file, tensors missing, unexpected, misshapen or not
            finite (all listed), no tables anywhere.
    """
    if dtype not in _STORED_TYPES:
        raise ValueError(f"dtype {dtype!r}: choose from {', '.join(_STORED_TYPES)}")
    source, output_dir = Path(source), Path(output_dir)
    if is_prepared_folder(source):
        if source.resolve() == output_dir.resolve():
            raise UserError(f"{source}: already prepared; give another output folder.")
        weights = read_prepared(source)
        origin = weights.provenance.get("source", {})
    else:
        file = find_checkpoint(source)
        digest = sha256_file(file)
        if sha256 is not None and digest != sha256.strip().lower():
            raise InputFileError(
                file, f"SHA-256 {digest}", f"SHA-256 {sha256}", "Download the file again."
            )
        weights = read_released(file, config)
        origin = {"name": file.name, "sha256": digest, "bytes": file.stat().st_size}
    tables, table_notes = choose_tables(source, weights.tables, head_tables)
    provenance = {
        "source": origin,
        "config_source": weights.config_source,
        "num_parameters": {
            "denoiser": sum(t.numel() for t in weights.denoiser.values()),
            "autoencoder": sum(t.numel() for t in weights.autoencoder.values()),
        },
        "tables": table_notes,
        "versions": {
            "cap4d_core": cap4d_core.__version__,
            **{name: version(name) for name in ("torch", "diffusers", "safetensors")},
        },
    }
    _write_folder(
        output_dir, replace(weights, tables=tables, provenance=provenance), dtype, callback
    )
    return weights.config


def save_mmdm(
    output_dir: str | Path,
    denoiser: MMDMDenoiser,
    autoencoder: Autoencoder,
    tables: Mapping[str, Any],
    provenance: Mapping[str, Any],
    dtype: StoredType = "fp32",
    autoencoder_dtype: StoredType = "fp32",
) -> None:
    """Writes a model that was made here (trained, or with random weights) as a prepared folder."""
    output_dir = Path(output_dir)
    if autoencoder.config != denoiser.config.autoencoder:
        raise ValueError("the autoencoder's config differs from the one in the denoiser's config")
    typed = typed_tables(tables)
    check_tables(output_dir / "conditioning.safetensors", typed)
    weights = ModelWeights(
        config=denoiser.config,
        denoiser=denoiser.state_dict(),
        autoencoder=autoencoder.vae.state_dict(),
        tables=typed,
        config_source="",
        provenance=dict(provenance),
    )
    _write_folder(output_dir, weights, dtype, None, autoencoder_dtype)


def _assign(
    module: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> None:
    # copy=True: never keep a view into a mapped file, which could change or vanish. Several
    # threads, because reading, rounding and copying to a GPU take turns.
    with ThreadPoolExecutor(_READERS) as pool:
        copies = list(pool.map(lambda t: t.to(device, dtype, copy=True), tensors.values()))
    module.load_state_dict(dict(zip(tensors, copies, strict=True)), assign=True)


def _write_folder(
    folder: Path,
    weights: ModelWeights,
    dtype: StoredType,
    callback: ProgressCallback | None,
    autoencoder_dtype: StoredType = "fp32",
) -> None:
    # The provenance is removed first and written last: a folder with it is complete.
    (folder / "provenance.json").unlink(missing_ok=True)
    total = len(weights.denoiser) + len(weights.autoencoder)
    tables = weights.tables or {}
    parts = (
        ("denoiser", weights.denoiser, _STORED_TYPES[dtype]),
        ("autoencoder", weights.autoencoder, _STORED_TYPES[autoencoder_dtype]),
    )
    done = 0
    for name, tensors, stored in parts:
        path = folder / f"{name}.safetensors"
        layout = {key: (stored, tuple(tensor.shape)) for key, tensor in tensors.items()}
        converted = _finite_tensors(path, tensors, stored)
        if callback is not None:
            converted = _reported(converted, callback, done, total)
        write_safetensors_stream(path, layout, converted)
        done += len(tensors)
    write_safetensors_stream(
        folder / "conditioning.safetensors",
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tables.items()},
        tables.items(),
    )
    model = weights.config.to_dict()
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "model": model})
    head = {"format_version": FORMAT_VERSION, "stored_dtype": dtype}
    write_json(folder / "provenance.json", head | weights.provenance)


def _finite_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    bad = []
    for name, tensor in tensors.items():
        converted = tensor.to(dtype)
        if not bool(torch.isfinite(converted).all()):
            bad.append(name)
        yield name, converted
    if bad:
        names = "\n  ".join(bad)
        raise UserError(
            f"{path.name}: {len(bad)} tensors hold NaN or infinity; the checkpoint is damaged. "
            f"Download or export it again.\n  {names}"
        )


def _reported(
    tensors: Iterator[tuple[str, Tensor]], callback: ProgressCallback, done: int, total: int
) -> Iterator[tuple[str, Tensor]]:
    for count, item in enumerate(tensors, start=done + 1):
        yield item
        callback(Progress(count, total, "tensor"))
