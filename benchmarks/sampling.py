"""Whole sampling stage on random weights: import, plan, encode, sample, decode; time and memory.

    python benchmarks/sampling.py --head SOURCE --subject FOLDER [--size released|small] \
        [--views 28] [--steps 10] [--references 1] [--precision bf16] [--low-memory] \
        [--fast-path auto|off] [--compile auto|on|off] [--json FILE]

`start_s` of sample_views is the time before it samples at full speed: weights, CUDA, conditioning
maps of all views, compilation. Run again with the same --work to see it with compiled kernels kept.

Random weights in the released layout take the time and memory of trained ones. SOURCE is anything
`prepare_head_model` reads, FOLDER a tracking folder; both as written by make_head.py or the demo.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cap4d_core.diffusion.checkpoint import prepare_mmdm
from cap4d_core.diffusion.decoding import decode_views
from cap4d_core.diffusion.denoiser import MMDMConfig
from cap4d_core.diffusion.model_config import AutoencoderConfig
from cap4d_core.diffusion.references import encode_references
from cap4d_core.diffusion.released_layout import (
    random_released_state_dict,
    write_released_checkpoint,
)
from cap4d_core.diffusion.renderer_tables import head_model_tables
from cap4d_core.diffusion.sampling import sample_views
from cap4d_core.diffusion.view_plan import plan_views
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.progress import Progress
from cap4d_core.settings import SamplingSettings

SMALL = MMDMConfig(
    model_channels=32,
    head_channels=16,
    views_per_call=8,
    latent_size=16,
    autoencoder=AutoencoderConfig(base_channels=32, channel_mult=(1, 2, 2, 2)),
)


class Stages:
    """Collects seconds and peak memory per stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: list[dict[str, float | str]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[dict[str, float | str]]:
        """Times a block; the yielded row takes further figures."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, float | str] = {"stage": name}
        start = time.perf_counter()
        yield row
        if cuda:
            torch.cuda.synchronize()
            row["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["seconds"] = time.perf_counter() - start
        row["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rows.append(row)
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{value:18}"
                for key, value in row.items()
            ),
            flush=True,
        )


class StepTimes:
    """Callback that remembers when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, progress: Progress) -> None:  # noqa: D102
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Mean over all steps but the first, which also compiles and allocates."""
        spans = [b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]
        return sum(spans) / max(len(spans), 1)


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SMALL if arguments.size == "small" else MMDMConfig()
    settings = SamplingSettings(
        num_views=arguments.views,
        num_inference_steps=arguments.steps,
        views_per_call=config.views_per_call,
        max_references=arguments.references,
        resolution=config.image_size,
        num_shards=1,
        sync_steps=[],
        precision=arguments.precision,
        low_memory=arguments.low_memory,
        fast_path=arguments.fast_path,
        compile=arguments.compile,
    )
    stages = Stages(device)
    work = Path(arguments.work or tempfile.mkdtemp(prefix="sampling-benchmark-"))
    try:
        run(arguments, config, settings, stages, work, device)
    finally:
        if not arguments.work:
            shutil.rmtree(work)
    if arguments.json:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        content = {"machine": machine, "settings": settings.model_dump(), "stages": stages.rows}
        arguments.json.write_text(json.dumps(content, indent=2))


def run(
    arguments: argparse.Namespace,
    config: MMDMConfig,
    settings: SamplingSettings,
    stages: Stages,
    work: Path,
    device: torch.device,
) -> None:
    head, mmdm = work / "head_model", work / "mmdm"
    views = work / "views"
    if not (mmdm / "config.json").exists():
        prepare_head_model(arguments.head, None, head)
        tables = head_model_tables(head)
        with stages.measure("write checkpoint"):
            write_released_checkpoint(
                work / "model.ckpt", random_released_state_dict(config, tables)
            )
        with stages.measure("prepare_mmdm"):
            prepare_mmdm(work / "model.ckpt", mmdm, config=config)
        (work / "model.ckpt").unlink()
    with stages.measure("plan_views") as row:
        plan = plan_views(arguments.subject, head, views / "plan.npz", settings, "benchmark")
        row["views"] = len(plan.views)
    with stages.measure("encode_references"):
        encode_references(
            arguments.subject, head, mmdm, views / "reference_images", settings, device
        )
    times = StepTimes()
    with stages.measure("sample_views") as row:
        start = time.perf_counter()
        sample_views(
            views / "plan.npz",
            views / "reference_images" / "latents.safetensors",
            mmdm,
            head,
            [],
            views / "shard.safetensors",
            0,
            0,
            settings,
            device=device,
            callback=times,
        )
        row["s_per_step"] = times.seconds_per_step
        row["start_s"] = times.ends[0] - start - times.seconds_per_step
        references = min(settings.max_references, len(plan.references))
        calls = len(plan.views) / (settings.views_per_call - references)
        row["ms_per_call"] = 1e3 * times.seconds_per_step / calls
    with stages.measure("decode_views") as row:
        image_times = StepTimes()
        decode_views(
            views / "plan.npz",
            views / "shard.safetensors",
            mmdm,
            views / "generated_images",
            views / "index.json",
            settings,
            device,
            callback=image_times,
        )
        row["ms_per_view"] = 1e3 * image_times.seconds_per_step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--subject", type=Path, required=True)
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--views", type=int, default=28)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--fast-path", choices=["auto", "off"], default="auto")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--work", help="keep files here (weights are reused)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
