"""Latents of the last round to the image set of generated views (rule decode_views).

    {output_dir}/images/%05d.png   generated views, numbered by view id
    {output_dir}/flame/%05d.npz    their parameters, released format
    {index}                        JSON: names and SHA-256 of the files of this shard; written last
    {index stem}.png               contact sheet

Shards write into one folder, so each declares only its index.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cap4d_core
from cap4d_core.compiling import can_compile, use_compile_cache
from cap4d_core.diffusion import autoencoder as autoencoder_module
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.compiled_network import CompiledNetwork
from cap4d_core.diffusion.network_setup import (
    HALF,
    choose_precision,
    load_autoencoder,
    matmul_precision,
)
from cap4d_core.diffusion.pictures import bytes_on_device, contact_sheet, evenly_spaced
from cap4d_core.diffusion.sampling import read_shard
from cap4d_core.diffusion.sampling_checkpoint import fingerprint
from cap4d_core.diffusion.step_grid import ddim_step_count
from cap4d_core.diffusion.view_plan_file import read_plan
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, sha256_file, write_json
from cap4d_core.files.image_set import write_view_parameters
from cap4d_core.files.images import read_rgb, write_image
from cap4d_core.kept import KEEPER, file_states
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

# Views decoded between two updates of the partial index.
VIEWS_PER_UPDATE = 8
# Megapixels of a job from which compiling is worth it: it takes half a minute the first time and a
# second or two later, and saves 70 ms per megapixel on the fastest GPUs.
MEGAPIXELS_WORTH_COMPILING = 25.0
# Threads that compress and write images.
MAX_WRITERS = 8
CONTACT_VIEWS = 32


def decode_views(
    plan_file: str | Path,
    latents_files: str | Path | Sequence[str | Path],
    mmdm_dir: str | Path,
    output_dir: str | Path,
    index_path: str | Path,
    settings: SamplingSettings,
    device: torch.device | str = "cpu",
    callback: ProgressCallback | None = None,
) -> None:
    """Decodes the views of one shard.

    A killed job goes on: what a partial index lists and still has that hash is kept.

    Args:
        plan_file: plan.npz.
        latents_files: shard file (or files) of the last round.
        mmdm_dir: folder written by prepare_mmdm.
        output_dir: the image set, shared by all shards.
        index_path: index file of this shard.
        settings: resolution, low_memory, precision (16 bits allowed or not), compile, parity
            (float32, and cuts bytes off instead of rounding).
        device: where the autoencoder runs.
        callback: called per batch.

    Raises:
        UserError: inputs that do not fit each other.
    """
    output_dir, index_path = Path(output_dir), Path(index_path)
    device = torch.device(device)
    plan = read_plan(plan_file)
    if isinstance(latents_files, (str, Path)):
        latents_files = [latents_files]
    parts = []
    view_ids: list[int] = []
    steps_run = ddim_step_count(settings.num_inference_steps)
    for path in latents_files:
        latents, ids, next_step = read_shard(path)
        if next_step != steps_run or max(ids) >= len(plan.views):
            raise InputFileError(
                path,
                f"latents after {next_step} steps, view ids up to {max(ids)}",
                f"latents after all {steps_run} steps of at most {len(plan.views)} views",
                "Delete the rounds folder and run the workflow again.",
            )
        parts.append(latents)
        view_ids += ids
    all_latents = torch.cat(parts)
    precision = choose_precision(settings.precision, device)
    half = device.type == "cuda" and precision in HALF and not settings.parity
    kernels = None
    if half and _is_worth_compiling(settings, len(view_ids)) and can_compile(device):
        kernels = use_compile_cache(Path(mmdm_dir).parent / "compiled")
    source = fingerprint(
        {
            "latents": [sha256_file(path) for path in latents_files],
            "plan": sha256_file(plan_file),
            "mmdm": str(Path(mmdm_dir).resolve()),
            "parity": settings.parity,
            "low_memory": settings.low_memory,
            "device": device.type,
            "half": half,
            "compiled": kernels is not None,
        }
    )
    partial = index_path.with_suffix(".partial.json")
    files = _finished_files(partial, output_dir, source)
    todo = [
        i for i, view in enumerate(view_ids) if not {_image(view), _parameters(view)} <= set(files)
    ]
    if files:
        logger.info("Resuming: %d of %d views are there.", len(view_ids) - len(todo), len(view_ids))
    key = (file_states(mmdm_dir), device, half, kernels, settings.low_memory, settings.parity)
    decoder = KEEPER.get(
        "decoder",
        key,
        lambda: _Decoder(
            load_autoencoder(mmdm_dir, settings, device)[0], device, half, settings, kernels
        ),
    )

    def save(view: int, pixels: Callable[[], NDArray[np.uint8]]) -> dict[str, str]:
        write_image(output_dir / _image(view), pixels())
        write_view_parameters(output_dir / _parameters(view), plan.views[view])
        return {name: sha256_file(output_dir / name) for name in (_image(view), _parameters(view))}

    finished = 0
    saving: deque[Future[dict[str, str]]] = deque()

    def register() -> None:
        nonlocal finished
        files.update(saving.popleft().result())
        finished += 1
        if finished % VIEWS_PER_UPDATE == 0:
            write_json(partial, {"source": source, "files": files})
        if callback is not None:
            callback(Progress(len(view_ids) - len(todo) + finished, len(view_ids), "view"))

    workers = min(_available_cpus(), MAX_WRITERS)
    # Compression takes longer than decoding on a GPU and runs outside Python's lock.
    with (
        torch.no_grad(),
        matmul_precision("fp32" if settings.parity else "tf32"),
        ThreadPoolExecutor(workers) as pool,
    ):
        for row in todo:
            pixels = decoder.start(all_latents[row : row + 1])
            saving.append(pool.submit(save, view_ids[row], pixels))
            while len(saving) > 2 * workers or (saving and saving[0].done()):
                register()
        while saving:
            register()
    shown = [view_ids[i] for i in evenly_spaced(len(view_ids), CONTACT_VIEWS)]
    sheet = contact_sheet([read_rgb(output_dir / _image(view)) for view in shown])
    write_image(index_path.with_suffix(".png"), sheet)
    write_json(
        index_path,
        {
            "cap4d_core": cap4d_core.__version__,
            "count": len(view_ids),
            "files": {name: files[name] for name in sorted(files)},
        },
    )
    partial.unlink(missing_ok=True)


class _Decoder:
    """Latents (1, 4, h, w) to bytes (H, W, 3), one by one.

    The bits of an image must not depend on what is decoded with it, so there are no batches.

    With `half` in float16, whose 11 bits are no coarser than TF32's; an image that overflows is
    decoded in float32. With `kernels`, a folder to keep them in, compiled: three times as fast,
    mostly because torch's own group norm is slow on one large image.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        half: bool,
        settings: SamplingSettings,
        kernels: Path | None = None,
    ) -> None:
        self.device = device
        self.tiled = settings.low_memory
        self.truncate = settings.parity
        if device.type == "cuda" and not settings.parity:
            autoencoder = autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.full = autoencoder
        self.one_at_a_time = threading.Lock()
        self.half: Callable[[Tensor], Tensor] | None = None
        if half:
            in_half = copy.deepcopy(autoencoder).half()
            self.half = functools.partial(in_half.decode, tiled=self.tiled)
            if kernels is not None:
                self.half = compiled_decoder(in_half, kernels)

    def start(self, latent: Tensor) -> Callable[[], NDArray[np.uint8]]:
        """Decodes; what is returned waits for the bytes, in any thread.

        On a GPU this returns while the device still works, so that it gets the next view before
        this one is fetched.
        """
        latent = latent.to(self.device)
        image = (self._exactly if self.half is None else self.half)(latent)[0]
        (pixels, finite), arrived = _to_host(
            bytes_on_device(image, self.truncate), torch.isfinite(image).all()
        )

        def wait() -> NDArray[np.uint8]:
            arrived()
            if self.half is None or bool(finite):
                return pixels.numpy()
            with torch.no_grad(), self.one_at_a_time:
                exact = self._exactly(latent)[0]
            return bytes_on_device(exact, self.truncate).cpu().numpy()

        return wait

    def _exactly(self, latent: Tensor) -> Tensor:
        return self.full.decode(latent, tiled=self.tiled)


