"""How a job runs the denoiser: fast or plain, compiled or not, how many batches per call.

The choice depends on settings, device and the size of the whole job only, never on how much of it
is left, so that a resumed job computes what the killed one would have.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cap4d_core.compiling import can_compile, use_compile_cache
from cap4d_core.diffusion import denoiser as denoiser_module
from cap4d_core.diffusion import (
    denoiser_program,
    fast_denoiser,
    float8_convolution,
    float8_linear,
    fused_pointwise,
)
from cap4d_core.diffusion.compiled_network import CompiledNetwork, first_line
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.fast_denoiser import FastDenoiser, even_batches
from cap4d_core.diffusion.fast_sampling import FastSamplingDenoiser
from cap4d_core.diffusion.network_setup import HALF, choose_batches_per_call, choose_precision
from cap4d_core.diffusion.sampler import Denoiser
from cap4d_core.errors import UserError
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)

# Compiling takes about a minute the first time and seconds from the cache, and saves about 15 ms
# per batch of views at the released size on the fastest GPUs, more on others.
BATCHES_WORTH_COMPILING = 400


@dataclass(frozen=True)
class DenoiserRoute:
    """Which form of the denoiser runs.

    Attributes:
        fast, compiled, channels_last: see `route_denoiser`.
        batches_per_call: batches of views per network call.
        merged: enlargements folded into convolutions; rounds otherwise, within half precision.
        float8: large layers in 8 bits.
        fused: norms and gates by kernels of our own, where they can be made; the same but for
            rounding.
    """

    fast: bool
    compiled: bool
    channels_last: bool
    batches_per_call: int
    merged: bool = False
    float8: bool = False
    fused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def choose_route(
    settings: SamplingSettings, device: torch.device, batches_per_step: int, steps: int
) -> DenoiserRoute:
    """Chooses for a job of so many steps.

    Raises:
        UserError: settings that exclude each other.
    """
    limit = choose_batches_per_call(settings, device)
    fast = settings.fast_path != "off"
    precision = choose_precision(settings.precision, device)
    if precision == "fp8" and not fast:
        raise UserError("sampling.precision 'fp8' needs the fast path: set fast_path to 'auto'.")
    halved = fast and device.type == "cuda" and precision in HALF
    # Float32 convolutions without TF32 are several times slower in channels-last layout.
    channels_last = device.type == "cuda" and precision != "fp32"
    compiled = fast and settings.compile == "on"
    if fast and settings.compile == "auto":
        worth_it = batches_per_step * steps >= BATCHES_WORTH_COMPILING
        compiled = channels_last and worth_it and can_compile(device)
    return DenoiserRoute(
        fast,
        compiled,
        channels_last,
        even_batches(batches_per_step, limit) if fast else limit,
        merged=halved,
        float8=precision == "fp8",
        fused=halved and can_compile(device),
    )


def route_denoiser(
    denoiser: MMDMDenoiser, route: DenoiserRoute, compile_cache: Path | None = None
) -> Denoiser:
    """The denoiser in the form of a route, for `sample_stochastic_io`.

    Args:
        denoiser: loaded, in its final type and device; its weights are laid out anew in place.
        route: what to run.
        compile_cache: folder for compiled kernels, shared by jobs; TORCHINDUCTOR_CACHE_DIR goes
            before it.

    Raises:
        UserError: 8 bits on a GPU for which no kernels can be made.
    """
    layout = torch.channels_last if route.channels_last else torch.contiguous_format
    denoiser = denoiser.to(memory_format=layout)  # type: ignore[call-overload]
    if not route.fast:
        return denoiser
    own_kernels = route.compiled or route.float8 or route.fused
    folder = use_compile_cache(compile_cache) if compile_cache and own_kernels else None
    fused = route.fused and _kernels_run(denoiser.device)
    if route.float8 and denoiser.device.type == "cuda" and not fused:
        raise UserError(
            "sampling.precision 'fp8' needs Triton on a GPU, with a C compiler and Python's "
            "headers (Debian: gcc, python3-dev). Install them, or use 'bf16'."
        )
    fast = FastDenoiser(
        denoiser,
        merge_upsampling=route.merged,
        memory_format=layout,
        float8=route.float8,
        fused=fused,
    )
    if not route.compiled:
        return FastSamplingDenoiser(fast)
    return FastSamplingDenoiser(fast, compiled_denoiser(fast, folder), same_shapes=True)


def _kernels_run(device: torch.device) -> bool:
    """Tries one of our kernels: Triton needs more than can be looked up.

    It compiles a launcher against Python's headers and writes to its cache.
    """
    try:
        fused_pointwise.geglu(torch.zeros(2, 32, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        logger.warning(
            "Triton cannot make kernels here, so sampling is slower: %s. It needs a C compiler and "
            "Python's headers (Debian: gcc, python3-dev).",
            first_line(error),
        )
        return False
    return True


def compiled_denoiser(
    fast: FastDenoiser, folder: Path | None = None, **options: Any
) -> CompiledNetwork:
    """The fast denoiser, compiled when first called; see `CompiledNetwork`."""
    depends_on = {
        "type": str(fast.denoiser.dtype),
        "format": str(fast.memory_format),
        "model": fast.denoiser.config.to_dict(),
        "savings": str(fast.savings),
        "merged": fast.merge_upsampling,
        "float8": fast.float8,
        "fused": fast.fused,
    }
    code = (
        denoiser_module, denoiser_program, fast_denoiser, float8_convolution, float8_linear,
        fused_pointwise,
    )  # fmt: skip
    return CompiledNetwork("denoiser", fast, depends_on, code, folder, **options)
