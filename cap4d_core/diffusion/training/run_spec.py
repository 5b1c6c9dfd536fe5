"""What every process of a training run is told, and what both phases share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cap4d_core.diffusion.network_setup import choose_precision
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.records import forget_after
from cap4d_core.diffusion.training.trainer import Machine, Trainer
from cap4d_core.errors import DeadlineError
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.training_settings import OptimizerSettings, TrainingSettings

Network = TypeVar("Network", bound=nn.Module)

# Of these the result does not depend.
_WITHOUT_EFFECT = {
    "log_every", "checkpoint_every", "sample_every", "sample_steps", "sample_guidance",
}  # fmt: skip


@dataclass(frozen=True)
class RunSpec:
    """A training run; can be sent to other processes.

    Attributes:
        settings: of the section `training`.
        head_model_dir: folder written by prepare_head_model.
        folder: of everything that is kept between attempts.
        threads: CPU threads.
        make_perceptual: gives a frozen network that takes two batches (B, 3, H, W) in 0..1 and
            returns their distances (B,).
        callback: called after every step, by the first process.
    """

    settings: TrainingSettings
    head_model_dir: Path
    folder: Path
    threads: int = 1
    make_perceptual: Callable[[], nn.Module] | None = None
    callback: ProgressCallback | None = None

    @property
    def metrics(self) -> Path:
        """Entries of this and earlier attempts."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Pictures made on the way."""
        return self.folder / "samples"

    def machine(self, group: Group, device: torch.device) -> Machine:
        """How to compute."""
        precision = choose_precision(self.settings.precision, device)
        return Machine(
            device,
            mixed_precision=precision == "bf16",
            compile=self.settings.compile and device.type == "cuda",
            group=group,
        )

    def identity(self, settings: OptimizerSettings, *others: str) -> str:
        """What trained weights depend on, whatever machine they were made on."""
        relevant = settings.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        content = json.dumps([relevant, self.settings.seed, *others])
        return hashlib.sha256(content.encode()).hexdigest()


def fingerprint(identity: str, machine: Machine) -> str:
    """What a resumable state must have been made with."""
    return f"{identity} {machine.mixed_precision} {machine.group.size}"


def stamp_of(path: str | None) -> str:
    """Changes when the weights at a path do: names, sizes and times of the files."""
    if path is None:
        return "none"
    place = Path(path)
    files: Iterable[Path] = sorted(place.rglob("*")) if place.is_dir() else [place]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def to_channels_last(network: Network, device: torch.device) -> Network:
    """The network on a device, its convolutions as GPUs like them best."""
    moved: Network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def resume(trainer: Trainer, spec: RunSpec, phases: Iterable[str]) -> None:
    """Takes up the state of an earlier attempt; entries after it are made again."""
    trainer.resume()
    if trainer.machine.group.is_first:
        forget_after(spec.metrics, set(phases), trainer.pace.step)
    trainer.machine.group.wait()


def run_to_end(
    trainer: Trainer,
    callback: ProgressCallback | None,
    sample: Callable[[int], None] | None,
    sample_every: int,
) -> None:
    """Trains until the end.

    Raises:
        DeadlineError: from the callback, which then ended the training; the state is saved.
    """
    stopped: list[DeadlineError] = []

    def report(progress: Progress) -> None:
        if callback is None or stopped:
            return
        try:
            callback(progress)
        except DeadlineError as error:
            # All processes leave the loop together, and save on the way out.
            stopped.append(error)
            trainer.pace.deadline = time.monotonic()

    is_done = trainer.run(report, sample, sample_every)
    if stopped and not is_done:
        raise stopped[0]
