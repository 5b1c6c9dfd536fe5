"""Time of an animation: posing, rendering, H.264 video, PLY export.

    python -m benchmarks.animation [HEAD FIT] [--frames 384] [--size 512] [--preset default]
        [--json FILE]

HEAD is a folder written by prepare_head_model, FIT a fit.npz, whose frames are repeated; without
them, the head and the motion of the demo world. The avatar is a fresh one of the preset's size:
colours do not change the time, but a video of a grey head is easier to encode, so its splats get
random colours and moderate opacity.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo_data import demo_driving, demo_head
from cap4d_core.animation.driver import animate, render_batches
from cap4d_core.animation.trajectories import drive_with
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.files.tracking import Tracking, read_fit
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import PRESETS, AnimationSettings, FittingSettings

DEMO_FRAMES = 96


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    settings = AnimationSettings(resolution=arguments.size)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        head_folder, fit = arguments.inputs or (
            demo_head(Path(folder)),
            demo_driving(Path(folder) / "driving", DEMO_FRAMES),
        )
        tracking = long_tracking(read_fit(fit), arguments.frames)
        avatar = make_avatar(arguments, head_folder, device, Path(folder) / "avatar")
        head = avatar.head
        for repeat in ("first", "second"):
            variants = {
                "video": settings.model_copy(update={"export_ply": False, "export_splats": False}),
                "video, PLY": settings,
            }
            started = time.perf_counter()
            for _ in render_batches(avatar, drive_with(tracking, None, settings), settings):
                pass
            synchronise(device)
            rows.append({"what": "frames alone", "seconds": time.perf_counter() - started})
            for name, variant in variants.items():
                started = time.perf_counter()
                result = animate(avatar, head, (tracking, None), variant, Path(folder) / repeat)
                rows.append({"what": name, "seconds": time.perf_counter() - started})
            for row in rows[-3:]:
                print(f"{repeat:7} {row['what']:14} {row['seconds']:7.2f} s", flush=True)
    print(
        f"{machine}: {result['num_frames']} frames of {result['width']} x {result['height']}, "
        f"{result['num_gaussians']} splats"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, nargs="*", metavar="HEAD FIT")
    parser.add_argument("--frames", type=int, default=384)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(arguments.inputs) not in (0, 2):
        parser.error("give HEAD and FIT, or neither")
    return arguments


def make_avatar(
    arguments: argparse.Namespace, head_folder: Path, device: str, folder: Path
) -> GaussianAvatar:
    """Saved and loaded again, as the stage does; prints how long loading takes."""
    settings = FittingSettings(**PRESETS[arguments.preset].get("fitting", {}))
    head = HeadModel.load(head_folder, lower_jaw=True).to(device)
    avatar = GaussianAvatar.create(head, torch.zeros(150), settings)
    with torch.no_grad():
        avatar.splats.f_dc.normal_(0, 1)
        avatar.splats.opacity.fill_(1.0)
    avatar.active_sh_degree = 3
    avatar.save(folder)
    started = time.perf_counter()
    loaded = GaussianAvatar.load(
        folder, HeadModel.load(head_folder, lower_jaw=True), torch.device(device)
    )
    synchronise(device)
    print(f"        loading        {time.perf_counter() - started:7.2f} s", flush=True)
    return loaded


def long_tracking(tracking: Tracking, count: int) -> Tracking:
    """The motion there and back until it is long enough."""
    frames = tracking.num_frames
    order = np.abs((np.arange(count) + frames) % (2 * frames) - frames)
    order = np.minimum(order, frames - 1)
    names = ("expr", "rot", "tra", "eye_rot", "neck_rot")
    return replace(tracking, **{name: getattr(tracking, name)[order] for name in names})


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
