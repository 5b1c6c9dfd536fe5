"""Latents of the last round to the image set of generated views (rule decode_views).

    {output_dir}/images/%05d.png   generated views, numbered by view id
    {output_dir}/flame/%05d.npz    their parameters, released format
    {index}                        JSON: names and SHA-256 of the files of this shard; written last
    {index stem}.png               contact sheet

Shards write into one folder, so each declares only its index.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cap4d_core
from cap4d_core.diffusion.network_setup import load_autoencoder, matmul_precision
from cap4d_core.diffusion.pictures import contact_sheet, evenly_spaced, image_from_network
from cap4d_core.diffusion.sampling import read_shard
from cap4d_core.diffusion.sampling_checkpoint import fingerprint
from cap4d_core.diffusion.step_grid import ddim_step_count
from cap4d_core.diffusion.view_plan_file import read_plan
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, sha256_file, write_json
from cap4d_core.files.image_set import write_view_parameters
from cap4d_core.files.images import read_rgb, write_image
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

# Views decoded between two updates of the partial index.
VIEWS_PER_UPDATE = 8
CONTACT_VIEWS = 32


def decode_views(
    plan_file: str | Path,
    latents_files: str | Path | Sequence[str | Path],
    mmdm_dir: str | Path,
    output_dir: str | Path,
    index_path: str | Path,
    settings: SamplingSettings,
    device: torch.device | str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Decodes the views of one shard.

    A killed job goes on: what a partial index lists and still has that hash is kept.

    Args:
        plan_file: plan.npz.
        latents_files: shard file (or files) of the last round.
        mmdm_dir: folder written by prepare_mmdm.
        output_dir: the image set, shared by all shards.
        index_path: index file of this shard.
        settings: resolution, low_memory, parity (cuts bytes off instead of rounding).
        device: where the autoencoder runs.
        callback: called per batch.

    Raises:
        UserError: inputs that do not fit each other.
    """
    output_dir, index_path = Path(output_dir), Path(index_path)
    device = torch.device(device)
    plan = read_plan(plan_file)
    if isinstance(latents_files, (str, Path)):
        latents_files = [latents_files]
    parts = []
    view_ids: list[int] = []
    steps_run = ddim_step_count(settings.num_inference_steps)
    for path in latents_files:
        latents, ids, next_step = read_shard(path)
        if next_step != steps_run or max(ids) >= len(plan.views):
            raise InputFileError(
                path,
                f"latents after {next_step} steps, view ids up to {max(ids)}",
                f"latents after all {steps_run} steps of at most {len(plan.views)} views",
                "Delete the rounds folder and run the workflow again.",
            )
        parts.append(latents)
        view_ids += ids
    all_latents = torch.cat(parts)
    source = fingerprint(
        {
            "latents": [sha256_file(path) for path in latents_files],
            "plan": sha256_file(plan_file),
            "mmdm": str(Path(mmdm_dir).resolve()),
            "parity": settings.parity,
            "low_memory": settings.low_memory,
            "device": device.type,
        }
    )
    partial = index_path.with_suffix(".partial.json")
    files = _finished_files(partial, output_dir, source)
    todo = [
        i for i, view in enumerate(view_ids) if not {_image(view), _parameters(view)} <= set(files)
    ]
    if files:
        logger.info("Resuming: %d of %d views are there.", len(view_ids) - len(todo), len(view_ids))
    autoencoder, _ = load_autoencoder(mmdm_dir, settings, device)
    with torch.no_grad(), matmul_precision("fp32" if settings.parity else "tf32"):
        for done, row in enumerate(todo, start=len(view_ids) - len(todo) + 1):
            # One by one: the bits of an image must not depend on what is decoded with it.
            latent = all_latents[row : row + 1].to(device)
            image = autoencoder.decode(latent, tiled=settings.low_memory)[0]
            view = view_ids[row]
            write_image(output_dir / _image(view), _bytes(image, settings.parity))
            write_view_parameters(output_dir / _parameters(view), plan.views[view])
            for name in (_image(view), _parameters(view)):
                files[name] = sha256_file(output_dir / name)
            if done % VIEWS_PER_UPDATE == 0:
                write_json(partial, {"source": source, "files": files})
            if callback is not None:
                callback(Progress(done, len(view_ids), "view"))
    shown = [view_ids[i] for i in evenly_spaced(len(view_ids), CONTACT_VIEWS)]
    sheet = contact_sheet([read_rgb(output_dir / _image(view)) for view in shown])
    write_image(index_path.with_suffix(".png"), sheet)
    write_json(
        index_path,
        {
            "cap4d_core": cap4d_core.__version__,
            "count": len(view_ids),
            "files": {name: files[name] for name in sorted(files)},
        },
    )
    partial.unlink(missing_ok=True)


def _image(view: int) -> str:
    return f"images/{view:05d}.png"


def _parameters(view: int) -> str:
    return f"flame/{view:05d}.npz"


def _bytes(image: Tensor, truncate: bool) -> NDArray[np.uint8]:
    return image_from_network(image.float().cpu().numpy(), truncate)


def _finished_files(partial: Path, output_dir: Path, source: str) -> dict[str, str]:
    """Files of an interrupted run that are still what it wrote."""
    if not partial.exists():
        return {}
    try:
        content: Any = read_json(partial)
    except InputFileError:
        return {}
    if not isinstance(content, dict) or content.get("source") != source:
        logger.info("Starting anew: %s is of other inputs or settings.", partial)
        return {}
    return {
        name: digest
        for name, digest in content.get("files", {}).items()
        if (output_dir / name).is_file() and sha256_file(output_dir / name) == digest
    }
