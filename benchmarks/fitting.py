"""Speed of the avatar fit: iterations and views per second, where the time of a step goes.

    python benchmarks/fitting.py HEAD IMAGE_SET [--preset default] [--batch 1 4 8] [--size 512]
        [--uv 128] [--splats 100000] [--steps 100] [--lpips] [--json FILE]

HEAD is a folder written by prepare_head_model. The views of IMAGE_SET are resampled to `--size`;
`--lpips` adds the perceptual loss with random weights (same cost as real ones).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import ImageData, load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import PRESETS, FittingSettings


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = HeadModel.load(arguments.head, lower_jaw=True).to(device)
    data = resampled(load_image_data([arguments.image_set]), arguments.size).to(device)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{machine}, {arguments.size} px, preset {arguments.preset}")
    rows = [measure(arguments, head, data, batch) for batch in arguments.batch]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("head", type=Path)
    parser.add_argument("image_set", type=Path)
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--uv", type=int, help="instead of the preset's UV resolution")
    parser.add_argument("--splats", type=int, help="instead of the preset's number")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lpips", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


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


def measure(
    arguments: argparse.Namespace, head: HeadModel, data: ImageData, batch: int
) -> dict[str, float]:
    """Times steps in the middle of a fit: all terms active, no density control."""
    values = dict(PRESETS[arguments.preset].get("fitting", {}))
    values |= {"batch_size": batch, "densify_until": 0, "lpips_start": 0, "lpips_end": 1}
    values |= {"sh_warmup": 1}
    if arguments.uv:
        values["uv_resolution"] = arguments.uv
    if arguments.splats:
        values["num_gaussians_init"] = arguments.splats
    settings = FittingSettings(**values)
    device = head.template.device
    lpips = None
    if arguments.lpips:
        lpips = Lpips()
        with torch.no_grad():
            for parameter in lpips.parameters():
                parameter.normal_(0, 0.05)
        lpips = lpips.to(device)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    trainer = AvatarTrainer(avatar, data, settings, lpips=lpips)
    warm_up = min(20, arguments.steps)
    for step in range(1, warm_up + 1):
        trainer.step(step)
    synchronise(device)
    started = time.perf_counter()
    for step in range(warm_up + 1, warm_up + arguments.steps + 1):
        trainer.step(step)
    synchronise(device)
    rate = arguments.steps / (time.perf_counter() - started)
    row = {
        "batch": batch,
        "splats": len(avatar.splats),
        "steps_per_s": round(rate, 2),
        "views_per_s": round(rate * batch, 2),
        "lpips": arguments.lpips,
    }
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(row, flush=True)
    return row


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
