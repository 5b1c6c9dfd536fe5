"""How much faster each part is than its plain twin, on one CPU core: what CI watches.

    python -m benchmarks.ratios [--check] [--write] [--repeats 5]

Seconds differ between machines, ratios hardly do. Parts and twins are timed in turn, in CPU time,
so that other work on the machine disturbs little, and the best of the repeats counts. `--check`
fails where a ratio falls too far below that in benchmarks/ratios.json; `--write` renews the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch

from benchmarks import fitting
from benchmarks.demo_data import demo_head, demo_views
from benchmarks.denoiser import SMALL, make_call, make_denoiser
from benchmarks.renderer import make_scene
from cap4d_core.avatar import losses
from cap4d_core.avatar.image_data import load_image_data
from cap4d_core.avatar.renderer import render_gaussians
from cap4d_core.diffusion.denoiser import MMDMConfig
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.mesh_rasterizer import rasterize

COMMITTED = Path(__file__).with_suffix(".json")
# Of the committed ratio, and of what is gained: another make of CPU or a busy machine must not look
# like a regression, nor a fast path that is no faster any more like noise.
SHARE_OF_RATIO = 0.6
SHARE_OF_GAIN = 0.3
# Seconds that are timed at once, at least: clocks and caches say little about less.
SHORTEST = 0.05

Timed = Callable[[], Any]
Part = tuple[str, Timed, Timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    known = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    ratios, slower = {}, []
    print(f"{'part':46} {'plain':>9} {'fast':>9} {'ratio':>6} {'committed':>9}")
    for name, plain, fast in parts():
        ratio = measure(name, plain, fast, arguments.repeats, known.get(name))
        if name in known and ratio < least(known[name]):
            # Once more, for longer, before it counts.
            ratio = measure(name, plain, fast, 3 * arguments.repeats, known[name])
            if ratio < least(known[name]):
                slower.append(f"{name}: {ratio:.2f}, at least {least(known[name]):.2f} expected")
        ratios[name] = round(ratio, 2)
    if arguments.write:
        COMMITTED.write_text(json.dumps(ratios, indent=1) + "\n")
    if arguments.check:
        problems = slower
        problems += [f"{name}: not in {COMMITTED.name}" for name in sorted(ratios.keys() - known)]
        problems += [f"{name}: not measured any more" for name in sorted(known.keys() - ratios)]
        if problems:
            sys.exit("\n".join(problems))


def least(committed: float) -> float:
    """Ratio that still passes."""
    return max(SHARE_OF_RATIO * committed, 1 + SHARE_OF_GAIN * (committed - 1))


def measure(name: str, plain: Timed, fast: Timed, repeats: int, known: float | None) -> float:
    """Ratio of the best times; printed."""
    functions = (plain, fast)
    for function in functions:  # compiles, fills caches
        function()
    calls = [int(SHORTEST / max(seconds_of(function, 1), 1e-4)) + 1 for function in functions]
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, function in enumerate(functions):
            best[i] = min(best[i], seconds_of(function, calls[i]))
    ratio = best[0] / best[1]
    committed = "" if known is None else f"{known:9.2f}"
    print(
        f"{name:46} {best[0] * 1e3:6.1f} ms {best[1] * 1e3:6.1f} ms {ratio:6.2f} {committed}",
        flush=True,
    )
    return ratio


def seconds_of(function: Timed, calls: int) -> float:
    """CPU time of a call."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def parts() -> Iterator[Part]:
    """Name, plain twin, fast form."""
    yield from denoiser_parts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head = HeadModel.load(demo_head(folder), lower_jaw=True)
        yield mesh_part(head)
        yield renderer_part()
        yield ssim_part()
        yield from fitting_parts(folder, head)


def denoiser_parts() -> Iterator[Part]:
    """A guided network call, with what one step of sampling shares left out of it."""
    denoiser = make_denoiser(MMDMConfig(**SMALL), "fp32", torch.device("cpu"))
    for references in (1, 4):
        forms = [
            torch.no_grad()(make_call(denoiser, form, "fp32", references, 1)[0])
            for form in ("plain", "fast-merged")
        ]
        yield f"denoiser call, {references} reference(s): plain, fast", forms[0], forms[1]


def mesh_part(head: HeadModel) -> Part:
    """The head from the front, as in conditioning maps."""
    shape, expr, rot, tra = (torch.zeros(1, n) for n in (150, 65, 3, 3))
    vertices = head(shape, expr, rot, tra).vertices
    vertices = (vertices - vertices.mean(1, keepdim=True)) / 0.15 + torch.tensor([0.0, 0.0, 3.0])
    numba_, torch_ = (
        partial(rasterize, vertices, head.faces, (128, 128), backend=backend)
        for backend in ("numba", "torch")
    )
    assert numba_().covered.float().mean() > 0.2
    return "head mesh, 128 px: torch, numba", torch_, numba_


def renderer_part() -> Part:
    scene = make_scene(64, 3_000, 1, 1.0, "cpu")
    weights = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def both_ways(backend: str) -> None:
        render_gaussians(*scene, backend=backend).image.backward(weights)

    name = "splats and gradients, 64 px: torch, built in"
    return name, partial(both_ways, "torch"), partial(both_ways, "cpu")


def ssim_part() -> Part:
    draw = torch.Generator().manual_seed(0)
    image, target = (torch.rand(8, 3, 128, 128, generator=draw) for _ in range(2))
    image.requires_grad_()
    fast = losses.fast_blur(image)

    def both_ways(blur: losses.Blur) -> None:
        losses.ssim(image, target, blur).backward()

    name = "SSIM and gradient, 128 px: window, fast"
    return name, partial(both_ways, "window"), partial(both_ways, fast)


def fitting_parts(folder: Path, head: HeadModel) -> Iterator[Part]:
    """Eight steps of one view against one step of eight."""
    arguments = argparse.Namespace(
        preset="demo", compile="off", uv=None, splats=None, lpips=None, size=64
    )
    images, _ = demo_views(folder, fitting.DEMO_SUBJECT, 64, 8, "cpu")
    data = load_image_data([images])
    single, batched = (
        fitting.make_trainer(arguments, head, data, batch, "auto") for batch in (1, 8)
    )

    def steps(trainer: Any) -> None:
        stride = trainer.batch_size
        for iteration in range(stride, 9, stride):
            trainer.step(iteration)

    yield "fit, 8 views: one by one, one step", partial(steps, single), partial(steps, batched)


if __name__ == "__main__":
    main()
