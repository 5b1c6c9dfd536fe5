"""Quality of the avatar fit by views per step, after the same number of training views.

    python -m benchmarks.fit_quality [--subjects 24 25 26] [--size 128] [--references 64]
        [--views 20000] [--preset low] [--runs parity 1 8] [--set lr_position=0.01 ...]
        [--lpips WEIGHTS] [--jobs 1] [--seconds 0] [--json FILE] [--pictures FOLDER]

Fits the demo world's people: every number is a person and the seed of their fits. A run is `parity`
(one view per step, the published arithmetic) or a number of views per step. The schedules of the
preset are stretched to `--views`. Prints PSNR and SSIM of views that were not trained on, PSNR also
inside the dilated mattes. After `--seconds` of a fit it is scored as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_data import demo_head, demo_views
from cap4d_core.avatar.fit_report import evaluate_views, write_preview
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import Split, load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.training import AvatarTrainer, ViewOrder
from cap4d_core.files.image_set import read_image_set
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import PRESETS, FittingSettings

# Settings that count views.
SCHEDULES = (
    "sh_warmup", "densify_from", "densify_until", "densification_interval",
    "opacity_reset_interval", "lpips_start", "lpips_end",
)  # fmt: skip
SCORES = ("psnr_subject", "psnr", "ssim", "lpips")


def main() -> None:
    arguments = parse_arguments()
    tasks = [(run, subject) for run in arguments.runs for subject in arguments.subjects]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        # Processes of their own: the fits share nothing.
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(write_data, repeat(arguments), [None, *arguments.subjects], repeat(data)))
            futures = [pool.submit(measure, arguments, data, *task) for task in tasks]
            rows = [future.result() for future in futures]
    print(f"\n{arguments.views} views, preset {arguments.preset}, mean (and range) over people")
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
    parser.add_argument("--subjects", type=int, nargs="+", default=[24, 25, 26])
    parser.add_argument("--size", type=int, default=128, help="side of the pictures")
    parser.add_argument("--references", type=int, default=64, help="pictures to train on")
    parser.add_argument("--views", type=int, default=20_000)
    parser.add_argument("--preset", default="low", choices=sorted(PRESETS))
    parser.add_argument("--runs", nargs="+", default=["parity", "8"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--lpips", type=Path, help="weights of the perceptual loss")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--seconds", type=float, default=0, help="limit per fit; 0 = none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for target, render, difference")
    return parser.parse_args()


def write_data(arguments: argparse.Namespace, subject: int | None, folder: Path) -> None:
    """A person's pictures, or (None) the head model."""
    if subject is None:
        demo_head(folder)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    demo_views(folder / str(subject), subject, arguments.size, arguments.references, device)


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
    values |= {key: value_of(text) for key, text in (s.split("=", 1) for s in arguments.set)}
    return FittingSettings(**values)


def value_of(text: str) -> Any:
    """JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(arguments: argparse.Namespace, folder: Path, run: str, subject: int) -> dict[str, Any]:
    """One fit and its scores."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    settings = settings_of(arguments, run, subject)
    head = HeadModel.load(folder / "head", lower_jaw=True).to(device)
    train = read_image_set(folder / str(subject) / "train")
    held_out = read_image_set(folder / str(subject) / "held_out")
    data = load_image_data([train, held_out], settings.parity).to(device)
    lpips = None
    if arguments.lpips:
        lpips = Lpips.load(arguments.lpips, parity=settings.parity, device=device)
    order = ViewOrder(range(len(train)), settings.seed, device)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    trainer = AvatarTrainer(avatar, data, settings, lpips=lpips, view_order=order.rows)
    rows = list(range(len(train)))
    trainer.split = Split(rows, list(range(len(train), len(data))), rows[:1])
    stride = settings.views_per_step
    started = time.perf_counter()
    for iteration in range(stride, settings.iterations + stride, stride):
        losses = trainer.step(iteration)
        if 0 < arguments.seconds < time.perf_counter() - started:
            break
    loss = float(losses[-1])
    seconds = time.perf_counter() - started
    if lpips is not None:
        trainer.lpips = Lpips.load(arguments.lpips, device=device)  # one ruler for all runs
    row = {
        "run": run,
        "subject": subject,
        "views": iteration,
        "loss": loss,
        "splats": len(avatar.splats),
        "views_per_s": iteration / seconds,
        **evaluate_views(trainer, trainer.split.held_out),
    }
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if arguments.pictures:
        picture = arguments.pictures / f"{subject}_{run}.png"
        write_preview(picture, trainer, trainer.split.held_out)
    return row


if __name__ == "__main__":
    main()
