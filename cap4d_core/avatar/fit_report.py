"""What a fit shows: scores on views it did not train on, pictures, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from cap4d_core.avatar import losses
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.files.basic import atomic_path
from cap4d_core.files.images import to_uint8, write_image

EVALUATION_BATCH = 8
# Where mattes exist, scores also count the subject alone, with a rim for its outline.
MATTE_RIM = 5
MAX_PREVIEWS = 4


@torch.no_grad()
def render_views(trainer: AvatarTrainer, rows: Sequence[int]) -> Tensor:
    """Renders views with their own expression, (K, 3, H, W) clamped to 0..1, on the device."""
    images = []
    train = trainer.split.train or list(range(len(trainer.data)))
    neck_mean = trainer.neck_offsets[train].mean(0)
    for start in range(0, len(rows), EVALUATION_BATCH):
        index = torch.tensor(list(rows[start : start + EVALUATION_BATCH]), device=trainer.device)
        # Frames that were not trained on have no neck of their own.
        posed = trainer.pose(index, False, neck_mean.expand(len(index), 3))
        output = trainer.render(posed, trainer.data.batch(index), trainer.avatar.active_sh_degree)
        images.append(output.image.clamp(0, 1).permute(0, 3, 1, 2))
    return torch.cat(images)


def psnr(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image over a mask.

    Args:
        image: (B, 3, H, W) in 0..1.
        target: likewise.
        mask: (B, 1, H, W) bool.
    """
    weight = mask.float()
    error = ((image - target).square() * weight).sum((1, 2, 3)) / (3 * weight.sum((1, 2, 3)))
    return -10 * torch.log10(error.clamp(min=1e-10))


@torch.no_grad()
def evaluate_views(trainer: AvatarTrainer, rows: Sequence[int]) -> dict[str, float]:
    """Mean PSNR, SSIM (and LPIPS) of views; `psnr_subject` inside dilated mattes where given."""
    index = torch.tensor(list(rows), device=trainer.device)
    image = render_views(trainer, rows)
    batch = trainer.data.batch(index)
    masked, target = image * batch.mask, batch.image * batch.mask
    scores = {
        "psnr": float(psnr(image, batch.image, batch.mask).mean()),
        "ssim": float(losses.ssim(masked, target)),
    }
    if trainer.lpips is not None:
        parts = zip(masked.split(1), target.split(1), strict=True)
        scores["lpips"] = float(torch.cat([trainer.lpips(a, b) for a, b in parts]).mean())
    if trainer.data.mattes is not None:
        subject = dilated_mattes(trainer.data.mattes[index])
        scores["psnr_subject"] = float(
            psnr(image, batch.image, subject.to(image.device) & batch.mask).mean()
        )
    return scores


def dilated_mattes(mattes: Tensor) -> Tensor:
    """(B, H, W) bytes to (B, 1, H, W) bool, grown by MATTE_RIM pixels."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * MATTE_RIM + 1, 2 * MATTE_RIM + 1))
    grown = [cv2.dilate((m > 127).astype(np.uint8), disc) for m in mattes.cpu().numpy()]
    return torch.from_numpy(np.stack(grown).astype(bool))[:, None]


def write_preview(path: str | Path, trainer: AvatarTrainer, rows: Sequence[int]) -> None:
    """Writes a picture with one row per view: target, render, absolute difference."""
    rows = list(rows)[:MAX_PREVIEWS]
    index = torch.tensor(rows, device=trainer.device)
    batch = trainer.data.batch(index)
    image = render_views(trainer, rows)
    # Outside the photo there is no target.
    target = torch.where(batch.mask, batch.image, torch.ones_like(batch.image))
    difference = (image - target).abs() * batch.mask
    strips = torch.cat([target, image, 1 - difference], dim=3)
    picture = torch.cat(list(strips), dim=1).permute(1, 2, 0)
    write_image(path, to_uint8(picture.cpu().numpy()))


SCORES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}


def write_curves(path: str | Path, metrics: dict[str, Any]) -> None:
    """Plots losses and scores, of held-out and of some training views, against the views seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = metrics["evaluations"]
    names = [name for name in SCORES if any(name in e["train"] for e in evaluations)]
    figure = Figure(figsize=(4.5 + 3.2 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [1.4] + [1.0] * len(names)
    panels = figure.subplots(1, 1 + len(names), squeeze=False, width_ratios=ratios)[0]
    left, *right = panels
    curves = metrics["curves"]
    for name in ("total", "l1", "ssim", "lpips"):
        values = curves.get(name, [])
        if any(value > 0 for value in values):
            left.plot(curves["iteration"], values, label=name)
    left.set(ylabel="weighted loss", yscale="log")
    for axes, name in zip(right, names, strict=True):
        for split, style in (("held_out", "-o"), ("train", "--")):
            points = [(e["iteration"], e[split][name]) for e in evaluations if e[split]]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split.replace("_", " "))
        axes.set(ylabel=SCORES[name])
    for axes in panels:
        axes.set(xlabel="training views seen")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
