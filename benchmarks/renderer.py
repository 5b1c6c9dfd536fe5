"""Time of the Gaussian renderers, per view: forward, and forward + backward.

    python benchmarks/renderer.py [--threads 1 2] [--repeats N] [--skip-torch] [--json FILE]

On the CPU the compiled renderer is set against its plain PyTorch twin (same mathematics, tile by
tile) in one run; on CUDA gsplat is timed at several batch sizes. The scene is an egg-shaped shell
of random splats whose largest standard deviation is given in pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cap4d_core.avatar.renderer import render_gaussians

# Pixels, splats, views per call, largest standard deviation in pixels, timed with the twin.
CPU_CASES = [
    (128, 13_000, 4, 1.0, True),
    (256, 10_000, 1, 2.5, True),
    (512, 105_000, 1, 2.0, False),
]
CUDA_CASES = [(128, 13_000, 4, 1.0), *((512, 105_000, batch, 2.0) for batch in (1, 4, 8))]
COLUMNS = ("pixels", "splats", "batch", "backend", "threads", "forward_ms", "both_ms", "fps")


def main() -> None:
    arguments = parse_arguments()
    cuda = torch.cuda.is_available()
    rows = benchmark_cuda(arguments) if cuda else benchmark_cpu(arguments)
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    print(f"Gaussian renderers on {machine}; milliseconds per view, best of the repeats")
    print("  ".join(f"{name:>10}" for name in (*COLUMNS, "speed-up")))
    for row in rows:
        ratio = row.get("speed_up")
        cells = [row[name] for name in COLUMNS] + [f"{ratio:.0f} x" if ratio else ""]
        print("  ".join(f"{c:>10.2f}" if isinstance(c, float) else f"{c:>10}" for c in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-torch", action="store_true", help="leave out the slow twin")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


def benchmark_cpu(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for pixels, splats, batch, radius, with_twin in CPU_CASES:
        scene = make_scene(pixels, splats, batch, radius, "cpu")
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            row = time_backend("cpu", scene, arguments.repeats, threads)
            rows.append(row)
            if with_twin and not arguments.skip_torch:
                # One view, once after a warm-up: the twin takes seconds.
                twin = time_backend("torch", [t[:1] for t in scene[:7]] + scene[7:], 2, threads)
                row["speed_up"] = twin["both_ms"] / row["both_ms"]
                rows.append(twin)
    return rows


def benchmark_cuda(arguments: argparse.Namespace) -> list[dict]:
    return [
        time_backend("gsplat", make_scene(pixels, splats, batch, radius, "cuda"), 20, 0)
        for pixels, splats, batch, radius in CUDA_CASES
    ]


def make_scene(pixels: int, splats: int, batch: int, radius: float, device: str) -> list:
    """Arguments of render_gaussians; the splats collect gradients."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(
        torch.randn(batch, splats, 3, generator=generator), dim=-1
    )
    shell = 0.9 + 0.2 * torch.rand(batch, splats, 1, generator=generator)
    focal = 4.0 * pixels
    sizes = radius / focal * (0.2 + 0.8 * torch.rand(batch, splats, 3, generator=generator))
    camera = torch.eye(4).repeat(batch, 1, 1)
    camera[:, 2, 3] = 1.0
    intrinsics = torch.tensor(
        [[focal, 0.0, pixels / 2], [0.0, focal, pixels / 2], [0.0, 0.0, 1.0]]
    ).repeat(batch, 1, 1)
    leaves = [
        directions * torch.tensor([0.09, 0.12, 0.10]) * shell,
        torch.randn(batch, splats, 4, generator=generator),
        sizes,
        0.05 + 0.9 * torch.rand(batch, splats, generator=generator),
        0.2 * torch.randn(batch, splats, 16, 3, generator=generator),
    ]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    return [*leaves, camera.to(device), intrinsics.to(device), pixels, pixels]


def time_backend(backend: str, scene: list, repeats: int, threads: int) -> dict:
    """One row: best times of `repeats` calls after one warm-up."""
    splats: list[Tensor] = [t.detach().requires_grad_() for t in scene[:5]]
    arguments = (*splats, *scene[5:])
    batch, count, pixels = splats[0].shape[0], splats[0].shape[1], scene[7]
    weights = torch.rand(batch, pixels, pixels, 3, device=splats[0].device)
    for_timing: dict[str, list[float]] = {"forward": [], "both": []}

    def forward() -> Tensor:
        return render_gaussians(*arguments, backend=backend).image

    def both() -> None:
        for splat in splats:
            splat.grad = None
        forward().backward(weights)

    for name, function in (("forward", no_grad(forward)), ("both", both)):
        function()
        for _ in range(repeats):
            start = clock()
            function()
            for_timing[name].append((clock() - start) * 1e3 / batch)
    best = {name: min(times) for name, times in for_timing.items()}
    return {
        "pixels": pixels,
        "splats": count,
        "batch": batch,
        "backend": backend,
        "threads": threads or "-",
        "forward_ms": best["forward"],
        "both_ms": best["both"],
        "fps": 1e3 / best["forward"],
    }


def no_grad(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(function)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
