"""Time of one denoiser call (classifier-free guidance pair), by form, precision and batching.

    python benchmarks/denoiser.py [--size released|small] [--forms plain fast fast-compiled]
        [--references 1 4] [--batches 1 2] [--precisions bf16] [--count] [--cudnn-benchmark]
        [--memory-gb 24] [--no-flash] [--json FILE]

On a CPU, `--size small --forms plain fast fast-merged --references 1 4` shows whether a change made
a form slower: compare the ratios to the first line, not the times.

One call denoises `views_per_call` views, conditionally and unconditionally. Random weights: the
time does not depend on them. Runs on CUDA or, with --size small, on the CPU.

Forms: `plain` is MMDMDenoiser, `fast` FastDenoiser (without what it computes once per step, which
`step` shows), `-merged` folds enlargement into convolutions, `-float8` multiplies 8-bit numbers in
large layers, `-compiled` is compiled as in the jobs, `-graphs` also in CUDA graphs.
Compiled forms are kept in the folder TORCHINDUCTOR_CACHE_DIR: run twice to see the first call cold
and warm.

`--cudnn-benchmark` lets cuDNN try its convolution algorithms; `--memory-gb` and `--no-flash` forbid
more memory than such a card has, and fused attention.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.diffusion.denoiser_cost import DenoiserCost, plain_cost, sampling_cost
from cap4d_core.diffusion.denoiser_setup import compiled_denoiser
from cap4d_core.diffusion.fast_denoiser import FastDenoiser, ReferenceFeatures

SMALL = {"model_channels": 32, "head_channels": 16, "views_per_call": 8, "latent_size": 16}
TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = MMDMConfig(**SMALL) if arguments.size == "small" else MMDMConfig()
    if arguments.count:
        print_costs(config, arguments.references)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    if arguments.no_flash:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.memory_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory_gb * 1e9 / total)
    rows = []
    for precision in arguments.precisions:
        set_tf32(precision == "tf32")
        denoiser = make_denoiser(config, precision, device)
        for form in arguments.forms:
            for references in arguments.references:
                for batches in arguments.batches:
                    row = measure_form(denoiser, form, precision, references, batches)
                    rows.append(row)
                    row["of_first"] = row["ms_per_call"] / rows[0]["ms_per_call"]
                    print_row(row)
    if arguments.json:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        content = {"machine": machine, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--forms", nargs="+", default=["plain", "fast"])
    parser.add_argument("--precisions", nargs="+", choices=list(TYPES), default=["bf16"])
    parser.add_argument("--references", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--count", action="store_true", help="print floating-point operations")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--no-flash", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_denoiser(config: MMDMConfig, precision: str, device: torch.device) -> MMDMDenoiser:
    """Random weights, laid out as the sampling stage does."""
    with torch.device(device):
        denoiser = MMDMDenoiser(config).eval().requires_grad_(False)
    return denoiser.to(dtype=TYPES[precision], memory_format=layout_of(precision, device))


def layout_of(precision: str, device: torch.device) -> torch.memory_format:
    """Float32 convolutions without TF32 are several times slower in channels-last layout."""
    fast = device.type == "cuda" and precision != "fp32"
    return torch.channels_last if fast else torch.contiguous_format


def measure_form(
    denoiser: MMDMDenoiser, form: str, precision: str, references: int, batches: int
) -> dict[str, Any]:
    """Times one form; milliseconds are per call-equivalent of one batch."""
    device, config = denoiser.device, denoiser.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    start = time.perf_counter()
    call, step = make_call(denoiser, form, precision, references, batches)
    with torch.no_grad():
        call()
        synchronize(device)
        first = time.perf_counter() - start
        milliseconds = measure(call, device) / batches
        step_ms = measure(step, device) if step else 0.0
    flop = plain_cost(config, 2).total
    if form.startswith("fast"):
        flop = sampling_cost(config, references, merge_upsampling="merged" in form).total
    return {
        "form": form,
        "precision": precision,
        "references": references,
        "batches": batches,
        "ms_per_call": milliseconds,
        "tflop": flop / 1e12,
        "tflops": flop / milliseconds / 1e9,
        "ms_per_step": step_ms,
        "first_call_s": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30
        if device.type == "cuda"
        else float("nan"),
    }


def make_call(
    denoiser: MMDMDenoiser,
    form: str,
    precision: str,
    references: int,
    batches: int,
    inductor: dict[str, Any] | None = None,
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """One network call on random inputs, and what the fast form does once per step."""
    device = denoiser.device
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    if "graphs" in form:
        options["mode"] = "reduce-overhead"
    compiled = "compiled" in form or "graphs" in form
    if form.startswith("plain"):
        inputs = plain_inputs(denoiser, batches, references)
        plain: Callable[..., Any] = torch.compile(denoiser, **options) if compiled else denoiser
        return lambda: plain(*inputs), None
    fast = FastDenoiser(
        denoiser,
        merge_upsampling="merged" in form,
        memory_format=layout_of(precision, device),
        float8="float8" in form,
        fused="fused" in form,
    )
    biases, latents, maps, features = fast_inputs(fast, batches, references)
    clean, clean_maps = latents[0, :1].expand(references, -1, -1, -1), maps[0, :1]
    clean_maps = clean_maps.expand(references, -1, -1, -1)

    def step() -> Any:
        return fast.reference_features(clean, clean_maps, fast.time_biases(500), True)

    function: Callable[..., Any] = fast
    if "graphs" in form:
        function = torch.compile(fast.forward, **options)
    elif compiled:
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        folder = Path(kept) if kept else None
        function = compiled_denoiser(fast, folder, **(inductor or {}))
    return lambda: function(latents, maps, biases, features, references, True), step


def plain_inputs(
    denoiser: MMDMDenoiser, batches: int, references: int
) -> tuple[torch.Tensor, torch.Tensor, FrameConditioning]:
    """A guidance pair of `batches` calls."""
    config, device = denoiser.config, denoiser.device
    lead, side = (2 * batches, config.views_per_call), config.latent_size
    normal = normal_source(device)
    mask = torch.zeros(*lead, 1, side, side, device=device)
    mask[:, :references] = 1
    conditioning = FrameConditioning(
        next(normal)(*lead, side, side, config.condition_channels),
        next(normal)(*lead, config.in_channels, side, side),
        mask,
    )
    timesteps = torch.full(lead, 500, device=device)
    return next(normal)(*lead, config.in_channels, side, side), timesteps, conditioning


def fast_inputs(
    fast: FastDenoiser, batches: int, references: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ReferenceFeatures | None]:
    """As `FastSamplingDenoiser` gives them: biases, latents, maps, features of references."""
    config, device, dtype = fast.denoiser.config, fast.denoiser.device, fast.denoiser.dtype
    normal = normal_source(device)
    lead, side = (batches, config.views_per_call - references), config.latent_size
    biases = fast.time_biases(torch.full((1,), 500, device=device))
    features = fast.reference_features(
        next(normal)(references, config.in_channels, side, side),
        next(normal)(references, side, side, config.condition_channels).to(dtype),
        biases,
        guided=True,
    )
    ids = torch.arange(references, device=device).repeat(batches)
    with torch.no_grad():
        return (
            biases,
            next(normal)(*lead, config.in_channels, side, side),
            next(normal)(*lead, side, side, config.condition_channels).to(dtype),
            features and features.gather(ids, batches),
        )


def normal_source(device: torch.device) -> Iterator[Callable[..., torch.Tensor]]:
    """Yields functions that draw different standard normals of a shape."""
    generator = torch.Generator(device).manual_seed(0)
    while True:
        yield lambda *shape: torch.randn(shape, generator=generator, device=device)


def print_costs(config: MMDMConfig, references: list[int]) -> None:
    """Table of floating-point operations by level and kind."""
    columns: dict[str, DenoiserCost] = {"plain": plain_cost(config, 2)}
    for count in references:
        columns[f"fast R={count}"] = sampling_cost(config, count)
        columns[f"merged R={count}"] = sampling_cost(config, count, merge_upsampling=True)
    print("GFLOP per call      " + "".join(f"{name:>12}" for name in columns))
    for level, kind, _ in columns["plain"].rows():
        values = "".join(f"{c.parts[level, kind] / 1e9:12.1f}" for c in columns.values())
        print(f"level {level} {kind:14}{values}")
    print(f"{'total':20}" + "".join(f"{c.total / 1e9:12.1f}" for c in columns.values()))
    plain = columns["plain"].total
    print(f"{'of plain':20}" + "".join(f"{c.total / plain:12.3f}" for c in columns.values()))


def set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
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


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['form']:22} {row['precision']} R={row['references']} x{row['batches']}  "
        f"{row['ms_per_call']:8.2f} ms/call ({row['of_first']:5.2f} of the first line)  "
        f"{row['tflop']:6.3f} TFLOP  "
        f"{row['tflops']:7.2f} TFLOP/s  step {row['ms_per_step']:6.2f} ms  "
        f"first {row['first_call_s']:6.1f} s  peak {row['peak_gib']:5.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
