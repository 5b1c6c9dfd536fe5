"""Quality of the avatar fit by views per step, after the same number of training views.

    python benchmarks/fit_quality.py HEAD IMAGE_SET HELD_OUT [--views 20000] [--preset low]
        [--runs parity 1 8] [--seeds 0 1 2] [--set lr_position=0.01 ...] [--jobs 1] [--json FILE]

IMAGE_SET is trained on, HELD_OUT (with mattes) is not. A run is `parity` (one view per step, the
published arithmetic) or a number of views per step. The schedules of the preset are stretched to
`--views`. Prints PSNR and SSIM of the held-out views, PSNR also inside the dilated mattes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from cap4d_core.avatar.fit_report import evaluate_views
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import Split, load_image_data
from cap4d_core.avatar.training import AvatarTrainer, ViewOrder
from cap4d_core.files.image_set import read_image_set
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import PRESETS, FittingSettings

# Settings that count views.
SCHEDULES = (
    "sh_warmup", "densify_from", "densify_until", "densification_interval",
    "opacity_reset_interval", "lpips_start", "lpips_end",
)  # fmt: skip
SCORES = ("psnr_subject", "psnr", "ssim")


def main() -> None:
    arguments = parse_arguments()
    tasks = [(run, seed) for run in arguments.runs for seed in arguments.seeds]
    # Processes of their own: the fits share nothing.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, arguments, run, seed) for run, seed in tasks]
        rows = [future.result() for future in futures]
    print(f"\n{arguments.views} views, preset {arguments.preset}, mean (and range) over seeds")
    for run in arguments.runs:
        chosen = [row for row in rows if row["run"] == run]
        cells = []
        for name in SCORES:
            values = [row[name] for row in chosen if name in row]
            if values:
                spread = max(values) - min(values)
                cells.append(f"{name} {statistics.mean(values):.3f} ({spread:.3f})")
        print(f"{run:8} {'  '.join(cells)}  {chosen[0]['views_per_s']:.0f} views/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", type=Path)
    parser.add_argument("image_set", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--views", type=int, default=20_000)
    parser.add_argument("--preset", default="low", choices=sorted(PRESETS))
    parser.add_argument("--runs", nargs="+", default=["parity", "8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace, run: str, seed: int) -> FittingSettings:
    """The preset for so many views."""
    values: dict[str, Any] = dict(PRESETS[arguments.preset].get("fitting", {}))
    whole = FittingSettings(**values)
    for name in SCHEDULES:
        stretched = getattr(whole, name) * arguments.views / whole.iterations
        values[name] = max(round(stretched), 1 if getattr(whole, name) else 0)
    values |= {"iterations": arguments.views, "seed": seed, "parity": run == "parity"}
    if run != "parity":
        values["batch_size"] = int(run)
    values |= {key: yaml.safe_load(value) for key, value in (s.split("=") for s in arguments.set)}
    return FittingSettings(**values)


def measure(arguments: argparse.Namespace, run: str, seed: int) -> dict[str, Any]:
    """One fit and its scores."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    settings = settings_of(arguments, run, seed)
    head = HeadModel.load(arguments.head, lower_jaw=True).to(device)
    train, held_out = read_image_set(arguments.image_set), read_image_set(arguments.held_out)
    data = load_image_data([train, held_out], settings.parity)
    mattes = load_image_data([held_out]).mattes
    if mattes is not None:
        # Only held-out views are scored.
        data.mattes = torch.cat([mattes.new_zeros(len(train), *data.size), mattes])
    data = data.to(device)
    order = ViewOrder(range(len(train)), seed, device)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    trainer = AvatarTrainer(avatar, data, settings, view_order=order.rows)
    rows = list(range(len(train)))
    trainer.split = Split(rows, list(range(len(train), len(data))), rows[:1])
    stride = settings.views_per_step
    started = time.perf_counter()
    for iteration in range(stride, settings.iterations + stride, stride):
        losses = trainer.step(iteration)
    loss = float(losses[-1])
    seconds = time.perf_counter() - started
    row = {
        "run": run,
        "seed": seed,
        "loss": loss,
        "splats": len(avatar.splats),
        "views_per_s": settings.iterations / seconds,
        **evaluate_views(trainer, trainer.split.held_out),
    }
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


if __name__ == "__main__":
    main()
