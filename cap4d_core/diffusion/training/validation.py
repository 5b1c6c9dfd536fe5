"""Looking at a denoiser in training: loss, quality and pictures of people it is not trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training.autoencoder_training import encode_all
from cap4d_core.diffusion.training.batches import BatchSource, DrawSettings
from cap4d_core.diffusion.training.denoiser_pass import DenoiserPass, denoiser_loss
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.training.people import MOST_SHOWN, People, Person
from cap4d_core.diffusion.training.records import add_record
from cap4d_core.diffusion.training.trainer import Machine
from cap4d_core.diffusion.training.view_quality import (
    ViewTask,
    matte_psnr,
    nearest_reference,
    sample_task,
    truth_of,
)
from cap4d_core.errors import UserError
from cap4d_core.files.images import write_image
from cap4d_core.training_settings import DenoiserTrainingSettings

logger = logging.getLogger(__name__)

PHASE = "validation"
# Fixed batches that the loss is measured on.
LOSS_BATCHES = 8


@dataclass(frozen=True)
class Shown:
    """Frames of one person to look at, on the CPU.

    table: V frames with pictures, the first the most frontal; mattes (V, H, W) uint8.
    """

    table: FrameTable
    mattes: Tensor


@dataclass(frozen=True)
class Audience:
    """Everyone who is looked at.

    is_unseen: none of them is trained on, so that what is measured on them means something.
    """

    people: list[Shown]
    is_unseen: bool


def find_audience(people: People, num_views: int) -> Audience:
    """People to look at: those of the settings, else some of the training data.

    Args:
        people: of the run.
        num_views: frames of each.

    Raises:
        UserError: data that cannot be used.
    """
    chosen = people.validation(num_views)
    if chosen:
        return Audience([show(person, num_views) for person in chosen[:MOST_SHOWN]], True)
    chosen = people.some_of_training(num_views)
    return Audience([show(person, num_views) for person in chosen], False)


def show(person: Person, num_views: int) -> Shown:
    """Evenly spaced frames of a person; one with fewer frames shows some twice."""
    parts = list(person.parts())
    table = FrameTable.cat([table for table, _ in parts])
    mattes = torch.cat([matte for _, matte in parts])
    if len(table) < 2:
        raise UserError(f"{person.name}: a single frame; two are needed.")
    rows = np.linspace(0, len(table) - 1, num_views).round().astype(int)
    if len(table) < num_views:
        rows = np.arange(num_views) % len(table)
    facing = (table.cameras[:, 2, :] * table.heads[:, :, 2]).sum(-1)
    first = rows[int(np.argmax(facing[rows].numpy()))]
    order = [int(first), *[int(row) for row in rows if row != first]]
    order += [order[1]] * (num_views - len(order))  # the first one came twice
    picked = torch.tensor(order)
    columns = {
        name: getattr(table, name)[picked]
        for name in ("surface", "crop_masks", "intrinsics", "cameras", "heads", "images")
    }
    return Shown(FrameTable(starts=torch.tensor([0, num_views]), **columns), mattes[picked])


class Validation:
    """Measures and shows a denoiser.

    Args:
        audience: whom to look at.
        autoencoder: on the device.
        denoiser: being trained; whatever weights it has when asked are looked at.
        settings: of the training.
        machine: how to compute.
        metrics: file of entries.
        folder: of pictures.
    """

    def __init__(
        self,
        audience: Audience,
        autoencoder: Autoencoder,
        denoiser: MMDMDenoiser,
        settings: DenoiserTrainingSettings,
        machine: Machine,
        metrics: Path,
        folder: Path,
    ) -> None:
        self.audience, self.autoencoder, self.denoiser = audience, autoencoder, denoiser
        self.settings, self.machine = settings, machine
        self.metrics, self.folder = metrics, folder
        self.schedule = NoiseSchedule(denoiser.config.schedule)
        self.tasks = [self._task(person) for person in audience.people]
        self.last = -1

    def _task(self, person: Shown) -> ViewTask:
        device = self.machine.device
        table = person.table.to(device)
        assert table.images is not None
        means, stds = encode_all(self.autoencoder, table.images, 8)
        table = replace(table, means=means, stds=stds)
        return ViewTask(table, person.mattes.to(device), [0], list(range(1, len(table))))

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Writes an entry and a picture, once per step."""
        if step == self.last or not self.tasks:
            return
        self.last = step
        made = [self._sample(task) for task in self.tasks]
        if self.audience.is_unseen:
            entry = {"phase": PHASE, "step": step, "loss": self.loss(), **self._quality(made)}
            add_record(self.metrics, entry)
            logger.info(
                "validation: step %d, loss %.4g, views %.2f dB, the reference itself %.2f dB",
                step, entry["loss"], entry["psnr"], entry["nearest_reference_psnr"],
            )  # fmt: skip
        rows = [_rows(task, views) for task, views in zip(self.tasks, made, strict=True)]
        write_image(self.folder / f"views_{step:07d}.png", np.concatenate(rows))

    def _sample(self, task: ViewTask) -> Tensor:
        config = self.denoiser.config
        with self.machine.autocast():
            made = sample_task(
                task, self.denoiser, self.autoencoder, self.schedule, config.views_per_call,
                self.settings.sample_steps, self.settings.sample_guidance,
                turned=self.settings.turned_cameras > 0,
            )  # fmt: skip
        return made.float()

    def _quality(self, made: Sequence[Tensor]) -> dict[str, float]:
        found, shown = [], []
        for task, views in zip(self.tasks, made, strict=True):
            truth, mattes = truth_of(task, task.generated), task.mattes[list(task.generated)]
            found.append(matte_psnr(views, truth, mattes))
            nearest = truth_of(task, nearest_reference(task))
            shown.append(matte_psnr(nearest, truth, mattes))
        return {
            "psnr": float(torch.cat(found).mean()),
            "nearest_reference_psnr": float(torch.cat(shown).mean()),
        }

    def loss(self) -> float:
        """Mean over batches that are the same whenever they are asked for."""
        table = FrameTable.cat([task.table for task in self.tasks])
        settings, config = self.settings, self.denoiser.config
        draws = DrawSettings(
            settings.reference_weights, 0.0, settings.frontal_first, settings.turned_cameras
        )
        objective = DenoisingLoss(
            self.schedule,
            settings.loss_weighting,
            settings.min_snr_gamma,
            settings.snr_floor,
        ).to(self.machine.device)
        of_batch = denoiser_loss(
            BatchSource(table, config, draws, seed=0, rank=-1),
            objective,
            len(self.tasks),
            self.machine.device,
        )
        network = DenoiserPass(self.denoiser)
        with self.machine.autocast():
            losses = [of_batch(network, number)["loss"] for number in range(LOSS_BATCHES)]
        return float(torch.stack(losses).mean())


def _rows(task: ViewTask, made: Tensor) -> NDArray[np.uint8]:
    """The reference and the made views above the true ones."""
    given = truth_of(task, task.references)
    upper = torch.cat([given, made])
    lower = torch.cat([torch.ones_like(given), truth_of(task, task.generated)])
    rows = torch.cat([torch.cat(list(row), -1) for row in (upper, lower)], -2)
    return (rows.clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
