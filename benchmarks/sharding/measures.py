"""What is measured of the views of one setting."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.sharding.world import Head, Person
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import load_image_data
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.demo.world import write_demo_held_out
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.evaluation.consistency import cross_view_consistency, error_parts
from cap4d_core.evaluation.metrics import dilated_mask, psnr_of_views
from cap4d_core.evaluation.rendering import render_view
from cap4d_core.evaluation.surface import SurfacePoints, surface_colors
from cap4d_core.files.image_set import ImageSetItem, read_image_set, write_view_parameters
from cap4d_core.files.images import read_grey, read_rgb, to_uint8, write_image
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import PRESETS, FittingSettings

# Views closer than this to a reference are easy.
FAR_DEG = 10.0
DECODE_BATCH = 64
STRIP_VIEWS = 6


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Pictures (n, S, S, 3) in 0..1, rounded to bytes like the files of the workflow."""
    images = autoencoder.decode(latents, DECODE_BATCH).clamp(-1, 1)
    return (((images + 1) / 2 * 255).round() / 255).movedim(1, -1)


def round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """True pictures through the autoencoder: what perfect latents would show."""
    latents = autoencoder.encode(images.movedim(-1, 1) * 2 - 1, batch_size=DECODE_BATCH)
    return decode(autoencoder, latents)


def measure(person: Person, images: Tensor, head: Head, points: SurfacePoints) -> dict[str, Any]:
    """Figures of the views (N, S, S, 3) of a person."""
    psnr = psnr_of_views(images, person.truth, person.masks).cpu()
    far = person.angles >= FAR_DEG
    surface = surface_colors(head.model, person.plan.views, images, points)
    agreement = cross_view_consistency(surface)
    parts = error_parts(surface, person.surface)
    return {
        "psnr": float(psnr.mean()),
        "psnr_far": float(psnr[far].mean()) if bool(far.any()) else None,
        "num_far": int(far.sum()),
        "gain_far": float((psnr - person.baseline)[far].mean()) if bool(far.any()) else None,
        "std": None if agreement is None else agreement.mean_std,
        "consistency_psnr": None if agreement is None else agreement.psnr,
        "shared_psnr": None if parts is None else parts.shared_psnr,
        "differing_psnr": None if parts is None else parts.differing_psnr,
    }


def strip(person: Person, images: Tensor | None) -> np.ndarray:
    """A row of views (H, W, 3) uint8: references first, then some views (or the truth)."""
    shown = np.linspace(0, len(person.truth) - 1, STRIP_VIEWS).round().astype(int)
    pictures = [person.reference_images[0]]
    pictures += [(person.truth if images is None else images)[int(i)] for i in shown]
    return np.concatenate([to_uint8(p.cpu().numpy()) for p in pictures], axis=1)


def write_strip(path: Path, row: np.ndarray) -> None:
    """Writes a row of views."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(row).save(path)


def avatar_psnr(
    person: Person, images: Tensor, head: Head, iterations: int, batch_size: int, device: str
) -> float:
    """PSNR on held-out views of an avatar fitted to references and views, demo preset.

    Iterations count views, `batch_size` at a time.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        size = images.shape[1]
        items = _write_items(folder, person, images)
        data = load_image_data([items]).to(device)
        head_model = HeadModel.load(head.folder, lower_jaw=True).to(device)
        values: dict[str, Any] = dict(PRESETS["demo"]["fitting"])
        values |= {"iterations": iterations, "batch_size": batch_size, "compile": "off"}
        settings = FittingSettings(**values)
        avatar = GaussianAvatar.create(head_model, data.shape, settings).to(device)
        trainer = AvatarTrainer(avatar, data, settings)
        for iteration in range(trainer.batch_size, iterations + 1, trainer.batch_size):
            trainer.step(iteration)
        trainer.finish()
        write_demo_held_out(folder / "held_out", person.seed, crop_size=size, device=device)
        scores = []
        for item in read_image_set(folder / "held_out"):
            assert item.matte is not None  # demo sets have mattes
            truth = torch.from_numpy(read_rgb(item.image).copy()).float() / 255
            mask = torch.from_numpy(dilated_mask(read_grey(item.matte)))
            rendered = render_view(avatar, item.parameters, size).cpu()
            scores.append(float(psnr_of_views(rendered[None], truth[None], mask[None])))
    return float(np.mean(scores))


def _write_items(folder: Path, person: Person, images: Tensor) -> list[ImageSetItem]:
    pictures = torch.cat([person.reference_images, images.to(person.reference_images)])
    items = []
    for i, view in enumerate((*person.plan.references, *person.plan.views)):
        item = ImageSetItem(folder / "images" / f"{i:05d}.png", view)
        write_image(item.image, to_uint8(pictures[i].cpu().numpy()))
        write_view_parameters(folder / "flame" / f"{i:05d}.npz", view)
        items.append(item)
    return items
