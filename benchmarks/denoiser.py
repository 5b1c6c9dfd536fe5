"""Time of one denoiser call (classifier-free guidance pair), by precision and batching.

    python benchmarks/denoiser.py [--size released|small] [--batches 1 2] [--compile] [--json FILE]

One call denoises `views_per_call` views, conditionally and unconditionally. Random weights: the
time does not depend on them. Runs on CUDA or, with --size small, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser

SMALL = {"model_channels": 32, "head_channels": 16, "views_per_call": 4, "latent_size": 16}


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = MMDMConfig(**SMALL) if arguments.size == "small" else MMDMConfig()
    with torch.device(device):
        denoiser = MMDMDenoiser(config).eval().requires_grad_(False)
    flop = count_flop(denoiser, config, device)
    rows = []
    variants = [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False)]
    if device.type == "cuda":
        variants.insert(1, ("tf32", torch.float32, False))
    if arguments.compile:
        variants.append(("bf16, compiled", torch.bfloat16, True))
    for name, dtype, compiled in variants:
        set_tf32(name == "tf32")
        denoiser = denoiser.to(dtype=dtype, memory_format=torch.channels_last)
        call: Callable[..., torch.Tensor] = denoiser
        if compiled:
            call = torch.compile(denoiser, dynamic=False)
        for batches in arguments.batches:
            inputs = make_inputs(config, batches, dtype, device)
            start = time.perf_counter()
            with torch.no_grad():
                call(*inputs)
                synchronize(device)
                first = time.perf_counter() - start
                milliseconds = measure(lambda c=call, i=inputs: c(*i), device) / batches
            rows.append(
                {
                    "variant": name,
                    "batches": batches,
                    "ms_per_call": milliseconds,
                    "tflops": flop / milliseconds / 1e9,
                    "first_call_s": first,
                    "peak_gib": torch.cuda.max_memory_allocated() / 2**30
                    if device.type == "cuda"
                    else float("nan"),
                }
            )
            print_row(rows[-1])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
    if arguments.json:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        arguments.json.write_text(
            json.dumps({"machine": machine, "tflop_per_call": flop / 1e12, "rows": rows}, indent=2)
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_inputs(
    config: MMDMConfig, batches: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, FrameConditioning]:
    """A guidance pair of `batches` calls with one reference each."""
    generator = torch.Generator(device).manual_seed(0)
    lead, side = (2 * batches, config.views_per_call), config.latent_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    mask = torch.zeros(*lead, 1, side, side, device=device)
    mask[:, 0] = 1
    conditioning = FrameConditioning(
        normal(*lead, side, side, config.condition_channels),
        normal(*lead, config.in_channels, side, side),
        mask,
    ).to(dtype=dtype)
    timesteps = torch.full(lead, 500, device=device)
    return normal(*lead, config.in_channels, side, side).to(dtype), timesteps, conditioning


def count_flop(denoiser: MMDMDenoiser, config: MMDMConfig, device: torch.device) -> int:
    """Floating-point operations of one call (2 per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(*make_inputs(config, 1, torch.float32, device))
    return counter.get_total_flops()


def set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(call: Callable[[], torch.Tensor], device: torch.device, repeats: int = 7) -> float:
    """Median milliseconds after two warm-up calls."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def print_row(row: dict[str, float | str]) -> None:
    print(
        f"{row['variant']:16} {row['batches']} per call  {row['ms_per_call']:9.2f} ms/call  "
        f"{row['tflops']:7.2f} TFLOP/s  first {row['first_call_s']:6.1f} s  "
        f"peak {row['peak_gib']:5.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
