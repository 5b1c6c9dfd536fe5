"""The recipe of the demo weights: people, autoencoder, latents, denoiser, evaluation.

Run by `benchmarks/train_demo_weights.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from cap4d_core.demo.capture import reference_fit
from cap4d_core.demo.family import sample_fit, subject_pool
from cap4d_core.demo.head import write_demo_head
from cap4d_core.demo.subject import Subject, make_subject
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.checkpoint import save_mmdm
from cap4d_core.diffusion.conditioning import RendererTables
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.renderer_tables import head_model_tables
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training import view_quality
from cap4d_core.diffusion.training.autoencoder_training import (
    AutoencoderPass,
    autoencoder_loss,
    encode_all,
    reconstruction_psnr,
)
from cap4d_core.diffusion.training.batches import BatchSource, DrawSettings, TrainingBatch
from cap4d_core.diffusion.training.demo_frames import TEXTURE_SIZE, DemoFrames
from cap4d_core.diffusion.training.denoiser_pass import (
    DenoiserPass,
    Draws,
    denoiser_loss,
    initialise,
)
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.diffusion.training.launch import launch
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.trainer import LossFunction, Machine, Trainer
from cap4d_core.files.basic import read_safetensors, write_json, write_safetensors
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.training_settings import FIRST_TRAINING_SEED, TrainingSettings

RECIPE = Path(__file__).parents[2] / "cap4d_core" / "demo" / "weights" / "recipe.yaml"
logger = logging.getLogger("train_demo_weights")

# Subjects per file of prepared frames, and those there must be before the autoencoder starts.
PART = 256
FIRST_SUBJECTS = 48
# Files of prepared frames that the denoiser starts with.
FIRST_PARTS = 2
# Steps between which people who are ready are rendered, and most of them at a time. A person took
# as long as one step on an H200.
TAKE_EVERY = 8
TAKE_AT_ONCE = 4
# Numbers that each of several processes has for its people.
PEOPLE_OF_PROCESS = 100_000
# Largest file that --out may hold.
FILE_BYTES = 15 * 2**20


class Run:
    """What all phases share."""

    def __init__(self, arguments: argparse.Namespace, group: Group, device: torch.device) -> None:
        recipe = yaml.safe_load(Path(arguments.recipe).read_text("utf-8"))
        self.started = time.monotonic()
        self.deadline = self.started + arguments.seconds - arguments.reserve
        self.end = self.started + arguments.seconds
        self.is_last = arguments.last
        self.seconds: dict[str, float] = recipe["seconds"]
        data, denoiser = recipe["training"]["data"], recipe["training"]["denoiser"]
        for section, key, value in (
            (self.seconds, "denoiser", arguments.denoiser_seconds),
            (self.seconds, "data", arguments.data_seconds),
            (data, "demo_first_seed", arguments.first_seed),
            (data, "demo_subjects", arguments.subjects),
            (data, "processes", arguments.processes),
            (denoiser, "batch_size", arguments.batch_size),
            (denoiser, "learning_rate", arguments.learning_rate),
            (denoiser, "snr_floor", arguments.snr_floor),
        ):
            if value is not None:
                section[key] = value
        self.evaluation: dict[str, Any] = recipe["evaluation"]
        # Processes that train together make people of their own.
        data["demo_first_seed"] = data.get("demo_first_seed", FIRST_TRAINING_SEED)
        data["demo_first_seed"] += PEOPLE_OF_PROCESS * group.rank
        self.settings = TrainingSettings.model_validate(recipe["training"])
        assert self.settings.data is not None
        self.data = self.settings.data
        self.config = MMDMConfig.from_dict(self.settings.model)
        self.state, self.out = Path(arguments.state), Path(arguments.out)
        self.common = self.state
        if not group.is_first:
            self.state = self.state / f"process_{group.rank}"
        self.warm = WarmStart(Path(arguments.warm_start)) if arguments.warm_start else None
        self.device = device
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.backends.cudnn.benchmark = True
            # Convolutions only: TF32 products would move projected heads by half a pixel.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = True
        self.machine = Machine(
            self.device,
            mixed_precision=is_cuda,
            compile=self.settings.compile and is_cuda and not arguments.no_compile,
            group=group,
        )
        self.state.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.metrics = self.state / "metrics.jsonl"
        self.head_dir = self.state / "head_model"
        if not (self.head_dir / "provenance.json").is_file():
            write_demo_head(self.state / "head")
            prepare_head_model(self.state / "head", None, self.head_dir)
        template = load_flame_template(self.head_dir)
        tables = RendererTables.from_template(
            template.vertices, template.faces, template.head_vertex_ids
        )
        head = HeadModel.load(self.head_dir).to(self.device)
        self.frames = DemoFrames(head, tables, self.config, self.data.demo_supersample)
        self.mark("head model")

    def mark(self, what: str) -> None:
        """Logs how long this call took so far."""
        logger.info("%s: after %.1f s of this call.", what, time.monotonic() - self.started)

    def sync(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class WarmStart:
    """Weights to go on from: what an earlier call left in --out, or a finished model folder.

    Args:
        folder: with denoiser*.safetensors, autoencoder.safetensors and either metrics.json or
            config.json, provenance.json and history.json.

    Raises:
        SystemExit: files are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.denoiser: dict[str, Tensor] = {}
        for file in sorted(folder.glob("denoiser*.safetensors")):
            self.denoiser |= read_safetensors(file)[0]
        autoencoder = folder / "autoencoder.safetensors"
        if not self.denoiser or not autoencoder.is_file():
            raise SystemExit(f"{folder}: no denoiser*.safetensors with an autoencoder.safetensors.")
        self.autoencoder, metadata = read_safetensors(autoencoder)
        if (folder / "metrics.json").is_file():
            self.metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
            self.history = self.metrics.pop("history")
            self.scaling_factor = float(metadata["scaling_factor"])
        else:
            self.metrics = json.loads((folder / "provenance.json").read_text("utf-8"))["training"]
            self.history = json.loads((folder / "history.json").read_text("utf-8"))
            config = json.loads((folder / "config.json").read_text("utf-8"))["model"]
            self.scaling_factor = float(config["autoencoder"]["scaling_factor"])

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """What the runs before this one were: commands differ in people, rates and lengths."""
        names = ("people", "pictures", "denoiser_steps", "denoiser_seconds", "evaluation", "device")
        last = {name: self.metrics[name] for name in names if name in self.metrics}
        last |= {
            "demo_first_seed": self.metrics["recipe"]["data"]["demo_first_seed"],
            "denoiser": self.metrics["recipe"]["denoiser"],
        }
        return [*self.metrics.get("earlier", []), last]


