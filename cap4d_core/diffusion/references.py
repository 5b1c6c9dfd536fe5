"""Reference images as crops, latents and autoencoder round trips (rule encode_references).

    {output}/images/%05d.png       what the avatar may be fitted on: round trips, or the crops alone
    {output}/crops/%05d.png        the crops before encoding (encode_references only)
    {output}/flame/%05d.npz        parameters, released format
    {output}/latents.safetensors   `latents` (R, 4, h, w), scaled (encode_references only)
    {output}/index.json            names and SHA-256 of all of them; written last

All references in the listed order, also those beyond `max_references`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import cap4d_core
from cap4d_core.diffusion.frames import read_reference_image, reference_views
from cap4d_core.diffusion.network_setup import load_autoencoder, matmul_precision
from cap4d_core.diffusion.pictures import image_from_network
from cap4d_core.diffusion.seeding import derived_normal
from cap4d_core.files.basic import sha256_file, write_json, write_safetensors
from cap4d_core.files.image_set import ViewParameters, write_view_parameters
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import TrackedSubject, read_tracked_subject
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

INDEX = "index.json"


def crop_references(
    tracking_dir: str | Path,
    head_model_dir: str | Path,
    output_dir: str | Path,
    settings: SamplingSettings,
    callback: ProgressCallback | None = None,
) -> None:
    """Writes the reference crops as an image set; needs no diffusion model.

    Args:
        tracking_dir: tracking folder of the subject.
        head_model_dir: folder written by prepare_head_model.
        output_dir: the image set.
        settings: its `resolution` is used.
        callback: called per reference.

    Raises:
        UserError: unusable tracking or head model.
    """
    output_dir = Path(output_dir)
    subject, views = _start(tracking_dir, head_model_dir, output_dir)
    for i, view in enumerate(views):
        image = read_reference_image(subject.references[i], view.crop_box, settings.resolution)
        _write(output_dir, "images", i, _as_bytes(image))
        write_view_parameters(output_dir / "flame" / f"{i:05d}.npz", view)
        if callback is not None:
            callback(Progress(i + 1, len(views), "reference"))
    _write_index(output_dir, len(views), ("images",))


def encode_references(
    tracking_dir: str | Path,
    head_model_dir: str | Path,
    mmdm_dir: str | Path,
    output_dir: str | Path,
    settings: SamplingSettings,
    device: torch.device | str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Encodes the references; latents are samples of the posterior, as in training.

    The posterior noise of a reference depends on (seed, camera, timestep) only.

    Args:
        tracking_dir: tracking folder of the subject.
        head_model_dir: folder written by prepare_head_model.
        mmdm_dir: folder written by prepare_mmdm.
        output_dir: the image set.
        settings: resolution, seed, low_memory, parity (cuts off instead of rounding bytes).
        device: where the autoencoder runs.
        callback: called per reference.

    Raises:
        UserError: unusable tracking, head model or weights, or settings that do not fit them.
    """
    output_dir, device = Path(output_dir), torch.device(device)
    autoencoder, config = load_autoencoder(mmdm_dir, settings, device)
    subject, views = _start(tracking_dir, head_model_dir, output_dir)
    latents = []
    shape = (1, config.in_channels, config.latent_size, config.latent_size)
    with torch.no_grad(), matmul_precision("tf32" if not settings.parity else "fp32"):
        for i, (view, reference) in enumerate(zip(views, subject.references, strict=True)):
            image = read_reference_image(reference, view.crop_box, settings.resolution)
            _write(output_dir, "crops", i, _as_bytes(image))
            batch = torch.from_numpy(np.moveaxis(image, -1, 0)[None].copy()).to(device)
            key = ("posterior", settings.seed, reference.camera, reference.timestep)
            latent = autoencoder.encode(batch, noise=derived_normal(shape, *key))
            decoded = autoencoder.decode(latent, tiled=settings.low_memory)[0].cpu().numpy()
            _write(output_dir, "images", i, image_from_network(decoded, settings.parity))
            write_view_parameters(output_dir / "flame" / f"{i:05d}.npz", view)
            latents.append(latent.cpu())
            if callback is not None:
                callback(Progress(i + 1, len(views), "reference"))
    write_safetensors(output_dir / "latents.safetensors", {"latents": torch.cat(latents)})
    _write_index(output_dir, len(views), ("images", "crops"), ("latents.safetensors",))


def _start(
    tracking_dir: str | Path, head_model_dir: str | Path, output_dir: Path
) -> tuple[TrackedSubject, list[ViewParameters]]:
    subject = read_tracked_subject(tracking_dir)
    head = HeadModel.load(head_model_dir)
    template = load_flame_template(head_model_dir)
    (output_dir / INDEX).unlink(missing_ok=True)
    for part in ("images", "crops", "flame"):
        # Left over from a run with more references they would count as part of the set.
        for stale in (output_dir / part).glob("[0-9]*"):
            stale.unlink()
    return subject, reference_views(subject, head, template.head_vertex_ids)


def _as_bytes(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    return image_from_network(np.moveaxis(image, -1, 0))


def _write(folder: Path, part: str, index: int, image: NDArray[np.uint8]) -> None:
    write_image(folder / part / f"{index:05d}.png", image)


def _write_index(
    folder: Path, count: int, image_parts: tuple[str, ...], others: tuple[str, ...] = ()
) -> None:
    names = [f"{part}/{i:05d}.png" for part in image_parts for i in range(count)]
    names += [f"flame/{i:05d}.npz" for i in range(count)]
    files = {name: sha256_file(folder / name) for name in [*names, *others]}
    write_json(
        folder / INDEX, {"cap4d_core": cap4d_core.__version__, "count": count, "files": files}
    )
    logger.info("%d references written to %s.", count, folder)
