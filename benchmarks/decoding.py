"""Decoding of generated views: the network alone against the whole job, per view.

    python -m benchmarks.decoding --work FOLDER [--views 168] [--size released|small] [--json FILE]

Random weights; their pictures compress worse than those of trained ones. FOLDER is the one of
job_start.py, or a new one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from benchmarks.job_start import prepare
from cap4d_core.diffusion.decoding import decode_views
from cap4d_core.diffusion.network_setup import load_autoencoder
from cap4d_core.diffusion.view_plan_file import read_plan
from cap4d_core.files.basic import write_safetensors
from cap4d_core.settings import SamplingSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--views", type=int, default=168)
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # What job_start's inputs depend on besides.
    vars(arguments).update(shards=1, steps=100, stop_after=2, references=1)
    prepare(arguments)
    work = arguments.work.resolve()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = work / "views/plan.npz"
    count = len(read_plan(plan).views)
    config = json.loads((work / "mmdm/config.json").read_text())["model"]
    side = config["latent_size"]
    latents = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(0))
    shard = work / "decoding/latents.safetensors"
    write_safetensors(
        shard, {"latents": latents, "view_ids": torch.arange(count)}, {"next_step": "100"}
    )
    settings = SamplingSettings(num_inference_steps=100, resolution=8 * side)
    rows = [("network alone", network_alone(work / "mmdm", settings, device, latents[:32]))]
    for run in (1, 2):
        out = work / "decoding/views"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        decode_views(plan, shard, work / "mmdm", out, out / "index.json", settings, device)
        rows.append((f"whole job, run {run}", (time.perf_counter() - start) / count * 1e3))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, {count} views of {8 * side} px")
    for name, milliseconds in rows:
        ratio = milliseconds / rows[0][1]
        print(f"{name:20} {milliseconds:8.1f} ms per view  {ratio:5.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "ms_per_view": dict(rows)}))


def network_alone(
    mmdm: Path, settings: SamplingSettings, device: torch.device, latents: torch.Tensor
) -> float:
    """Milliseconds per view of the autoencoder in the type that the job takes."""
    autoencoder, _ = load_autoencoder(mmdm, settings, device)
    if device.type == "cuda":
        autoencoder = autoencoder.to(memory_format=torch.channels_last).half()
    latents = latents.to(device)
    with torch.no_grad():
        for timed in (False, True):
            start = time.perf_counter()
            for row in latents.split(1) if timed else latents[:3].split(1):
                autoencoder.decode(row)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(latents) * 1e3


if __name__ == "__main__":
    main()