# People ------------------------------------------------------------------------------------------


class People:
    """Frames of the people made so far; grows while worker processes make more."""

    def __init__(self, run: Run) -> None:
        self.run, self.data = run, run.data
        self.parts: list[FrameTable] = []
        self.writers: list[threading.Thread] = []
        self.pool: Executor | None = None
        while (file := self._file(len(self.parts))).is_file():
            self.parts.append(FrameTable.read(file)[0].to(run.device))
        self.done = (run.state / "frames" / "complete").is_file()
        self.num_subjects = sum(part.num_subjects for part in self.parts)
        self._open: list[FrameTable] = []
        capacity = self.data.demo_subjects * self.data.demo_views
        size = run.config.image_size
        self.images = torch.empty((capacity, 3, size, size), dtype=torch.uint8, device=run.device)
        self.filled = 0
        for part in self.parts:
            self._keep(part)
        if self.num_subjects:
            logger.info("%d people of an earlier call.", self.num_subjects)

    def _file(self, number: int) -> Path:
        return self.run.state / "frames" / f"part_{number:03d}.safetensors"

    def _keep(self, table: FrameTable) -> None:
        assert table.images is not None
        self.images[self.filled : self.filled + len(table)] = table.images
        self.filled += len(table)

    def start(self) -> None:
        """Starts the worker processes."""
        if self.done:
            return
        first = self.data.demo_first_seed + self.num_subjects
        last = self.data.demo_first_seed + self.data.demo_subjects
        self.pool = subject_pool(max(self.data.processes, 1))
        seeds = iter(range(first, last))
        self.seeds = seeds
        self.futures: deque[Future[Subject]] = deque()
        self.began = time.monotonic()
        self._submit()

    def _submit(self) -> None:
        # Not all at once: finished people wait in memory.
        while len(self.futures) < 40 * max(self.data.processes, 1):
            seed = next(self.seeds, None)
            if seed is None:
                return
            assert self.pool is not None
            self.futures.append(self.pool.submit(make_subject, seed, TEXTURE_SIZE))

    @property
    def is_ready(self) -> bool:
        """Whether the next person can be rendered, or the time for people is over."""
        return not self.done and (self._is_over() or self.futures[0].done())

    def _is_over(self) -> bool:
        used = time.monotonic() - self.began
        late = time.monotonic() >= self.run.deadline
        enough = self.num_subjects >= FIRST_SUBJECTS and used >= self.run.seconds["data"]
        # Those who are made already count: compiling can take longer than making people.
        return not self.futures or late or (enough and not self.futures[0].done())

    def take(self) -> None:
        """Renders the next person, or closes."""
        if self._is_over():
            self._close()
            return
        table = self.run.frames.random(self.futures.popleft().result(), self.data.demo_views)
        if time.monotonic() - self.began < self.run.seconds["data"]:
            self._submit()
        self.num_subjects += 1
        self._keep(table)
        self._open.append(table)
        if self.num_subjects % 100 == 0:
            used = time.monotonic() - self.began
            logger.info("%d people, %.1f pictures/s", self.num_subjects, self.filled / used)
        if len(self._open) == PART:
            self._write()

    def take_ready(self) -> None:
        """Renders some of those who wait."""
        for _ in range(TAKE_AT_ONCE):
            if self.is_ready:
                self.take()

    def _write(self) -> None:
        part = FrameTable.cat(self._open)
        self._open = []
        file = self._file(len(self.parts))
        self.parts.append(part)
        if self.run.is_last:
            return  # no call will read it
        on_host = part.to("cpu")
        writer = threading.Thread(target=on_host.write, args=(file,))
        writer.start()
        self.writers.append(writer)

    def _close(self) -> None:
        late = time.monotonic() >= self.run.deadline and bool(self.futures)
        if self._open:
            self._write()
        self.done = True
        self.flush()
        if not late and not self.run.is_last:
            (self.run.state / "frames" / "complete").touch()
        self.run.mark(f"{self.num_subjects} people, {self.filled} pictures")

    def stop(self) -> None:
        """Ends the workers and waits for the files."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.flush()

    def flush(self) -> None:
        """Waits for the files."""
        for writer in self.writers:
            writer.join()
        self.writers = []

    def pictures(self) -> Tensor:
        """(N, 3, H, W) pictures so far."""
        return self.images[: self.filled]


# Networks ----------------------------------------------------------------------------------------


def fingerprint(run: Run, part: str) -> str:
    return json.dumps([part, run.settings.seed, run.settings.model, torch.__version__])


def train_autoencoder(run: Run, people: People) -> Autoencoder:
    """The trained autoencoder (averaged weights), with its scaling factor."""
    final = run.state / "autoencoder.safetensors"
    if run.warm is not None:
        return given_autoencoder(run, run.warm.autoencoder, run.warm.scaling_factor)
    if final.is_file():
        tensors, metadata = read_safetensors(final)
        return given_autoencoder(run, tensors, float(metadata["scaling_factor"]))

    settings = run.settings.autoencoder
    torch.manual_seed(run.settings.seed)
    autoencoder = Autoencoder(run.config.autoencoder).to(
        run.device, memory_format=torch.channels_last
    )
    trainer = Trainer(
        "autoencoder",
        AutoencoderPass(autoencoder),
        autoencoder_loss(people.pictures, autoencoder, settings, run.settings.seed),
        settings,
        run.machine,
        Pace(settings, run.seconds["autoencoder"], run.deadline),
        run.state / "autoencoder.pt",
        run.metrics,
        fingerprint(run, "autoencoder"),
    )
    trainer.resume()
    while not people.done:
        if people.num_subjects < FIRST_SUBJECTS or trainer.pace.is_slice_over:
            people.take()
            continue
        # Some people, some steps: rendering everybody who waits would leave no time to train.
        taken_at = trainer.pace.step
        people.take_ready()
        trainer.run(
            is_interrupted=lambda at=taken_at: (
                people.is_ready and trainer.pace.step >= at + TAKE_EVERY
            )
        )
    trainer.run()
    run.sync()
    run.mark(f"autoencoder at {100 * trainer.pace.progress:.0f} %")
    plain = Autoencoder(run.config.autoencoder).to(run.device, memory_format=torch.channels_last)
    plain.vae.load_state_dict(
        {k.removeprefix("vae."): t for k, t in trainer.average.state().items()}
    )
    plain.eval().requires_grad_(False)
    means, _ = encode_all(plain, people.pictures()[:: max(1, people.filled // 4096)])
    factor = 1.0 / float(means.float().std())
    plain.config = plain.config.model_copy(update={"scaling_factor": factor})
    logger.info("latents have a deviation of %.3f", 1.0 / factor)
    if trainer.pace.is_done:
        metadata = {"scaling_factor": repr(factor)}
        write_safetensors(final, plain.vae.state_dict(), metadata)
    return plain


def given_autoencoder(run: Run, tensors: dict[str, Tensor], factor: float) -> Autoencoder:
    """A trained autoencoder on the device of the run."""
    config = run.config.autoencoder.model_copy(update={"scaling_factor": factor})
    autoencoder = Autoencoder(config).to(run.device, memory_format=torch.channels_last)
    autoencoder.vae.load_state_dict({k: t.float() for k, t in tensors.items()})
    return autoencoder.eval().requires_grad_(False)


class GrowingSource:
    """Batches from the people so far; asked at every batch, so that their number may grow.

    Args:
        run: the run.
        people: whose files of frames are taken up as they are completed.
        config: with the scaling factor of the autoencoder.
        autoencoder: encodes the pictures.
    """

    def __init__(
        self, run: Run, people: People, config: MMDMConfig, autoencoder: Autoencoder
    ) -> None:
        self.run, self.people, self.config = run, people, config
        self.autoencoder = autoencoder
        self.encoded: list[FrameTable] = []
        self.source: BatchSource | None = None

    def draw(self, number: int, batch_size: int) -> TrainingBatch:
        """Batch `number`."""
        # All processes at the same steps, because they wait for one another at every step.
        if number % TAKE_EVERY == 0:
            self.people.take_ready()
        if self.source is None or len(self.people.parts) > len(self.encoded):
            for part in self.people.parts[len(self.encoded) :]:
                assert part.images is not None
                means, stds = encode_all(self.autoencoder, part.images)
                self.encoded.append(replace(part, images=None, means=means, stds=stds))
            self.source = batch_source(self.run, FrameTable.cat(self.encoded), self.config)
        return self.source.draw(number, batch_size)


def batch_source(run: Run, table: FrameTable, config: MMDMConfig) -> BatchSource:
    """Batches from a finished table."""
    settings = run.settings.denoiser
    draws = DrawSettings(
        settings.reference_weights,
        settings.dropout,
        settings.frontal_first,
        settings.turned_cameras,
    )
    return BatchSource(table, config, draws, run.settings.seed, run.machine.group.rank)


def denoiser_trainer(run: Run, source: Draws, config: MMDMConfig) -> Trainer:
    """A fresh trainer of the denoiser; compiled, where it is, on made-up data."""
    settings = run.settings.denoiser
    torch.manual_seed(run.settings.seed)
    denoiser = MMDMDenoiser(config)
    initialise(denoiser)
    denoiser = denoiser.to(run.device, memory_format=torch.channels_last)
    objective = DenoisingLoss(
        NoiseSchedule(config.schedule),
        settings.loss_weighting,
        settings.min_snr_gamma,
        settings.snr_floor,
    ).to(run.device)

    def loss_on(draws: Draws) -> LossFunction:
        return denoiser_loss(draws, objective, settings.batch_size, run.device)

    trainer = Trainer(
        "denoiser",
        DenoiserPass(denoiser),
        loss_on(batch_source(run, made_up_table(config, run.device), config)),
        settings,
        run.machine,
        Pace(settings, run.seconds["denoiser"], run.deadline),
        run.common / "denoiser.pt",
        run.metrics if run.machine.group.is_first else None,
        fingerprint(run, "denoiser"),
    )
    if run.machine.compile:
        # A minute or two, in which other processes make people.
        with run.machine.autocast():
            terms = trainer.loss(trainer.network, 0)
        terms["loss"].backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        run.sync()
        run.mark("denoiser compiled")
    trainer.loss = loss_on(source)
    return trainer


def made_up_table(config: MMDMConfig, device: torch.device) -> FrameTable:
    """Frames of two people as the compiler may see them: shapes and types are right."""
    n, size, channels = 2 * config.views_per_call, config.latent_size, config.in_channels
    eye = torch.eye(3, device=device).expand(n, 3, 3)
    return FrameTable(
        surface=torch.zeros(n, size, size, config.condition_channels - 5, device=device).half(),
        crop_masks=torch.ones(n, size, size, dtype=torch.uint8, device=device),
        intrinsics=torch.ones(n, 4, device=device),
        cameras=eye,
        heads=eye,
        starts=torch.tensor([0, n // 2, n]),
        means=torch.zeros(n, channels, size, size, device=device).half(),
        stds=torch.zeros(n, channels, size, size, device=device).half(),
    )


def train_denoiser(
    run: Run, people: People, config: MMDMConfig, autoencoder: Autoencoder
) -> Trainer:
    """The trainer after this call's share of the training."""
    trainer = denoiser_trainer(run, GrowingSource(run, people, config, autoencoder), config)
    while not people.done and len(people.parts) < FIRST_PARTS:
        people.take()
    if not trainer.resume() and run.warm is not None:
        warm_start(run.warm, trainer)
    if run.is_last:
        left = max(run.deadline - time.monotonic(), 1.0)
        (left,) = run.machine.group.agree([left], run.device)
        trainer.pace.total_seconds = trainer.pace.elapsed + left
    run.mark("first people")
    trainer.run(
        sample=lambda step: write_results(run, trainer, autoencoder),
        sample_every=run.settings.denoiser.sample_every,
    )
    run.sync()
    run.mark(f"denoiser at step {trainer.pace.step}, {100 * trainer.pace.progress:.0f} %")
    return trainer


