"""One shard of one round of sampling: the unit of work of the GPU jobs (rule sample_views).

A shard file holds `latents` (n, 4, h, w) and `view_ids` (n,) after the round's last step, with
solvers of second order also `clean`, what was predicted as clean in it. The next round reads all
shard files of this one and deals the views anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cap4d_core
from cap4d_core.diffusion.checkpoint import MMDM
from cap4d_core.diffusion.conditioning import (
    ConditioningRenderer,
    RenderedViews,
    RendererTables,
)
from cap4d_core.diffusion.dealing import deal_views, initial_noise, views_per_iteration
from cap4d_core.diffusion.denoiser_setup import DenoiserRoute, choose_route, route_denoiser
from cap4d_core.diffusion.grouping import SeededGrouping, shard_key
from cap4d_core.diffusion.network_setup import (
    check_settings,
    choose_precision,
    load_model,
    matmul_precision,
)
from cap4d_core.diffusion.pictures import contact_sheet, evenly_spaced, image_from_network
from cap4d_core.diffusion.round_plan import round_steps
from cap4d_core.diffusion.sampler import Denoiser, SamplingProgress, sample_stochastic_io
from cap4d_core.diffusion.sampling_checkpoint import SamplingCheckpoint, fingerprint
from cap4d_core.diffusion.solvers import needs_previous
from cap4d_core.diffusion.step_grid import ddim_step_count, jumps_at_the_end
from cap4d_core.diffusion.view_plan_file import ViewPlan, read_plan
from cap4d_core.errors import DeadlineError, InputFileError, UserError
from cap4d_core.files.basic import (
    read_safetensors,
    require_file,
    sha256_file,
    write_safetensors,
)
from cap4d_core.files.images import write_image
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.kept import KEEPER, file_states
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

PREVIEW_VIEWS = 8
_AGAIN = "Delete it and run the workflow again."
# Settings that change the bits of a shard; the others (paths, pictures) do not.
_RELEVANT = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
    "max_references",
    "views_per_call",
    "resolution",
    "num_shards",
    "sync_steps",
    "solver",
    "seed",
)


def sample_views(
    plan_file: str | Path,
    reference_latents: str | Path,
    mmdm_dir: str | Path,
    head_model_dir: str | Path,
    previous_round_files: Sequence[str | Path],
    output: str | Path,
    round_index: int,
    shard_index: int,
    settings: SamplingSettings,
    checkpoint_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Runs the steps of one round on the views of one shard.

    With the same inputs, settings, hardware, library versions and thread count the result has the
    same bits, also when the job was killed and resumed in between.

    Args:
        plan_file: plan.npz.
        reference_latents: latents.safetensors of encode_references.
        mmdm_dir: folder written by prepare_mmdm.
        head_model_dir: folder written by prepare_head_model.
        previous_round_files: all shard files of the round before; none in round 0.
        output: shard file to write; a preview picture is written beside it.
        round_index: from 0.
        shard_index: from 0.
        settings: sampling settings.
        checkpoint_path: undeclared file to resume from; default: beside the output.
        device: where to compute.
        callback: called after every step.

    Raises:
        UserError: inputs or settings that do not fit each other.
        DivergedError: NaN.
        DeadlineError: from `callback`; what was done is in the checkpoint.
    """
    output, device = Path(output), torch.device(device)
    plan = read_plan(plan_file)
    steps_run = ddim_step_count(settings.num_inference_steps)
    if jumps_at_the_end(settings.num_inference_steps):
        logger.warning(
            "sampling.num_inference_steps = %d does not divide 1000 and starts in almost pure "
            "noise: views may stay noise. Use a divisor, such as 10, 20, 25, 50 or 100.",
            settings.num_inference_steps,
        )
    rounds = round_steps(settings.sync_steps, steps_run, settings.num_shards)
    if not 0 <= round_index < len(rounds) or not 0 <= shard_index < settings.num_shards:
        raise UserError(
            f"Round {round_index + 1}, shard {shard_index + 1} does not exist: the settings make "
            f"{len(rounds)} round(s) of {settings.num_shards} shard(s)."
        )
    per_iteration = views_per_iteration(
        len(plan.references), settings.max_references, settings.views_per_call
    )
    if len(plan.views) % (settings.num_shards * per_iteration):
        raise InputFileError(
            plan_file,
            f"{len(plan.views)} views",
            f"a multiple of {settings.num_shards} shards x {per_iteration} views per call",
            "The settings changed since it was made; delete it and run the workflow again.",
        )
    start, stop = rounds[round_index]
    dealt = deal_views(
        len(plan.views), settings.num_shards, settings.seed, plan.subject, round_index
    )
    view_ids = dealt[shard_index].tolist()
    precision = choose_precision(settings.precision, device)
    route = choose_route(settings, device, len(view_ids) // per_iteration, stop - start)

    model, denoiser = _load(Path(mmdm_dir), settings, device, route)
    latents, clean = _starting_state(plan, view_ids, previous_round_files, model, settings, start)
    references = _reference_latents(reference_latents, plan, model)
    name = fingerprint(
        {
            "settings": {key: getattr(settings, key) for key in _RELEVANT},
            "precision": precision,
            "route": route.to_dict(),
            "subject": plan.subject,
            "round": round_index,
            "shard": shard_index,
            "plan": sha256_file(plan_file),
            "references": sha256_file(reference_latents),
            "previous": sorted(sha256_file(path) for path in previous_round_files),
            "model": model.config.to_dict(),
            "weights": model.provenance,
            "cap4d_core": cap4d_core.__version__,
            "torch": torch.__version__,
        }
    )
    checkpoint = SamplingCheckpoint(
        checkpoint_path or output.with_suffix(".checkpoint.safetensors"),
        name,
        settings.checkpoint_every_steps,
    )
    resumed = checkpoint.load(start, stop, tuple(latents.shape))
    if resumed is not None:
        start, latents, clean = resumed
    logger.info(
        "%s: round %d of %d, shard %d of %d: %d views, steps %d to %d of %d, %s, %s%d "
        "batch(es) per call.",
        plan.subject, round_index + 1, len(rounds), shard_index + 1, settings.num_shards,
        len(view_ids), start, stop - 1, steps_run, precision,
        "compiled, " if route.compiled else "", route.batches_per_call,
    )  # fmt: skip

    order = plan.reference_order
    base = plan.references[plan.base_reference]
    head = HeadModel.load(head_model_dir).to(device)
    renderer = ConditioningRenderer(head, _tables(model, head_model_dir), model.config, base.extr)
    preview = output.with_suffix(".png")

    def to_keep(progress: SamplingProgress) -> Tensor | None:
        return progress.predicted_clean if needs_previous(settings.solver) else None

    last_clean = clean

    times = [time.perf_counter()]

    def after_step(progress: Progress) -> None:
        nonlocal last_clean
        times.append(time.perf_counter())
        assert isinstance(progress, SamplingProgress)
        assert progress.latents is not None and progress.predicted_clean is not None
        finished, last_clean = progress.step + 1, to_keep(progress)
        if finished < stop:
            checkpoint.save_if_due(progress.step, progress.latents, last_clean)
        every = settings.preview_every_steps
        if finished == stop or (every and finished % every == 0):
            write_image(preview, _preview(model, progress.predicted_clean, settings))
        if callback is not None:
            try:
                callback(progress)
            except DeadlineError:
                if finished < stop:  # else the shard is complete
                    checkpoint.save(progress.step, progress.latents, last_clean)
                    raise

    with torch.no_grad(), matmul_precision(precision):
        final = sample_stochastic_io(
            denoiser,
            model.schedule,
            renderer.references([plan.references[i] for i in order], references[order]),
            RenderedViews(renderer, [plan.views[i] for i in view_ids]),
            settings.num_inference_steps,
            settings.guidance_scale,
            settings.views_per_call,
            settings.max_references,
            latents.to(device),
            SeededGrouping(
                len(plan.references),
                len(view_ids),
                settings.views_per_call - per_iteration,
                per_iteration,
                shard_key(
                    settings.seed, plan.subject, settings.num_shards, round_index, shard_index
                ),
            ),
            start_step=start,
            end_step=stop,
            callback=after_step,
            batches_per_call=route.batches_per_call,
            solver=settings.solver,
            clean_before=clean,
            guidance_interval=settings.guidance_interval,
        )
    _log_pace(times, len(view_ids))
    write_safetensors(
        output,
        {"latents": final, "view_ids": torch.tensor(view_ids)}
        | ({} if last_clean is None else {"clean": last_clean}),
        {"next_step": str(stop), "steps_run": str(steps_run), "fingerprint": name},
    )
    checkpoint.remove()


def read_shard(path: str | Path) -> tuple[Tensor, list[int], int]:
    """Latents (n, 4, h, w), view ids and number of steps done of a shard file.

    Raises:
        InputFileError: not a shard file.
    """
    what = "latents of a shard, written by sample_views"
    tensors, metadata = read_safetensors(path, what)
    if not {"latents", "view_ids"} <= set(tensors) or "next_step" not in metadata:
        raise InputFileError(path, f"tensors {', '.join(sorted(tensors))}", what, _AGAIN)
    return tensors["latents"], tensors["view_ids"].tolist(), int(metadata["next_step"])


def _load(
    mmdm_dir: Path, settings: SamplingSettings, device: torch.device, route: DenoiserRoute
) -> tuple[MMDM, Denoiser]:
    """The model, and its denoiser in the form of the route."""

    def make() -> tuple[MMDM, Denoiser]:
        model = load_model(mmdm_dir, settings, device)
        return model, route_denoiser(model.denoiser, route, mmdm_dir.parent / "compiled")

    precision = choose_precision(settings.precision, device)
    model, denoiser = KEEPER.get("mmdm", (file_states(mmdm_dir), precision, device, route), make)
    check_settings(model.config, settings)
    return model, denoiser


def _log_pace(times: list[float], num_views: int) -> None:
    """Time per step, and what the first one took besides: kernels, conditioning maps."""
    spans = [after - before for before, after in pairwise(times)]
    if spans:
        pace = sum(spans[1:]) / len(spans[1:]) if len(spans) > 1 else spans[0]
        logger.info(
            "%d views: %.3f s per step, %d steps, %.1f s before the first at this speed.",
            num_views, pace, len(spans), max(spans[0] - pace, 0.0),
        )  # fmt: skip


def _starting_state(
    plan: ViewPlan,
    view_ids: Sequence[int],
    previous: Sequence[str | Path],
    model: MMDM,
    settings: SamplingSettings,
    start: int,
) -> tuple[Tensor, Tensor | None]:
    """Latents before step `start` and, for solvers that need it, what was clean one step before."""
    shape = (model.config.in_channels, model.config.latent_size, model.config.latent_size)
    if start == 0:
        return initial_noise(view_ids, shape, settings.seed, plan.subject), None
    found: dict[int, Tensor] = {}
    found_clean: dict[int, Tensor] = {}
    for path in previous:
        latents, ids, next_step = read_shard(path)
        if next_step != start:
            expected = f"latents after {start} steps"
            raise InputFileError(path, f"latents after {next_step} steps", expected, _AGAIN)
        found |= dict(zip(ids, latents, strict=True))
        if needs_previous(settings.solver):
            found_clean |= dict(zip(ids, _read_clean(path, settings.solver), strict=True))
    missing = sorted(set(range(len(plan.views))) - set(found))
    if missing or len(found) != len(plan.views):
        names = ", ".join(str(path) for path in previous) or "no files"
        raise UserError(
            f"The previous round ({names}) holds {len(found)} views, the plan {len(plan.views)}; "
            f"first missing: {missing[:3]}. Delete the rounds folder and run the workflow again."
        )
    clean = torch.stack([found_clean[i] for i in view_ids]) if found_clean else None
    return torch.stack([found[i] for i in view_ids]), clean


def _read_clean(path: str | Path, solver: str) -> Tensor:
    tensors, _ = read_safetensors(path)
    if "clean" not in tensors:
        raise InputFileError(path, "no tensor 'clean'", f"a shard of solver '{solver}'", _AGAIN)
    return tensors["clean"]


def _reference_latents(path: str | Path, plan: ViewPlan, model: MMDM) -> Tensor:
    what = "reference latents written by encode_references"
    require_file(path, what)
    tensors, _ = read_safetensors(path, what)
    config = model.config
    wanted = (len(plan.references), config.in_channels, config.latent_size, config.latent_size)
    latents = tensors.get("latents")
    if latents is None or tuple(latents.shape) != wanted:
        found = "no latents" if latents is None else f"latents {tuple(latents.shape)}"
        raise InputFileError(path, found, f"{what}, {wanted}", _AGAIN)
    return latents


def _tables(model: MMDM, head_model_dir: str | Path) -> RendererTables:
    if model.tables is not None:
        return RendererTables.from_weights(model.tables)
    template = load_flame_template(head_model_dir)
    return RendererTables.from_template(template.vertices, template.faces, template.head_vertex_ids)


def _preview(model: MMDM, clean: Tensor, settings: SamplingSettings) -> NDArray[np.uint8]:
    """Contact sheet of a few views as they are expected to become."""
    picked = clean[evenly_spaced(len(clean), PREVIEW_VIEWS)]
    decoded = model.autoencoder.decode(picked.to(model.autoencoder.device), 1, settings.low_memory)
    return contact_sheet([image_from_network(image) for image in decoded.cpu().numpy()], 256, 4)
