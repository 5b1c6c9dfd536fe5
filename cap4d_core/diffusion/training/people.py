"""The people of a training run: tracked ones, procedural ones, and those only looked at."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cap4d_core.demo.family import sample_fit, subject_pool
from cap4d_core.demo.head import write_demo_head
from cap4d_core.demo.subject import Subject, make_subject
from cap4d_core.diffusion.conditioning import RendererTables
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.renderer_tables import head_model_tables
from cap4d_core.diffusion.training.demo_frames import TEXTURE_SIZE, DemoFrames
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.diffusion.training.tracked_frames import Recording, TrackedFrames, open_recording
from cap4d_core.errors import UserError
from cap4d_core.files.basic import sha256_file
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import MODEL_FILE, HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.training_settings import (
    FIRST_TRAINING_SEED,
    TrainingDataSettings,
    expand_folders,
)
from cap4d_core.versions import STAGE_VERSIONS

# Validation subjects of the demo family; below those that are trained on, above those that users
# are likely to name.
FIRST_VALIDATION_SEED = FIRST_TRAINING_SEED - 1_000
# People looked at, and those of the training data that are when there are no others.
MOST_SHOWN, FEWEST_SHOWN = 8, 2
DEMO_HEAD = "demo_head"
# Demo people waiting in memory per process that makes them.
WAITING = 8

# Pieces of a person's frames, with (n, H, W) uint8 mattes.
Parts = Iterator[tuple[FrameTable, Tensor]]


@dataclass(frozen=True)
class Person:
    """One subject.

    Attributes:
        name: for messages.
        key: changes when its frames do.
        parts: makes them; asked for once, in the order of the subjects.
    """

    name: str
    key: str
    parts: Callable[[], Parts]


class People:
    """Makes frames of people.

    Args:
        settings: who.
        config: sizes of the model.
        tables: what the start weights were trained with; None = the head model's.
        head_model_dir: folder written by prepare_head_model; of the tracked people.
        folder: where the demo head may be kept.
        device: where frames are made.
        threads: pictures read at once.

    Raises:
        UserError: tables and head model do not belong together.
    """

    def __init__(
        self,
        settings: TrainingDataSettings,
        config: MMDMConfig,
        tables: dict[str, Tensor] | None,
        head_model_dir: Path,
        folder: Path,
        device: torch.device,
        threads: int = 1,
    ) -> None:
        self.settings, self.config, self.given_tables = settings, config, tables
        self.head_model_dir, self.folder = head_model_dir, folder
        self.device, self.threads = device, threads

    @cached_property
    def tracked(self) -> TrackedFrames:
        """Makes frames of tracked people."""
        head = HeadModel.load(self.head_model_dir)
        template = load_flame_template(self.head_model_dir)
        if self.given_tables is None:
            tables = RendererTables.from_template(
                template.vertices, template.faces, template.head_vertex_ids
            )
        else:
            tables = RendererTables.from_weights(self.given_tables)
        self._check(tables, head)
        return TrackedFrames(
            head, tables, template.head_vertex_ids, self.config, self.device, self.threads
        )

    @cached_property
    def demo(self) -> DemoFrames:
        """Makes frames of demo people, on their own head model whatever the others'."""
        folder = self.folder / DEMO_HEAD
        if not (folder / "provenance.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as source:
                prepare_head_model(write_demo_head(source), None, folder)
        template = load_flame_template(folder)
        tables = RendererTables.from_template(
            template.vertices, template.faces, template.head_vertex_ids
        )
        head = HeadModel.load(folder)
        self._check(tables, head)
        return DemoFrames(head.to(self.device), tables, self.config, self.settings.demo_supersample)

    def _check(self, tables: RendererTables, head: HeadModel) -> None:
        positional = 6 * len(tables.frequencies)
        if positional != self.config.conditioning.positional_channels:
            raise UserError(
                f"training.model: {self.config.conditioning.positional_channels} positional "
                f"channels; the tables of the conditioning give {positional}."
            )
        if len(tables.props) != head.num_vertices:
            raise UserError(
                f"The start weights know {len(tables.props)} head vertices, the head model "
                f"{head.num_vertices}: training.start and head_model.path do not belong together."
            )

    def identity(self) -> str:
        """What all frames depend on besides their own sources."""
        tables = self.given_tables or {}
        content = {
            "image_size": self.config.image_size,
            "latent_size": self.config.latent_size,
            "conditioning": self.config.conditioning.model_dump(),
            "head": sha256_file(self.head_model_dir / MODEL_FILE) if self.settings.folders else "",
            "tables": {name: _digest(tensor) for name, tensor in sorted(tables.items())},
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    # Who -----------------------------------------------------------------------------------------

    def of_folders(self, folders: Sequence[str]) -> list[Person]:
        """Tracked people.

        Raises:
            UserError: a folder that cannot be used.
        """
        people = []
        for folder in folders:
            recording = open_recording(folder, self.settings)
            parts = partial(self._tracked_parts, recording)
            people.append(Person(str(folder), recording.key(), parts))
        return people

    def of_demo(self, seeds: Sequence[int], num_views: int, queue: SubjectQueue) -> list[Person]:
        """Demo people; their frames depend on their numbers only."""
        version = STAGE_VERSIONS["make_demo"]
        return [
            Person(
                f"demo person {seed}",
                f"demo {version} {seed} {num_views} {self.settings.demo_supersample}",
                partial(self._demo_parts, seed, num_views, queue),
            )
            for seed in seeds
        ]

    def training(self, queue: SubjectQueue) -> list[Person]:
        """All who are trained on: tracked ones, then demo ones, which the queue makes."""
        people = self.of_folders(expand_folders(self.settings.folders))
        return people + self.of_demo(queue.seeds, self.settings.demo_views, queue)

    def validation(self, num_views: int) -> list[Person]:
        """Those who are only looked at; demo people only where such are trained on."""
        data = self.settings
        folders = expand_folders(data.validation_folders, "training.data.validation_folders")
        count = data.demo_validation if data.demo_subjects else 0
        seeds = range(FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + count)
        demo = self.of_demo(seeds, num_views, SubjectQueue(seeds, 0))
        return self.of_folders(folders[:MOST_SHOWN]) + demo

    def some_of_training(self, num_views: int) -> list[Person]:
        """A few of those who are trained on."""
        folders = expand_folders(self.settings.folders)[:FEWEST_SHOWN]
        if folders:
            return self.of_folders(folders)
        first = self.settings.demo_first_seed
        seeds = range(first, first + min(FEWEST_SHOWN, self.settings.demo_subjects))
        return self.of_demo(seeds, num_views, SubjectQueue(seeds, 0))

    def conditioning_tables(self) -> dict[str, Tensor]:
        """Tables that go with the model: the start weights', else those that it was trained with.

        With tracked and demo people that is the tables of the tracked people's head model.
        """
        if self.given_tables is not None:
            return self.given_tables
        is_demo = not self.settings.folders
        return head_model_tables(self.folder / DEMO_HEAD if is_demo else self.head_model_dir)

    def _tracked_parts(self, recording: Recording) -> Parts:
        # Not before they are asked for: the head model need not exist for demo people alone.
        yield from self.tracked.parts(recording)

    def _demo_parts(self, seed: int, num_views: int, queue: SubjectQueue) -> Parts:
        subject = queue.take(seed)
        fit = sample_fit(subject.shape, num_views, np.random.default_rng([seed, 20]))
        table, mattes = self.demo.of_fit(subject, fit)
        yield table.to("cpu"), mattes.cpu()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


class SubjectQueue:
    """Demo people in the order of their numbers, some of them made ahead.

    Args:
        seeds: their numbers, ascending.
        processes: that make them; 0 = here, when asked for.
    """

    def __init__(self, seeds: Sequence[int], processes: int) -> None:
        self.seeds, self._processes = seeds, processes
        self._pool: Executor | None = None
        self._left: Iterator[int] = iter(())
        self._waiting: deque[tuple[int, Future[Subject]]] = deque()

    def take(self, seed: int) -> Subject:
        """A person; from the first one asked for on, those that follow are made ahead."""
        if not self._processes:
            return make_subject(seed, TEXTURE_SIZE)
        if self._pool is None:
            self._pool = subject_pool(self._processes)
            self._left = iter([s for s in self.seeds if s >= seed])
        while len(self._waiting) < WAITING * self._processes:
            following = next(self._left, None)
            if following is None:
                break
            made = self._pool.submit(make_subject, following, TEXTURE_SIZE)
            self._waiting.append((following, made))
        number, future = self._waiting.popleft()
        if number != seed:
            raise RuntimeError(f"demo person {number} came in place of {seed}")
        return future.result()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
