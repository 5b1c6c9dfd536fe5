"""Loading the diffusion model for a job: precision, device, and whether the settings fit it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.checkpoint import MMDM, load_mmdm
from cap4d_core.diffusion.float8_linear import LEAST_CAPABILITY
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.model_weights import (
    find_checkpoint,
    is_prepared_folder,
    read_prepared,
    read_released,
)
from cap4d_core.errors import UserError
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

_TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
# Precisions that compute in 16 bits on a GPU.
HALF = frozenset({"bf16", "fp16", "fp8"})
# The workflow counts the steps before it sees the model.
NUM_TRAIN = 1000
# Device memory (GB) from which so many batches share a network call at the released size. In 16
# bits four batches take 6.4 GB, weights and maps of 840 views included; the rest is for 32 bits and
# for other programs.
_BATCHES_FOR_MEMORY = ((20.0, 4), (14.0, 2))


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolves 'auto': bf16 on GPUs that have it, else fp32.

    Raises:
        UserError: 'fp8' on a GPU that does not multiply such numbers.
    """
    if precision == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            found, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
            raise UserError(
                f"sampling.precision 'fp8' needs a GPU of compute capability {least} or more (Ada, "
                f"Hopper or newer); {torch.cuda.get_device_name(device)} has {found}. Use 'bf16'."
            )
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def choose_batches_per_call(settings: SamplingSettings, device: torch.device) -> int:
    """Batches of views per network call: as set, else by the device's memory."""
    if settings.batches_per_call is not None:
        return settings.batches_per_call
    if settings.low_memory or device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return next((batches for needed, batches in _BATCHES_FOR_MEMORY if memory >= needed), 1)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allows or forbids TF32 for float32 products and convolutions on CUDA; restores it after."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allowed = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def load_model(mmdm_dir: str | Path, settings: SamplingSettings, device: torch.device) -> MMDM:
    """The model in the precision of the settings.

    Raises:
        UserError: the settings do not fit the model, or it cannot be read.
    """
    precision = choose_precision(settings.precision, device)
    kind = _TYPES[precision]
    if precision == "fp8" and device.type != "cuda":
        logger.warning("sampling.precision 'fp8' is only imitated on the CPU: slower than fp32.")
        kind = torch.float32
    model = load_mmdm(mmdm_dir, kind, device)
    check_settings(model.config, settings)
    return model


def load_autoencoder(
    mmdm_dir: str | Path, settings: SamplingSettings, device: torch.device
) -> tuple[Autoencoder, MMDMConfig]:
    """The model's autoencoder alone, in float32, without the memory of the denoiser.

    Raises:
        UserError: the settings do not fit the model, or it cannot be read.
    """
    path = Path(mmdm_dir)
    is_prepared = is_prepared_folder(path)
    weights = read_prepared(path) if is_prepared else read_released(find_checkpoint(path))
    check_settings(weights.config, settings)
    with torch.device("meta"):
        autoencoder = Autoencoder(weights.config.autoencoder)
    # Copies, because the tensors are views into a mapped file.
    state = {k: t.to(device, torch.float32, copy=True) for k, t in weights.autoencoder.items()}
    autoencoder.vae.load_state_dict(state, assign=True)
    return autoencoder.eval().requires_grad_(False), weights.config


def check_settings(config: MMDMConfig, settings: SamplingSettings) -> None:
    """Refuses settings that do not fit the weights.

    Raises:
        UserError: lists all that do not.
    """
    problems = []
    if settings.views_per_call != config.views_per_call:
        problems.append(
            f"sampling.views_per_call = {settings.views_per_call}, but these weights were trained "
            f"for {config.views_per_call}"
        )
    if settings.resolution != config.image_size:
        problems.append(
            f"sampling.resolution = {settings.resolution}, but these weights make images of "
            f"{config.image_size} x {config.image_size} pixels"
        )
    train_steps = config.schedule.num_train_timesteps
    if train_steps != NUM_TRAIN:
        problems.append(f"a schedule of {train_steps} timesteps; {NUM_TRAIN} are supported")
    if problems:
        raise UserError(f"The settings do not fit the diffusion model: {'; '.join(problems)}.")
