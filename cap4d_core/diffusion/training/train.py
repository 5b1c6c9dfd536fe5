"""Training of a multi-view diffusion model from data to a model folder (rule train_mmdm).

    {output}/model/          a model folder, as mmdm.path takes it
    {output}/metrics.jsonl   losses and measured quality
    {output}/curve.png       the same, drawn
    {output}/samples.png     views by the trained model, of people it was not trained on if possible
    {output}/checkpoints/    everything that a later attempt goes on from

Phases: frames of all people; the autoencoder, where it is to be trained; latents; the denoiser.
Each leaves files, so a killed run goes on in the middle of the phase in which it was.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cap4d_core
from cap4d_core.diffusion.checkpoint import save_mmdm
from cap4d_core.diffusion.training.autoencoder_phase import (
    autoencoder_identity,
    train_autoencoder,
)
from cap4d_core.diffusion.training.denoiser_phase import train_denoiser, trained_denoiser
from cap4d_core.diffusion.training.launch import launch
from cap4d_core.diffusion.training.people import People
from cap4d_core.diffusion.training.preparation import (
    existing_frames,
    keep_autoencoder,
    kept_autoencoder,
    prepare_frames,
    prepare_latents,
)
from cap4d_core.diffusion.training.records import draw_curves, read_records
from cap4d_core.diffusion.training.run_spec import RunSpec, stamp_of
from cap4d_core.diffusion.training.start_weights import Source, Start, given_autoencoder, read_start
from cap4d_core.diffusion.training.validation import Audience, find_audience
from cap4d_core.errors import UserError
from cap4d_core.progress import ProgressCallback
from cap4d_core.training_settings import TrainingSettings

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# Resumable states, removed once the result is written: four times the size of the networks.
STATES = ("autoencoder.pt", "denoiser.pt")


def train_mmdm(
    settings: TrainingSettings,
    head_model_dir: str | Path,
    output_dir: str | Path,
    *,
    device: torch.device | str = "cpu",
    num_processes: int = 1,
    threads: int = 1,
    make_perceptual: Callable[[], nn.Module] | None = None,
    callback: ProgressCallback | None = None,
) -> None:
    """Trains a model, or goes on where an earlier attempt stopped.

    Args:
        settings: of the section `training`.
        head_model_dir: folder written by prepare_head_model.
        output_dir: see the top of this file.
        device: `cuda` or `cpu`.
        num_processes: processes that train together, one per GPU; on the CPU they share the cores.
        threads: CPU threads of all together.
        make_perceptual: see `RunSpec`.
        callback: called after every person and every step.

    Raises:
        UserError: settings, data or start weights that cannot be used.
        DivergedError: a loss that is not finite.
        DeadlineError: from `callback`; what was done is kept.
    """
    if settings.data is None:
        raise UserError(
            "training.data: say what to train on: folders of tracked people, or demo_subjects."
        )
    head_model_dir, output_dir = Path(head_model_dir), Path(output_dir)
    device = torch.device(device)
    folder = output_dir / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    spec = RunSpec(settings, head_model_dir, folder, threads, make_perceptual, callback)
    start = read_start(settings)
    _check_views(settings, start)
    data = settings.data
    people = People(
        data, start.config, start.tables, head_model_dir, folder, device, max(threads, 1)
    )
    find = cache(partial(find_audience, people, start.config.views_per_call))
    logger.info("%d process(es) on %s.", num_processes, device.type)
    if settings.train_autoencoder:
        _make_autoencoder(spec, people, find, num_processes, device)
    else:
        _take_autoencoder(spec, start, people, device)
    if trained_denoiser(spec) is None:
        audience = find()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        launch(train_denoiser, (spec, audience), num_processes, device, threads)
    else:
        logger.info("The denoiser is trained already.")
    _write_results(spec, start, people, output_dir)


def _check_views(settings: TrainingSettings, start: Start) -> None:
    references, views = len(settings.denoiser.reference_weights), start.config.views_per_call
    if references >= views:
        raise UserError(
            f"training.denoiser.reference_weights: {references} entries for calls of {views} "
            "views: at least one view must be generated. Shorten the list, or raise "
            "training.model.views_per_call."
        )


def _take_autoencoder(spec: RunSpec, start: Start, people: People, device: torch.device) -> None:
    """A given autoencoder: pictures are encoded as they come, and not kept."""
    source = spec.settings.autoencoder_start or spec.settings.start
    identity = f"given {stamp_of(source)} {start.config.autoencoder.model_dump_json()}"
    autoencoder = kept_autoencoder(spec.folder, identity)
    if autoencoder is None:
        autoencoder = given_autoencoder(start)
        keep_autoencoder(spec.folder, autoencoder, identity)
    prepare_frames(people, spec.folder, autoencoder.to(device), spec.callback)


def _make_autoencoder(
    spec: RunSpec,
    people: People,
    find: Callable[[], Audience],
    num_processes: int,
    device: torch.device,
) -> None:
    """Trains the autoencoder, unless that is done, and encodes everything with it."""
    frames = prepare_frames(people, spec.folder, None, spec.callback)
    autoencoder = kept_autoencoder(spec.folder, autoencoder_identity(spec))
    if autoencoder is None:
        audience = find()
        shown = [p.table.images for p in audience.people if p.table.images is not None]
        arguments = (spec, shown if audience.is_unseen else [])
        launch(train_autoencoder, arguments, num_processes, device, spec.threads)
        autoencoder = kept_autoencoder(spec.folder)
        assert autoencoder is not None
    prepare_latents(spec.folder, frames, autoencoder.to(device), spec.callback)


def _write_results(spec: RunSpec, start: Start, people: People, output_dir: Path) -> None:
    trained, autoencoder = trained_denoiser(spec), kept_autoencoder(spec.folder)
    assert trained is not None and autoencoder is not None
    denoiser, notes = trained
    records = read_records(spec.metrics)
    stored = spec.settings.stored_dtype
    save_mmdm(
        output_dir / "model",
        denoiser,
        autoencoder,
        people.conditioning_tables(),
        _provenance(spec, start, notes, records),
        stored,
        stored,
    )
    shutil.copyfile(spec.metrics, output_dir / "metrics.jsonl")
    draw_curves(output_dir / "curve.png", records)
    shutil.copyfile(max(spec.samples.glob("views_*.png")), output_dir / "samples.png")
    for name in STATES:
        (spec.folder / name).unlink(missing_ok=True)
    logger.info("Model written to %s; use it as mmdm.path.", output_dir / "model")


def _provenance(
    spec: RunSpec, start: Start, notes: Mapping[str, str], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """How the model came about, without names of people and places."""
    frames = existing_frames(spec.folder)
    settings = spec.settings.model_dump(mode="json")
    assert spec.settings.data is not None
    settings["data"] |= {
        name: len(getattr(spec.settings.data, name)) for name in ("folders", "validation_folders")
    }
    settings |= {"start": None, "autoencoder_start": None}

    def from_where(source: Source | None) -> str:
        return "scratch" if source is None else source.kind

    return {
        "source": {"name": f"trained: {spec.settings.name}"},
        "training": {
            "started_from": {
                "denoiser": from_where(start.denoiser),
                "autoencoder": from_where(start.autoencoder),
            },
            "people": len(frames.keys),
            "frames": len(frames),
            "steps": int(notes["steps"]),
            "denoiser_seconds": round(float(notes["seconds"]), 1),
            "last": {entry["phase"]: entry for entry in records},
            "settings": settings,
            "versions": {"cap4d_core": cap4d_core.__version__, "torch": torch.__version__},
        },
    }