def warm_start(warm: WarmStart, trainer: Trainer) -> None:
    """Goes on from averaged weights alone, with a warm-up and a decay of its own."""
    state = {f"denoiser.{name}": tensor.float() for name, tensor in warm.denoiser.items()}
    trainer.module.load_state_dict(state)
    trainer.average.load(state, 10_000)
    pace = trainer.pace
    pace.step = pace.first_step = warm.metrics["denoiser_steps"]
    pace.seconds = pace.first_seconds = warm.metrics["denoiser_seconds"]
    logger.info("denoiser: averaged weights of step %d taken over.", pace.step)


# Evaluation --------------------------------------------------------------------------------------


def evaluation_tasks(run: Run, autoencoder: Autoencoder, count: int) -> list[view_quality.ViewTask]:
    """For each unseen person the demo's first four photos and views away from all of them."""
    tasks = []
    for i in range(count):
        seed = run.evaluation["first_seed"] + i
        subject = make_subject(seed, TEXTURE_SIZE)
        given = reference_fit(seed, 4)
        others = sample_fit(subject.shape, 4 * run.evaluation["views"], np.random.default_rng(seed))
        table, mattes = run.frames.of_fit(subject, joined(given, others))
        assert table.images is not None
        means, stds = encode_all(autoencoder, table.images)
        table = replace(table, means=means, stds=stds)
        angles = view_quality.angles_to_references(table, range(4)).tolist()
        far = [k for k in range(4, len(table)) if angles[k] >= 10][: run.evaluation["views"]]
        tasks.append(view_quality.ViewTask(table, mattes, range(4), far))
    return tasks


