"""First phase of a run, where it is asked for: training of the autoencoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.pictures import contact_sheet, image_from_network
from cap4d_core.diffusion.training.autoencoder_training import (
    AutoencoderPass,
    Perceptual,
    autoencoder_loss,
    encode_all,
    reconstruction_psnr,
)
from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.diffusion.training.preparation import (
    existing_frames,
    keep_autoencoder,
    picture_columns,
    placed,
)
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.records import add_record
from cap4d_core.diffusion.training.run_spec import (
    RunSpec,
    fingerprint,
    resume,
    run_to_end,
    stamp_of,
    to_channels_last,
)
from cap4d_core.diffusion.training.start_weights import read_start, start_autoencoder
from cap4d_core.diffusion.training.trainer import Trainer
from cap4d_core.errors import UserError
from cap4d_core.files.images import write_image

logger = logging.getLogger(__name__)

PHASE = "autoencoder"
VALIDATION = "autoencoder_validation"
# Pictures from which the spread of the latents is measured, and those of a picture sheet.
MEASURED, SHOWN = 4096, 8


def autoencoder_identity(spec: RunSpec) -> str:
    """What the trained autoencoder depends on."""
    settings = spec.settings
    frames = existing_frames(spec.folder)
    model = settings.model.get("autoencoder", {})
    source = settings.autoencoder_start or settings.start
    return spec.identity(
        settings.autoencoder, str(model), stamp_of(source), frames.belongs_to, *frames.keys
    )


def train_autoencoder(
    group: Group, device: torch.device, spec: RunSpec, shown: Sequence[Tensor]
) -> None:
    """Trains the autoencoder and keeps its averaged weights; run by every process.

    Args:
        group: this process among all.
        device: of this process.
        spec: the run.
        shown: (n, 3, H, W) uint8 pictures of people that are not trained on, possibly none.

    Raises:
        UserError: what settings or data make impossible.
        DeadlineError: from the callback; the state is saved.
    """
    start, settings = read_start(spec.settings), spec.settings.autoencoder
    machine = spec.machine(group, device)
    autoencoder = start_autoencoder(start, spec.settings.seed, start.config.autoencoder)
    autoencoder = to_channels_last(autoencoder, device)
    pictures = picture_columns(spec.folder)
    pictures = pictures.to(placed(pictures.numel(), spec.settings.keep_data_on, device))
    identity = autoencoder_identity(spec)
    trainer = Trainer(
        PHASE,
        AutoencoderPass(autoencoder),
        autoencoder_loss(
            lambda: pictures, autoencoder, settings, spec.settings.seed, group.rank,
            _perceptual(spec, device),
        ),
        settings,
        machine,
        Pace(settings),
        spec.folder / "autoencoder.pt",
        spec.metrics,
        fingerprint(identity, machine),
    )  # fmt: skip
    resume(trainer, spec, (PHASE, VALIDATION))
    unseen = torch.cat(list(shown)) if shown else None
    look = _Look(spec, autoencoder, pictures, unseen)
    first = group.is_first
    run_to_end(
        trainer, spec.callback if first else None, look if first else None, settings.sample_every
    )
    if not first:
        return
    with trainer.averaged():
        look(trainer.pace.step)
        factor = autoencoder.config.scaling_factor
        if start.autoencoder is None:
            every = max(1, len(pictures) // MEASURED)
            means, _ = encode_all(autoencoder, pictures[::every], 32)
            factor = 1.0 / max(float(means.float().std()), 1e-6)
            logger.info("Latents have a deviation of %.3f.", 1.0 / factor)
        config = autoencoder.config.model_copy(update={"scaling_factor": factor})
        trained = Autoencoder(config)
        trained.vae.load_state_dict(autoencoder.vae.state_dict())
    keep_autoencoder(spec.folder, trained, identity)


def _perceptual(spec: RunSpec, device: torch.device) -> Perceptual | None:
    if spec.settings.autoencoder.perceptual_weight <= 0:
        return None
    if spec.make_perceptual is None:
        raise UserError(
            "training.autoencoder.perceptual_weight is above 0, which needs LPIPS weights: set "
            "fitting.lpips_weights, or the weight to 0."
        )
    network: nn.Module = spec.make_perceptual().to(device)

    def distance(made: Tensor, wanted: Tensor) -> Tensor:
        distances: Tensor = network(made / 2 + 0.5, wanted / 2 + 0.5)
        return distances.mean()

    return distance


@dataclass
class _Look:
    """Measures and shows what the autoencoder makes of pictures."""

    spec: RunSpec
    autoencoder: Autoencoder
    pictures: Tensor
    unseen: Tensor | None
    last: int = -1

    def __call__(self, step: int) -> None:
        if step == self.last:
            return
        self.last = step
        images = self.pictures[:: max(1, len(self.pictures) // SHOWN)][:SHOWN]
        if self.unseen is not None:
            images = self.unseen
            psnr = reconstruction_psnr(self.autoencoder, images, SHOWN)
            add_record(self.spec.metrics, {"phase": VALIDATION, "step": step, "psnr": psnr})
            logger.info("autoencoder: step %d, %.2f dB on other people", step, psnr)
        chosen = images[:: max(1, len(images) // SHOWN)][:SHOWN].cpu()
        self._write(chosen, self.spec.samples / f"autoencoder_{step:07d}.png")

    @torch.no_grad()
    def _write(self, images: Tensor, path: Path) -> None:
        batch = images.to(self.autoencoder.device).float() / 127.5 - 1.0
        made = self.autoencoder.decode(self.autoencoder.encode(batch)).cpu().numpy()
        rows = [np.moveaxis(image, 0, -1) for image in images.numpy()]
        rows += [image_from_network(image) for image in made]
        write_image(path, contact_sheet(rows, images.shape[-1], columns=len(images)))
