"""Time to make demo subjects and to render them, per device and batch size.

    python benchmarks/demo_rendering.py [--device cuda] [--batches 8 64 256] [--processes 0 16]

Prints the seconds of every step when it is done, then a table. Whatever takes more than a minute
shows its stack, again and again, so that a hang names itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

COLUMNS = ("batch", "images_s", "ms_image", "raster_share", "peak_gib")


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else "CPU"
    cores = len(os.sched_getaffinity(0))
    say(
        f"{machine}; {os.cpu_count()} cores, {cores} usable; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; numpy {np.__version__}"
    )
    steps, subjects = make(arguments)
    rows = render(arguments, device, subjects, steps)
    say(f"demo rendering on {machine}, {arguments.size} px, supersample {arguments.supersample}")
    say("  ".join(f"{name:>12}" for name in COLUMNS))
    for row in rows:
        cells = (row[name] for name in COLUMNS)
        say("  ".join(f"{c:>12.3g}" if isinstance(c, float) else f"{c:>12}" for c in cells))
    if arguments.json:
        content = {"machine": machine, "cores": cores, "steps": steps, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--views", type=int, help="per subject; default: the largest batch")
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--texture", type=int, nargs="+", default=[256, 512], help="atlas sides")
    parser.add_argument("--processes", type=int, default=0, help="also make subjects in a pool")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--supersample", type=int, default=2)
    parser.add_argument("--backend", default="auto", help="of the rasterizer")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


def say(text: str) -> None:
    """Prints a line; from here on, a minute without another shows the stack."""
    print(text, flush=True)
    faulthandler.dump_traceback_later(60, repeat=True)


def timed(steps: dict[str, float], name: str, step: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = step()
    steps[name] = time.perf_counter() - start
    say(f"{steps[name]:9.3f} s  {name}")
    return result


def make(arguments: argparse.Namespace) -> tuple[dict[str, float], list]:
    """Head and subjects; steps that do not depend on the subject are timed by themselves."""
    steps: dict[str, float] = {}

    def load() -> None:
        from cap4d_core.demo import family  # noqa: F401

    timed(steps, "import", load)
    from cap4d_core.demo import family, skin_paint
    from cap4d_core.demo.head import build_demo_head

    timed(steps, "build the head", build_demo_head)
    subjects: list = []
    for side in arguments.texture:
        timed(steps, f"texels of the {side} px atlas", lambda side=side: skin_paint.texels(side))
        seeds = range(5000, 5000 + arguments.subjects)
        start = time.perf_counter()
        subjects = list(family.make_subjects(seeds, texture_size=side))
        steps[f"subject, {side} px atlas"] = (time.perf_counter() - start) / len(subjects)
        say(f"{steps[f'subject, {side} px atlas']:9.3f} s  per subject, {side} px atlas")
    if arguments.processes:
        side, many = arguments.texture[0], 8 * arguments.processes
        with family.subject_pool(arguments.processes) as pool:
            first = family.make_subjects(
                range(arguments.processes), texture_size=side, executor=pool
            )
            timed(steps, f"start of {arguments.processes} processes", lambda: list(first))
            start = time.perf_counter()
            for _ in family.make_subjects(
                range(6000, 6000 + many), texture_size=side, executor=pool
            ):
                pass
            name = f"subject, {side} px atlas, {arguments.processes} processes"
            steps[name] = (time.perf_counter() - start) / many
            say(f"{steps[name]:9.3f} s  per {name}")
    return steps, subjects


def render(
    arguments: argparse.Namespace, device: torch.device, subjects: list, steps: dict[str, float]
) -> list[dict]:
    from cap4d_core.demo import family, rendering

    cuda = device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    make_renderer = rendering.SubjectRenderer
    first = timed(
        steps,
        "first renderer",
        lambda: (make_renderer(subjects[0], device, arguments.backend), wait())[0],
    )
    start = time.perf_counter()
    renderers = [first, *(make_renderer(s, device, arguments.backend) for s in subjects[1:])]
    wait()
    if len(subjects) > 1:
        steps["next renderer"] = (time.perf_counter() - start) / (len(subjects) - 1)
        say(f"{steps['next renderer']:9.3f} s  per next renderer")
    options = {"size": arguments.size, "supersample": arguments.supersample}
    rng = np.random.default_rng(0)
    timed(
        steps,
        "first picture",
        lambda: (family.render_views(renderers[0], 1, rng, **options), wait()),
    )
    spent = [0.0]
    plain = rendering.rasterize

    def measured(*args: object, **keywords: object) -> object:
        wait()
        begin = time.perf_counter()
        result = plain(*args, **keywords)
        wait()
        spent[0] += time.perf_counter() - begin
        return result

    views = arguments.views or max(arguments.batches)
    rows = []
    for batch in arguments.batches:

        def once(batch: int = batch) -> float:
            begin = time.perf_counter()
            for renderer in renderers:
                family.render_views(renderer, views, rng, batch=batch, **options)
            wait()
            return time.perf_counter() - begin

        once()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = min(once() for _ in range(arguments.repeats))
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
        rendering.rasterize = measured
        spent[0] = 0.0
        total = once()
        rendering.rasterize = plain
        images = views * len(renderers)
        row = {
            "batch": batch,
            "images_s": images / seconds,
            "ms_image": 1e3 * seconds / images,
            "raster_share": spent[0] / total,
            "peak_gib": peak,
        }
        rows.append(row)
        say(f"{seconds:9.3f} s  {images} images in batches of {batch}")
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