def joined(first: Tracking, second: Tracking) -> Tracking:
    names = ("expr", "rot", "tra", "eye_rot", "neck_rot")
    return replace(
        first, **{n: np.concatenate([getattr(first, n), getattr(second, n)]) for n in names}
    )


def evaluate(
    run: Run,
    tasks: list[view_quality.ViewTask],
    denoiser: MMDMDenoiser,
    autoencoder: Autoencoder,
    references: int,
    guidance: float,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """PSNR of views from so many references, with the sampler of the pipeline; pictures."""
    schedule = NoiseSchedule(denoiser.config.schedule)
    found, base, round_trip, rows = [], [], [], []
    for task in tasks:
        task = replace(task, references=list(task.references)[:references])
        with run.machine.autocast():
            made = view_quality.sample_task(
                task,
                denoiser,
                autoencoder,
                schedule,
                denoiser.config.views_per_call,
                run.evaluation["steps"],
                guidance,
                8,
            )
        made = made.float()
        truth = view_quality.truth_of(task, task.generated)
        mattes = task.mattes[list(task.generated)]
        found.append(view_quality.matte_psnr(made, truth, mattes).mean().item())
        nearest = view_quality.truth_of(task, view_quality.nearest_reference(task))
        base.append(view_quality.matte_psnr(nearest, truth, mattes).mean().item())
        assert task.table.means is not None
        latents = task.table.means[list(task.generated)].float() * autoencoder.config.scaling_factor
        decoded = (autoencoder.decode(latents, 32) / 2 + 0.5).clamp(0, 1)
        round_trip.append(view_quality.matte_psnr(decoded, truth, mattes).mean().item())
        given = view_quality.truth_of(task, list(task.references)[:1])
        rows.append(sheet_rows(given, made, truth))
    report = {
        "references": references,
        "guidance": guidance,
        "psnr": round(float(np.mean(found)), 3),
        "psnr_per_subject": [round(v, 2) for v in found],
        "nearest_reference_psnr": round(float(np.mean(base)), 3),
        "autoencoder_psnr": round(float(np.mean(round_trip)), 3),
    }
    logger.info("evaluation: %s", json.dumps(report))
    return report, rows


def sheet_rows(given: Tensor, made: Tensor, truth: Tensor, count: int = 7) -> np.ndarray:
    """Made views above the true ones, the first reference to the left."""
    blank = torch.ones_like(given)
    upper = torch.cat([given, made[:count]])
    lower = torch.cat([blank, truth[:count]])
    rows = torch.cat([torch.cat(list(row), -1) for row in (upper, lower)], -2)
    return (rows.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)


# Results -----------------------------------------------------------------------------------------


def write_results(run: Run, trainer: Trainer | None, autoencoder: Autoencoder) -> None:
    """What this call leaves in --out before anything slow."""
    if not run.machine.group.is_first:
        return
    stored = {k: t.to(torch.bfloat16) for k, t in autoencoder.vae.state_dict().items()}
    factor = repr(autoencoder.config.scaling_factor)
    write_safetensors(run.out / "autoencoder.safetensors", stored, {"scaling_factor": factor})
    if trainer is None:
        return
    part: dict[str, Tensor] = {}
    number, size = 0, 0
    for name, tensor in trainer.average.state().items():
        small = tensor.to(torch.bfloat16).cpu()
        if part and size + small.numel() * 2 > FILE_BYTES:
            write_safetensors(run.out / f"denoiser_{number}.safetensors", part)
            part, number, size = {}, number + 1, 0
        part[name.removeprefix("denoiser.")] = small
        size += small.numel() * 2
    write_safetensors(run.out / f"denoiser_{number}.safetensors", part)


def write_metrics(run: Run, trainer: Trainer | None, results: dict[str, Any]) -> None:
    history = run.warm.history.copy() if run.warm is not None else []
    if run.metrics.is_file():
        history += [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    every = max(1, len(history) // 600)
    content = {
        "model": run.config.to_dict(),
        "recipe": run.settings.model_dump(mode="json"),
        "seconds": run.seconds,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        **results,
        "history": history[::every],
    }
    if run.warm is not None:
        content["earlier"] = run.warm.earlier
    if trainer is not None:
        content |= {
            "denoiser_steps": trainer.pace.step,
            "denoiser_seconds": trainer.pace.elapsed,
        }
    write_json(run.out / "metrics.json", content)
    draw_curves(run.out / "curve.png", history)


def draw_curves(path: Path, history: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, phase, term in zip(axes, ("autoencoder", "denoiser"), ("mse", "loss"), strict=True):
        entries = [entry for entry in history if entry["phase"] == phase]
        axis.plot([e["step"] for e in entries], [e[term] for e in entries], lw=0.8)
        axis.set(title=phase, xlabel="step", ylabel=term, yscale="log")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def assemble(source: Path, target: Path) -> None:
    """Makes the folder of weights from what the last call left in --out."""
    metrics = json.loads((source / "metrics.json").read_text("utf-8"))
    config = MMDMConfig.from_dict(metrics["model"])
    denoiser, autoencoder = MMDMDenoiser(config), Autoencoder(config.autoencoder)
    state: dict[str, Tensor] = {}
    for file in sorted(source.glob("denoiser_*.safetensors")):
        state |= read_safetensors(file)[0]
    denoiser.load_state_dict(state)
    autoencoder.vae.load_state_dict(read_safetensors(source / "autoencoder.safetensors")[0])
    head = target / "head.tmp"
    write_demo_head(head / "source")
    prepare_head_model(head / "source", None, head / "prepared")
    tables = head_model_tables(head / "prepared")
    shutil.rmtree(head)
    history = metrics.pop("history")
    provenance = {
        "source": {"name": "demo", "recipe": "recipe.yaml"},
        "training": metrics,
    }
    save_mmdm(target, denoiser, autoencoder, tables, provenance, "bf16", "bf16")
    write_json(target / "history.json", history)
    for name in ("curve.png", "samples.png"):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def work(run: Run) -> None:
    people = People(run)
    people.start()
    try:
        autoencoder = train_autoencoder(run, people)
    except BaseException:
        people.stop()
        raise
    results: dict[str, Any] = {"people": people.num_subjects, "pictures": people.filled}
    write_results(run, None, autoencoder)
    is_first = run.machine.group.is_first
    count = run.evaluation["subjects"] if is_first else 1
    tasks = evaluation_tasks(run, autoencoder, count)
    held_out = torch.cat([t.table.images for t in tasks if t.table.images is not None])
    results["autoencoder_psnr_unseen"] = round(reconstruction_psnr(autoencoder, held_out), 3)
    logger.info("autoencoder: %.2f dB on unseen people", results["autoencoder_psnr_unseen"])
    run.config = run.config.model_copy(update={"autoencoder": autoencoder.config})
    is_ready = (run.state / "autoencoder.safetensors").is_file() or run.warm is not None
    if not is_ready or time.monotonic() > run.deadline - 5:
        people.stop()
        if is_first:
            write_metrics(run, None, results)
        logger.info("stopped before the denoiser; call again to go on.")
        return
    try:
        trainer = train_denoiser(run, people, run.config, autoencoder)
    finally:
        people.stop()
    results |= {"people": people.num_subjects, "pictures": people.filled}
    if not is_first:
        return
    write_results(run, trainer, autoencoder)
    write_metrics(run, trainer, results)
    run.mark("results")
    denoiser = trainer.module.denoiser
    assert isinstance(denoiser, MMDMDenoiser)
    first, *others = run.evaluation["guidance"]
    plan = [(1, first), (4, first), *((1, g) for g in others)]
    results["evaluation"] = []
    slowest = 0.0
    with trainer.averaged():
        for references, guidance in plan:
            if time.monotonic() + 1.2 * slowest > run.end - 8:
                break
            began = time.monotonic()
            report, rows = evaluate(run, tasks, denoiser, autoencoder, references, guidance)
            slowest = max(slowest, time.monotonic() - began)
            results["evaluation"].append(report)
            if (references, guidance) == plan[0]:
                write_image(run.out / "samples.png", np.concatenate(rows[:6]))
            elif references == 4:
                write_image(run.out / "samples_4.png", np.concatenate(rows[:6]))
    write_metrics(run, trainer, results)
    run.mark("end")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], prog="train_demo_weights.py"
    )
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--state", default="/tmp/train_state", help="kept between calls")
    parser.add_argument("--out", default="training_out", help="results of this call")
    parser.add_argument("--seconds", type=float, default=580, help="length of this call")
    parser.add_argument("--reserve", type=float, default=60, help="of it, for the evaluation")
    parser.add_argument("--denoiser-seconds", type=float, help="over all calls; else the recipe's")
    parser.add_argument("--last", action="store_true", help="the rate ends at zero in this call")
    parser.add_argument(
        "--warm-start", help="go on from weights: what a call left in --out, or a model folder"
    )
    parser.add_argument("--data-seconds", type=float, help="making people; else the recipe's")
    parser.add_argument("--first-seed", type=int, help="number of the first person")
    parser.add_argument("--subjects", type=int, help="most people")
    parser.add_argument("--processes", type=int, help="that make people")
    parser.add_argument("--batch-size", type=int, help="of the denoiser")
    parser.add_argument("--learning-rate", type=float, help="of the denoiser")
    parser.add_argument("--snr-floor", type=float, help="of the denoiser")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes that go on from --warm-start together"
    )
    parser.add_argument("--assemble", nargs=2, metavar=("OUT", "WEIGHTS"))
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout, datefmt="%H:%M:%S"
    )
    if arguments.assemble:
        assemble(*(Path(p) for p in arguments.assemble))
        return
    if arguments.gpus > 1 and not arguments.warm_start:
        parser.error("--gpus needs --warm-start: the autoencoder is trained on one")
    threads = os.cpu_count() or 1
    launch(process, (arguments,), arguments.gpus, chosen_device(), threads)


def process(group: Group, device: torch.device, arguments: argparse.Namespace) -> None:
    """One of those that train together."""
    work(Run(arguments, group, device))


def chosen_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
