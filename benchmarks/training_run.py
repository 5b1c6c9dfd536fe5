"""Runs the training of a diffusion model as the rule train_mmdm does, on procedural people.

    python -m benchmarks.training_run /tmp/run --steps 300 [--kill-at 200] [--processes 2] ...
    python -m benchmarks.training_run --compare /tmp/run_a /tmp/run_b

The second call of the same command goes on where the first one stopped or was killed; `--kill-at`
ends the process with SIGKILL after that step of the denoiser, as a power cut would. Prints one line
of JSON: seconds, steps per second, the last losses and measured quality.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from pathlib import Path

import torch
import yaml

from cap4d_core.avatar.lpips import Lpips
from cap4d_core.diffusion.training.records import read_records
from cap4d_core.diffusion.training.train import train_mmdm
from cap4d_core.files.basic import read_safetensors
from cap4d_core.progress import Progress
from cap4d_core.training_settings import TrainingSettings

RECIPE = Path(__file__).parents[1] / "cap4d_core" / "demo" / "weights" / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="folder of the run")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="RUN")
    parser.add_argument("--people", type=int, default=48)
    parser.add_argument("--views", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300, help="of the denoiser")
    parser.add_argument("--autoencoder-steps", type=int, default=0, help="0 = the demo weights'")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="processes that make people")
    parser.add_argument("--kill-at", type=int, help="step after which to die")
    parser.add_argument("--perceptual", action="store_true", help="LPIPS with random weights")
    parser.add_argument("--start", help="weights to start from")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.compare:
        print(json.dumps(difference(*arguments.compare)))
        return
    if arguments.output is None:
        parser.error("give a folder, or --compare")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    print(json.dumps(run(arguments)), flush=True)


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    """The recipe of the demo weights, shortened."""
    recipe = yaml.safe_load(RECIPE.read_text("utf-8"))["training"]
    recipe["data"] |= {
        "demo_subjects": arguments.people,
        "demo_views": arguments.views,
        "demo_validation": 2,
        "processes": arguments.workers,
    }
    pace = {"warmup_steps": 20, "log_every": 20, "checkpoint_every": 50, "sample_every": 10**6}
    recipe["denoiser"] |= pace | {"steps": arguments.steps, "batch_size": arguments.batch_size}
    recipe["autoencoder"] |= pace | {"steps": max(arguments.autoencoder_steps, 1)}
    recipe["autoencoder"]["perceptual_weight"] = 0.1 if arguments.perceptual else 0.0
    recipe |= {
        "train_autoencoder": arguments.autoencoder_steps > 0,
        "compile": arguments.compile,
        "start": arguments.start,
    }
    if not arguments.autoencoder_steps and arguments.start is None:
        recipe["autoencoder_start"] = str(RECIPE.parent)
    return TrainingSettings.model_validate(recipe)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Trains; what was seen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()

    def die(progress: Progress) -> None:
        is_denoiser = progress.unit == "step" and progress.total == arguments.steps
        if is_denoiser and progress.done == arguments.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train_mmdm(
        settings_of(arguments),
        arguments.output / "no_head_model",  # procedural people bring their own
        arguments.output,
        device=device,
        num_processes=arguments.processes,
        threads=os.cpu_count() or 1,
        make_perceptual=random_lpips if arguments.perceptual else None,
        callback=None if arguments.kill_at is None else die,
    )
    seconds = time.monotonic() - began
    records = read_records(arguments.output / "metrics.jsonl")
    rates = [e["samples_per_second"] for e in records if e["phase"] == "denoiser"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processes": arguments.processes,
        "seconds": round(seconds, 1),
        "denoiser_samples_per_second": rates[-1] if rates else None,
        "last": {entry["phase"]: entry for entry in records},
    }


def random_lpips() -> Lpips:
    """The network of LPIPS without its weights: for the run time, not for quality."""
    torch.manual_seed(0)
    network = Lpips()
    with torch.no_grad():
        for head in network.heads:
            head.normal_().abs_()
    return network.eval().requires_grad_(False)


def difference(first: Path, second: Path) -> dict[str, object]:
    """Largest difference of the trained denoisers of two runs."""
    name = Path("checkpoints") / "denoiser.safetensors"
    a, b = (read_safetensors(folder / name)[0] for folder in (first, second))
    largest = max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
    size = max(float(t.float().abs().max()) for t in a.values())
    return {"largest_difference": largest, "largest_weight": size, "equal": largest == 0.0}


if __name__ == "__main__":
    main()
