"""Second phase of a run: training of the denoiser on prepared latents."""

from __future__ import annotations

import logging

import torch

from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training.batches import BatchSource, DrawSettings
from cap4d_core.diffusion.training.denoiser_pass import DenoiserPass, Draws, denoiser_loss
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.diffusion.training.prefetch import Prefetcher
from cap4d_core.diffusion.training.preparation import (
    autoencoder_file,
    existing_frames,
    kept_autoencoder,
    latent_table,
    placed,
    table_bytes,
)
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.run_spec import (
    RunSpec,
    fingerprint,
    resume,
    run_to_end,
    stamp_of,
    to_channels_last,
)
from cap4d_core.diffusion.training.start_weights import read_start, start_denoiser
from cap4d_core.diffusion.training.trainer import Machine, Trainer
from cap4d_core.diffusion.training.validation import PHASE as VALIDATION
from cap4d_core.diffusion.training.validation import Audience, Validation
from cap4d_core.files.basic import read_safetensors, sha256_file, write_safetensors

logger = logging.getLogger(__name__)

PHASE = "denoiser"
RESULT = "denoiser.safetensors"


def denoiser_identity(spec: RunSpec, config: MMDMConfig) -> str:
    """What the trained denoiser depends on."""
    frames = existing_frames(spec.folder)
    return spec.identity(
        spec.settings.denoiser,
        config.model_dump_json(),
        stamp_of(spec.settings.start),
        sha256_file(autoencoder_file(spec.folder)),
        frames.belongs_to,
        *frames.keys,
    )


def train_denoiser(group: Group, device: torch.device, spec: RunSpec, audience: Audience) -> None:
    """Trains the denoiser and keeps its averaged weights; run by every process.

    Args:
        group: this process among all.
        device: of this process.
        spec: the run.
        audience: whom to look at on the way.

    Raises:
        UserError: what settings or data make impossible.
        DeadlineError: from the callback; the state is saved.
    """
    settings = spec.settings.denoiser
    autoencoder = kept_autoencoder(spec.folder)
    assert autoencoder is not None
    start = read_start(spec.settings, autoencoder.config)
    machine = spec.machine(group, device)
    denoiser = start_denoiser(start, spec.settings.seed)
    denoiser = to_channels_last(denoiser, device)
    draws = _draws(spec, start.config, machine)
    identity = denoiser_identity(spec, start.config)
    trainer = _trainer(spec, denoiser, draws, machine, identity)
    resume(trainer, spec, (PHASE, VALIDATION))
    look = None
    if group.is_first:
        look = Validation(
            audience, autoencoder.to(device), denoiser, settings, machine, spec.metrics,
            spec.samples,
        )  # fmt: skip
    callback = spec.callback if group.is_first else None
    try:
        run_to_end(trainer, callback, look, settings.sample_every)
    finally:
        if isinstance(draws, Prefetcher):
            draws.close()
    if look is not None:
        with trainer.averaged():
            look(trainer.pace.step)
        kept = {k.removeprefix("denoiser."): t for k, t in trainer.average.state().items()}
        metadata = {
            "belongs_to": identity,
            "config": start.config.model_dump_json(),
            "steps": str(trainer.pace.step),
            "seconds": repr(trainer.pace.seconds),
        }
        write_safetensors(spec.folder / RESULT, kept, metadata)


def trained_denoiser(spec: RunSpec) -> tuple[MMDMDenoiser, dict[str, str]] | None:
    """What `train_denoiser` kept, and notes on it: config, steps, seconds.

    None if it is not trained yet, or was with other settings or data.
    """
    autoencoder = kept_autoencoder(spec.folder)
    if autoencoder is None or not (spec.folder / RESULT).is_file():
        return None
    config = read_start(spec.settings, autoencoder.config).config
    tensors, metadata = read_safetensors(spec.folder / RESULT, "a trained denoiser")
    if metadata.get("belongs_to") != denoiser_identity(spec, config):
        return None
    denoiser = MMDMDenoiser(MMDMConfig.model_validate_json(metadata["config"]))
    denoiser.load_state_dict(tensors)
    return denoiser.eval().requires_grad_(False), metadata


def _draws(spec: RunSpec, config: MMDMConfig, machine: Machine) -> Draws:
    settings, table = spec.settings.denoiser, latent_table(spec.folder)
    place = placed(table_bytes(table), spec.settings.keep_data_on, machine.device)
    source = BatchSource(
        table if place.type == "cpu" else table.to(place),
        config,
        DrawSettings(
            settings.reference_weights, settings.dropout, settings.frontal_first,
            settings.turned_cameras,
        ),
        spec.settings.seed,
        machine.group.rank,
    )  # fmt: skip
    logger.info(
        "%d frames of %d people, %.2f GB, are drawn from %s.",
        len(table), table.num_subjects, table_bytes(table) / 1e9,
        "the GPU" if place.type == "cuda" else "mapped files",
    )  # fmt: skip
    return source if place == machine.device else Prefetcher(source)


def _trainer(
    spec: RunSpec, denoiser: MMDMDenoiser, draws: Draws, machine: Machine, identity: str
) -> Trainer:
    settings = spec.settings.denoiser
    objective = DenoisingLoss(
        NoiseSchedule(denoiser.config.schedule),
        settings.loss_weighting,
        settings.min_snr_gamma,
        settings.snr_floor,
    ).to(machine.device)
    return Trainer(
        PHASE,
        DenoiserPass(denoiser),
        denoiser_loss(draws, objective, settings.batch_size, machine.device),
        settings,
        machine,
        Pace(settings),
        spec.folder / "denoiser.pt",
        spec.metrics,
        fingerprint(identity, machine),
    )