class _WholeImage(nn.Module):
    """`Autoencoder.decode_whole` as a network of its own."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        """(1, 3, H, W) float32 of a scaled latent (1, 4, h, w)."""
        return self.autoencoder.decode_whole(latent)


def compiled_decoder(autoencoder: Autoencoder, folder: Path | None = None) -> CompiledNetwork:
    """`Autoencoder.decode` of single latents, compiled when first called."""
    depends_on = {
        "type": str(autoencoder.dtype),
        "strides": list(autoencoder.vae.decoder.conv_in.weight.stride()),
        "model": autoencoder.config.model_dump(mode="json"),
    }
    code = (sys.modules[__name__], autoencoder_module)
    return CompiledNetwork("decoder", _WholeImage(autoencoder), depends_on, code, folder)


def _is_worth_compiling(settings: SamplingSettings, num_views: int) -> bool:
    """By settings and size of the whole job only: bits must not depend on what is left of it."""
    if settings.low_memory or settings.compile == "off":
        return False
    megapixels = num_views * settings.resolution**2 / 1e6
    return settings.compile == "on" or megapixels >= MEGAPIXELS_WORTH_COMPILING


def _to_host(*tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Copies in host memory, and what waits until they are there."""
    if tensors[0].device.type != "cuda":
        return list(tensors), lambda: None
    on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for target, source in zip(on_host, tensors, strict=True):
        target.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied.synchronize


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _image(view: int) -> str:
    return f"images/{view:05d}.png"


def _parameters(view: int) -> str:
    return f"flame/{view:05d}.npz"


def _finished_files(partial: Path, output_dir: Path, source: str) -> dict[str, str]:
    """Files of an interrupted run that are still what it wrote."""
    if not partial.exists():
        return {}
    try:
        content: Any = read_json(partial)
    except InputFileError:
        return {}
    if not isinstance(content, dict) or content.get("source") != source:
        logger.info("Starting anew: %s is of other inputs or settings.", partial)
        return {}
    return {
        name: digest
        for name, digest in content.get("files", {}).items()
        if (output_dir / name).is_file() and sha256_file(output_dir / name) == digest
    }
