"""Speed of the avatar fit: steps and views per second, and where the time of a step goes.

    python -m benchmarks.fitting [HEAD IMAGE_SET] [--preset default] [--batch 1 4 8] [--size 512]
        [--uv 128] [--splats 100000] [--steps 100] [--lpips [WEIGHTS]]
        [--compile auto|on|off] [--renderers auto] [--views 840] [--memory-gb 24] [--profile]
        [--json FILE]
    python -m benchmarks.fitting --whole [--views 840] [--preset default] [--lpips] [--compile on]

HEAD is a folder written by prepare_head_model; without it, people of the demo world are fitted. The
views of IMAGE_SET are resampled to `--size` and repeated up to `--views`; `--lpips` adds the
perceptual loss, without a file with random weights (same cost as real ones); `--memory-gb` forbids
to use more memory than such a card has; `--renderers cpu torch` compares the built-in renderer with
plain torch. `--whole` times a fit from files to avatar instead, of so many rendered views, with all
its evaluations, pictures and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.demo_data import demo_head, demo_views
from cap4d_core.avatar import lpips_fast
from cap4d_core.avatar.fitting import fit_avatar
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import ImageData, load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import Progress
from cap4d_core.settings import PRESETS, FittingSettings

DEMO_SUBJECT, DEMO_SIZE, DEMO_VIEWS = 24, 128, 32
RANDOM = "random"
PROFILED_STEPS = 5
PROFILE_ROWS = 40


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.memory_gb and device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory_gb * 1e9 / total)
        # The driver reports what the whole card has free.
        lpips_fast.MEMORY_SHARE *= arguments.memory_gb * 1e9 / total
    if arguments.whole:
        whole_fit(arguments, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        head_folder, image_set = arguments.inputs or demo_inputs(Path(folder), device)
        head = HeadModel.load(head_folder, lower_jaw=True).to(device)
        data = resampled(load_image_data([image_set]), arguments.size)
        data = repeated(data, arguments.views).to(device)
        machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"{machine}, {len(data)} views of {arguments.size} px, preset {arguments.preset}")
        rows = [
            measure(arguments, head, data, batch, renderer)
            for batch in arguments.batch
            for renderer in arguments.renderers
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, nargs="*", metavar="HEAD IMAGE_SET")
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--uv", type=int, help="instead of the preset's UV resolution")
    parser.add_argument("--splats", type=int, help="instead of the preset's number")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--views", type=int, default=0, help="at least so many training views")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--renderers", nargs="+", default=["auto"], metavar="NAME")
    parser.add_argument("--lpips", nargs="?", const=RANDOM, metavar="WEIGHTS")
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--whole", action="store_true", help="a fit from files to avatar")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(arguments.inputs) not in (0, 2):
        parser.error("give HEAD and IMAGE_SET, or neither")
    return arguments


def demo_inputs(folder: Path, device: str) -> tuple[Path, Path]:
    """Head model and pictures of a demo person."""
    return demo_head(folder), demo_views(folder, DEMO_SUBJECT, DEMO_SIZE, DEMO_VIEWS, device)[0]


def resampled(data: ImageData, size: int) -> ImageData:
    """The views at another size."""
    factor = size / data.size[1]
    images = F.interpolate(data.images.permute(0, 3, 1, 2).float(), size=(size, size))
    scale = torch.diag(torch.tensor([factor, factor, 1.0]))
    full = torch.ones(len(data), size, dtype=torch.bool)
    return replace(
        data,
        images=images.permute(0, 2, 3, 1).byte().contiguous(),
        mask_rows=full,
        mask_columns=full,
        mattes=None,
        intrinsics=scale @ data.intrinsics,
    )


def repeated(data: ImageData, count: int) -> ImageData:
    """The views over and over, up to `count` of them."""
    rows = torch.arange(max(count, len(data))) % len(data)
    changed: dict[str, Any] = {
        name: getattr(data, name)[rows]
        for name in (
            "images", "mask_rows", "mask_columns", "world_to_camera", "intrinsics", "expr",
            "eye_rot",
        )
    }  # fmt: skip
    return replace(data, **changed, names=[data.names[i] for i in rows.tolist()])


def random_lpips() -> Lpips:
    """The network with weights of no meaning."""
    lpips = Lpips()
    with torch.no_grad():
        for layer in lpips.convolutions:
            torch.nn.init.kaiming_normal_(layer.weight)
        for head in lpips.heads:
            head.uniform_(0, 1)
    return lpips


def whole_fit(arguments: argparse.Namespace, device: str) -> None:
    """Times `fit_avatar` of a demo person."""
    values: dict[str, Any] = dict(PRESETS[arguments.preset].get("fitting", {}))
    values["compile"] = arguments.compile
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head_folder = demo_head(folder)
        views = max(arguments.views, DEMO_VIEWS)
        train, _ = demo_views(folder, DEMO_SUBJECT, arguments.size, views, device)
        if arguments.lpips == RANDOM:
            random_lpips().save(folder / "lpips.safetensors")
            values["lpips_weights"] = str(folder / "lpips.safetensors")
        else:
            values["lpips_weights"] = arguments.lpips
        started, told = time.perf_counter(), 0

        def callback(progress: Progress) -> None:
            nonlocal told
            if progress.done >= told:
                told += 5_000
                print(f"{progress.done:7} {time.perf_counter() - started:7.1f} s", flush=True)

        fit_avatar(
            [train], HeadModel.load(head_folder, lower_jaw=True), FittingSettings(**values),
            folder / "avatar", callback, device=device,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        metrics = json.loads((folder / "avatar" / "metrics.json").read_text())
        kept = ("iterations", "num_gaussians", "num_views", "resolution", "held_out", "train")
        row = {"seconds": round(seconds, 1), **{name: metrics[name] for name in kept}}
        if device == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(row)
        if arguments.json:
            arguments.json.write_text(json.dumps(row | {"curves": metrics["curves"]}) + "\n")
            picture = max((folder / "avatar" / "previews").iterdir())
            shutil.copyfile(picture, arguments.json.with_suffix(".png"))


def make_trainer(
    arguments: argparse.Namespace, head: HeadModel, data: ImageData, batch: int, renderer: str
) -> AvatarTrainer:
    """A trainer in the middle of a fit: all terms active, no density control."""
    values: dict[str, Any] = dict(PRESETS[arguments.preset].get("fitting", {}))
    values |= {"batch_size": batch, "densify_until": 0, "lpips_start": 0, "lpips_end": 1}
    values |= {"sh_warmup": 1, "compile": arguments.compile, "renderer": renderer}
    if arguments.uv:
        values["uv_resolution"] = arguments.uv
    if arguments.splats:
        values["num_gaussians_init"] = arguments.splats
    settings = FittingSettings(**values)
    lpips = None
    if arguments.lpips:
        lpips = random_lpips() if arguments.lpips == RANDOM else Lpips.load(arguments.lpips)
        lpips = lpips.to(head.template.device)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    return AvatarTrainer(avatar, data, settings, lpips=lpips)


def measure(
    arguments: argparse.Namespace, head: HeadModel, data: ImageData, batch: int, renderer: str
) -> dict[str, Any]:
    """Times steps."""
    device = head.template.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(arguments, head, data, batch, renderer)
    started = time.perf_counter()
    warm_up = max(min(20, arguments.steps), 2)
    trainer.step(batch)
    synchronise(device)
    first = time.perf_counter() - started
    for step in range(2, warm_up + 1):
        trainer.step(step * batch)
    synchronise(device)
    started = time.perf_counter()
    for step in range(warm_up + 1, warm_up + arguments.steps + 1):
        trainer.step(step * batch)
    queued = time.perf_counter() - started
    synchronise(device)
    seconds = time.perf_counter() - started
    row = {
        "batch": batch,
        "renderer": renderer,
        "splats": len(trainer.avatar.splats),
        "steps_per_s": round(arguments.steps / seconds, 2),
        "views_per_s": round(arguments.steps * batch / seconds, 2),
        "ms_per_step": round(1e3 * seconds / arguments.steps, 2),
        "host_ms_per_step": round(1e3 * queued / arguments.steps, 2),
        "first_step_s": round(first, 1),
        "lpips": bool(arguments.lpips),
        "compiled": trainer.compiler.enabled,
    }
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(row, flush=True)
    if arguments.profile:
        profile(trainer, warm_up + arguments.steps)
    return row


def profile(trainer: AvatarTrainer, done: int) -> None:
    """Prints the kernels of a step and the operations of the host, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for step in range(done + 1, done + PROFILED_STEPS + 1):
            trainer.step(step * trainer.batch_size)
        synchronise(trainer.device)
    events = trace.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels) / PROFILED_STEPS / 1e3
    print(f"kernels {total:.2f} ms per step; the longest (ms per step, calls per step):")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:PROFILE_ROWS]:
        per_step = event.self_device_time_total / PROFILED_STEPS / 1e3
        print(f"  {per_step:8.3f} {event.count / PROFILED_STEPS:7.1f}  {event.key[:110]}")
    print("by operation of the host (ms per step, calls per step):")
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[: PROFILE_ROWS // 2]:
        per_step = event.self_cpu_time_total / PROFILED_STEPS / 1e3
        print(f"  {per_step:8.3f} {event.count / PROFILED_STEPS:7.1f}  {event.key[:110]}")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
