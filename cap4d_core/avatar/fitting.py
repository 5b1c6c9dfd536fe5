"""Fits a Gaussian avatar to image sets: the loop around `cap4d_core.avatar.training`.

Outputs: avatar.safetensors, avatar.json, metrics.json, metrics.png, previews/*.png. A killed fit
resumes from checkpoints/last.safetensors; on the CPU with the same number of threads the result is
then the same to the bit.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cap4d_core
from cap4d_core.avatar.fit_checkpoint import (
    CHECKPOINT_FILE,
    fit_fingerprint,
    restore_checkpoint,
    save_checkpoint,
)
from cap4d_core.avatar.fit_report import evaluate_views, write_curves, write_preview
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import ImageData, load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.renderer import render_gaussians
from cap4d_core.avatar.schedules import evaluation_interval, is_due
from cap4d_core.avatar.training import LOSS_NAMES, AvatarTrainer, RenderFunction
from cap4d_core.errors import DeadlineError, DivergedError, MissingAssetError
from cap4d_core.files.basic import write_json
from cap4d_core.files.image_set import ImageSetItem
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import FittingSettings

logger = logging.getLogger(__name__)

# Steps between two looks at the losses (each stops the device once).
LOG_INTERVAL = 50
NUM_TRAIN_SCORES = 8


def fit_avatar(
    image_sets: Sequence[str | Path | list[ImageSetItem]],
    head_model: HeadModel,
    settings: FittingSettings,
    output_dir: str | Path,
    callback: ProgressCallback | None = None,
    *,
    device: torch.device | str | None = None,
    render_fn: RenderFunction = render_gaussians,
) -> GaussianAvatar:
    """Fits an avatar.

    Args:
        image_sets: image-set folders (or lists of items), references first.
        head_model: with both mouth parts; with the upper one only when `use_lower_jaw` is off.
        settings: of the fit.
        output_dir: receives the outputs.
        callback: called after every iteration.
        device: default: where the head model is.
        render_fn: renderer.

    Raises:
        DivergedError: losses became NaN or the splats too many; the last checkpoint is kept.
        DeadlineError: from `callback`; what was done is in the checkpoint.
        InputFileError: an input is not what it should be.
        MissingAssetError: LPIPS weights are required but absent.
    """
    output_dir = Path(output_dir)
    device = head_model.template.device if device is None else torch.device(device)
    if head_model.lower_jaw != settings.use_lower_jaw:
        raise ValueError("fit_avatar: head_model.lower_jaw must equal settings.use_lower_jaw")
    data = load_image_data(image_sets, settings.parity).to(device)
    lpips = load_lpips(settings, device)
    avatar = GaussianAvatar.create(head_model.to(device), data.shape, settings).to(device)
    trainer = AvatarTrainer(avatar, data, settings, lpips=lpips, render_fn=render_fn)
    logger.info(
        "%d views of %d px (%d held out), %d splats on %d faces, %s",
        len(data),
        data.size[0],
        len(trainer.split.held_out),
        len(avatar.splats),
        len(avatar.grid.faces),
        device,
    )
    history = _run(trainer, output_dir, callback)
    trainer.finish()
    avatar.meta = {
        "settings": settings.model_dump(mode="json"),
        "iteration": settings.iterations,
        "num_views": len(data),
        "package_version": cap4d_core.__version__,
    }
    metrics = _metrics(trainer, history)
    write_json(output_dir / "metrics.json", metrics)
    write_curves(output_dir / "metrics.png", metrics)
    avatar.save(output_dir)
    # Complete now: a later run with other settings must not find an old state.
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    return avatar.requires_grad_(False)


def load_lpips(settings: FittingSettings, device: torch.device | str) -> Lpips | None:
    """The perceptual loss, or None (logged) without weights.

    Raises:
        MissingAssetError: `require_lpips` is set and there are no weights.
    """
    if settings.lpips_weights is not None:
        return Lpips.load(settings.lpips_weights, parity=settings.parity, device=str(device))
    hint = (
        "Set fitting.lpips_weights to 'download', to a VGG16 + LPIPS file, or to a folder with "
        "torchvision's VGG16 and the heads of richzhang/PerceptualSimilarity "
        "(lpips/weights/v0.1/vgg.pth)."
    )
    if settings.require_lpips:
        raise MissingAssetError(f"fitting.require_lpips is set, but no LPIPS weights. {hint}")
    logger.info("no LPIPS weights: fitting on L1 and SSIM alone, fine detail is blurrier. %s", hint)
    return None


def _run(
    trainer: AvatarTrainer, output_dir: Path, callback: ProgressCallback | None
) -> dict[str, Any]:
    """The loop; returns curves, evaluations and seconds."""
    settings = trainer.settings
    checkpoint = output_dir / "checkpoints" / CHECKPOINT_FILE
    fingerprint = fit_fingerprint(trainer)
    done, history = restore_checkpoint(checkpoint, trainer, fingerprint)
    if history is None:
        curves: dict[str, list[float]] = {"iteration": [], "num_gaussians": []}
        curves |= {name: [] for name in LOSS_NAMES}
        history = {"curves": curves, "evaluations": [], "seconds": 0.0}
    started, spent = time.monotonic(), history["seconds"]
    last_saved = started
    interval = evaluation_interval(settings)
    stride = trainer.batch_size
    log_interval = stride * min(LOG_INTERVAL, max(settings.iterations // (20 * stride), 1))
    sums, count = torch.zeros(len(LOSS_NAMES), device=trainer.device), 0
    metrics: dict[str, float] = {}

    # Iterations count views; the last step may see a few more than asked for.
    for iteration in range(done + stride, settings.iterations + stride, stride):
        sums += trainer.step(iteration)
        count += 1
        last = iteration >= settings.iterations
        due = time.monotonic() - last_saved > settings.checkpoint_every_s
        evaluate = last or is_due(iteration, interval, stride)
        if last or due or evaluate or is_due(iteration, log_interval, stride):
            means = (sums / count).tolist()
            _check(trainer, iteration, means, checkpoint)
            sums, count = torch.zeros_like(sums), 0
            curves = history["curves"]
            curves["iteration"].append(iteration)
            curves["num_gaussians"].append(len(trainer.avatar.splats))
            for name, value in zip(LOSS_NAMES, means, strict=True):
                curves[name].append(value)
            metrics |= {"loss": means[-1], "splats": float(len(trainer.avatar.splats))}
        history["seconds"] = spent + time.monotonic() - started
        if evaluate:
            scores = _evaluate(trainer, iteration, output_dir)
            history["evaluations"].append(scores)
            metrics["psnr"] = (scores["held_out"] or scores["train"])["psnr"]
        if due and not last:
            save_checkpoint(checkpoint, trainer, iteration, fingerprint, history)
            last_saved = time.monotonic()
        if callback is not None:
            finished = min(iteration, settings.iterations)
            try:
                callback(Progress(finished, settings.iterations, metrics=metrics))
            except DeadlineError:
                save_checkpoint(checkpoint, trainer, iteration, fingerprint, history)
                raise
    return history


def _check(trainer: AvatarTrainer, iteration: int, means: list[float], checkpoint: Path) -> None:
    """Raises DivergedError on NaN or too many splats."""
    kept = (
        f"The last good state is kept in {checkpoint}; delete it to start over."
        if checkpoint.exists()
        else "There was no checkpoint yet."
    )
    bad = [name for name, value in zip(LOSS_NAMES, means, strict=True) if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"The fit diverged before iteration {iteration}: {', '.join(bad)} not finite. Lower "
            "the learning rates (fitting.lr_*) or look for broken inputs (tracking/overlay). "
            f"{kept}"
        )
    count, limit = len(trainer.avatar.splats), trainer.settings.max_gaussians
    if count > limit:
        raise DivergedError(
            f"The fit reached {count} splats at iteration {iteration}, more than "
            f"fitting.max_gaussians ({limit}). Raise fitting.densify_grad_threshold, or that "
            f"limit. {kept}"
        )


def _evaluate(trainer: AvatarTrainer, iteration: int, output_dir: Path) -> dict[str, Any]:
    """Scores and a preview picture."""
    split = trainer.split
    train = split.train or list(range(len(trainer.data)))
    # Evenly spread, so that references and generated views both count.
    chosen = train[:: max(len(train) // NUM_TRAIN_SCORES, 1)][:NUM_TRAIN_SCORES]
    preview = output_dir / "previews" / f"{iteration:06d}.png"
    write_preview(preview, trainer, split.held_out or chosen)
    return {
        "iteration": iteration,
        "num_gaussians": len(trainer.avatar.splats),
        "held_out": evaluate_views(trainer, split.held_out) if split.held_out else None,
        "train": evaluate_views(trainer, chosen),
    }


def _metrics(trainer: AvatarTrainer, history: dict[str, Any]) -> dict[str, Any]:
    """Content of metrics.json."""
    final = history["evaluations"][-1]
    data: ImageData = trainer.data
    return {
        "iterations": trainer.settings.iterations,
        "num_gaussians": len(trainer.avatar.splats),
        "num_views": len(data),
        "num_held_out": len(trainer.split.held_out),
        "resolution": data.size[0],
        "seconds": round(history["seconds"], 1),
        "device": str(trainer.device),
        "lpips": trainer.lpips is not None,
        "held_out": final["held_out"],
        "train": final["train"],
        "evaluations": history["evaluations"],
        "curves": history["curves"],
    }
