"""Where the time of a compiled denoiser call goes, and how fast its attention shapes run alone.

    python benchmarks/denoiser_profile.py [--form fast-compiled] [--references 1] [--batches 4]
        [--attention] [--json FILE]

CUDA only. Kernels are told apart by their names; `gaps` is wall time without a kernel running.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.denoiser import make_call, make_denoiser, measure, synchronize
from cap4d_core.diffusion.denoiser import MMDMConfig

# Parts of kernel names, first match counts: names of convolutions contain 'gemm' as well, and those
# of fused kernels whatever they are fused from.
KINDS = {
    "fused pointwise and norms": (
        "triton_",
        "_gate",
        "_geglu_tile",
        "_normalise",
        "_partial_moments",
    ),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "nchw", "nhwc"),
    "matrix product": ("gemm", "nvjet", "cutlass", "splitk", "cublas"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", default="fast-compiled")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--inductor", nargs="*", default=[], help="options, name=value")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    content: dict[str, Any] = {"machine": torch.cuda.get_device_name()}
    if arguments.attention:
        content["attention"] = attention_rates(arguments.batches, device)
    denoiser = make_denoiser(MMDMConfig(), arguments.precision, device)
    call, _ = make_call(
        denoiser, arguments.form, arguments.precision, arguments.references, arguments.batches,
        {k: json.loads(v) for k, v in (option.split("=") for option in arguments.inductor)},
    )  # fmt: skip
    start = time.perf_counter()
    with torch.no_grad():
        call()
    synchronize(device)
    content["first_call_s"] = time.perf_counter() - start
    print(f"first call {content['first_call_s']:.1f} s", flush=True)
    content["profile"] = profile(call, arguments, device)
    # Convolutions by trial instead of by rule; compiled forms ask cuDNN, too.
    torch.backends.cudnn.benchmark = True
    content["profile_cudnn_benchmark"] = profile(call, arguments, device)
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2))


def profile(
    call: Callable[[], Any], arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Milliseconds per call-equivalent by kind of kernel."""
    repeats = 3
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        for _ in range(3):
            call()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        wall = (time.perf_counter() - start) * 1e3
        with torch.profiler.profile(activities=activities) as recorded:
            for _ in range(repeats):
                call()
            synchronize(device)
    scale = 1 / (repeats * arguments.batches)
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.key_averages():
        milliseconds = event.device_time_total / 1e3 * scale
        kinds[kind_of(event.key)] += milliseconds
        kernels[event.key] += milliseconds
        counts[event.key] += event.count // repeats
    busy = sum(kinds.values())
    kinds["gaps"] = max(wall * scale - busy, 0.0)
    title = f"{arguments.form} R={arguments.references} x{arguments.batches}"
    print(f"{title}: {wall * scale:.2f} ms per call, of which")
    for kind, value in kinds.most_common():
        print(f"  {value:8.3f} ms  {kind}")
    for name, value in kernels.most_common(25):
        print(f"  {value:8.3f} ms {counts[name]:4} x  [{kind_of(name)[:6]}] {name[:110]}")
    return {"ms": wall * scale, "kinds": dict(kinds), "kernels": dict(kernels.most_common(60))}


def kind_of(name: str) -> str:
    lowered = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lowered for part in parts):
            return kind
    return "other"


def attention_rates(batches: int, device: torch.device) -> list[dict[str, Any]]:
    """Rate of fused attention by implementation at the released model's shapes."""
    shapes = {
        "level 0": (14 * batches, 5, 4096),
        "level 1": (2 * batches, 10, 8192),
        "level 2": (2 * batches, 20, 2048),
        "middle": (2 * batches, 20, 512),
    }
    rows = []
    for name, (samples, heads, tokens) in shapes.items():
        packed = torch.randn(samples, tokens, 3, heads, 64, device=device, dtype=torch.bfloat16)
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        flop = 4 * samples * heads * tokens**2 * 64
        for backend in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
            try:
                chosen = [] if backend == "default" else [getattr(SDPBackend, backend)]
                if chosen:
                    with sdpa_kernel(chosen):
                        ms = measure(lambda: attend(q, k, v), device)  # noqa: B023
                else:
                    ms = measure(lambda: attend(q, k, v), device)  # noqa: B023
            except RuntimeError as error:
                print(f"{name:8} {backend:16} {str(error)[:80]}")
                continue
            rows.append({"shape": name, "backend": backend, "ms": ms, "tflops": flop / ms / 1e9})
            print(f"{name:8} {backend:16} {ms:8.3f} ms {flop / ms / 1e9:7.1f} TFLOP/s")
    return rows


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


if __name__ == "__main__":
    main()
