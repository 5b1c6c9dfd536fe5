"""Start of a sampling job: what happens when, from the start of Python to the second step.

    python -m benchmarks.job_start --work FOLDER [--views 840] [--shards 2] [--stop-after 3]
        [--runs 2] [--references 1] [--size released|small] [--json FILE]

Makes a subject of the demo world and random weights in FOLDER (kept there), then runs the script
of rule sample_views in new processes: the first with empty caches of compiled kernels, the others
with what it left. One table per run: seconds since the process started at which parts began and
ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMES_VARIABLE = "JOB_START_TIMES"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--views", type=int, default=840, help="of the job")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="of the run; see --stop-after")
    parser.add_argument("--stop-after", type=int, default=3, help="steps that are really run")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child)
        return
    job = prepare(arguments)
    runs = [run_job(job, number, arguments.work) for number in range(arguments.runs)]
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2))


def prepare(arguments: argparse.Namespace) -> Path:
    """Inputs of a sampling job and its job file."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    done = work / f"prepared-{arguments.size}-{arguments.views}-{arguments.references}"
    settings = {
        "num_views": arguments.views * arguments.shards,
        "num_inference_steps": arguments.steps,
        "max_references": arguments.references,
        "num_shards": arguments.shards,
        # The round ends early: what follows the start is not measured here.
        "sync_steps": [arguments.stop_after],
        "compile": "on",
    }
    if arguments.size == "small":
        settings["resolution"] = 128
    if not done.exists():
        start = time.perf_counter()
        code = (
            "from benchmarks.job_start import write_inputs; import json, sys; "
            "write_inputs(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
        )
        subprocess.run(
            [
                sys.executable, "-c", code, str(work), json.dumps(settings), arguments.size,
                str(arguments.references),
            ],
            check=True, cwd=ROOT, env=environment(),
        )  # fmt: skip
        done.touch()
        print(f"inputs made in {time.perf_counter() - start:.1f} s", flush=True)
    job = {
        "format": 1,
        "folder": str(work),
        "rule": "sample_views",
        "input": {
            "plan": [str(work / "views/plan.npz")],
            "references": [str(work / "views/latents.safetensors")],
            "mmdm": [str(work / "mmdm")],
            "head_model": [str(work / "head_model")],
        },
        "output": {"latents": [str(work / "views/rounds/1/1-of-1.safetensors")]},
        "params": {"settings": settings},
        "wildcards": {
            "subject": "benchmark",
            "round": "1",
            "scatteritem": f"1-of-{arguments.shards}",
        },
        "threads": 4,
        "num_gpus": 1,
    }
    path = work / "sample_views.job.json"
    path.write_text(json.dumps(job, indent=2))
    return path


def write_weights(work: str, size: str) -> None:
    """Head model of the demo world and random weights that fit it."""
    import torch

    from benchmarks.sampling import SMALL
    from cap4d_core.demo.head import write_demo_head
    from cap4d_core.diffusion.autoencoder import Autoencoder
    from cap4d_core.diffusion.checkpoint import save_mmdm
    from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
    from cap4d_core.diffusion.renderer_tables import head_model_tables
    from cap4d_core.flame.assets import prepare_head_model

    folder = Path(work)
    if (folder / "mmdm/config.json").exists():
        return
    config = SMALL if size == "small" else MMDMConfig()
    prepare_head_model(write_demo_head(folder / "head"), None, folder / "head_model")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        denoiser, autoencoder = MMDMDenoiser(config), Autoencoder(config.autoencoder)
    tables = head_model_tables(folder / "head_model")
    save_mmdm(folder / "mmdm", denoiser, autoencoder, tables, {"source": {"name": "random"}})


def write_inputs(work: str, settings: dict[str, Any], size: str, references: int) -> None:
    """Head model, random weights, plan and reference latents."""
    import torch

    from benchmarks.sampling import SMALL
    from cap4d_core.demo.world import write_demo_subject
    from cap4d_core.diffusion import view_plan
    from cap4d_core.diffusion.model_config import MMDMConfig
    from cap4d_core.files.basic import write_safetensors
    from cap4d_core.settings import SamplingSettings

    folder = Path(work)
    config = SMALL if size == "small" else MMDMConfig()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_weights(work, size)
    write_demo_subject(
        folder / "subject", 24, num_references=references, resolution=160, device=device
    )
    if importlib.util.find_spec("matplotlib") is None:
        vars(view_plan)["write_view_cloud"] = lambda *_: None
    view_plan.plan_views(
        folder / "subject",
        folder / "head_model",
        folder / "views/plan.npz",
        SamplingSettings(**settings),
        "benchmark",
    )
    shape = (references, config.in_channels, config.latent_size, config.latent_size)
    write_safetensors(folder / "views/latents.safetensors", {"latents": torch.randn(shape)}, {})


def run_job(job: Path, number: int, work: Path) -> dict[str, Any]:
    """One process; its parts, printed as a table."""
    compiled = work / "compiled"
    if number == 0:
        shutil.rmtree(compiled, ignore_errors=True)
    times = work / f"times-{number}.json"
    times.unlink(missing_ok=True)
    shutil.rmtree(work / "views/rounds", ignore_errors=True)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, __file__, "--work", str(work), "--child", str(job)],
        env=environment({TIMES_VARIABLE: str(times)}),
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - start
    if result.returncode or not times.exists():
        print(result.stderr[-3000:], flush=True)
        raise SystemExit(f"the job failed with code {result.returncode}")
    parts = json.loads(times.read_text())
    print(f"run {number}: {wall:.2f} s in all", flush=True)
    for name, begin, end, thread in parts:
        print(f"  {begin:7.2f} {end:7.2f} {end - begin:7.2f} s  {name} [{thread}]", flush=True)
    return {"wall": wall, "parts": parts, "log": result.stderr[-2000:]}


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "CAP4D_WARM_WORKER": "0"} | (extra or {})


class Recorder:
    """Begin and end of calls, in seconds since the process started."""

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = uptime - ticks / os.sysconf("SC_CLK_TCK")
        self.zero = time.perf_counter() - age
        self.parts: list[tuple[str, float, float, str]] = []

    def add(self, name: str, begin: float) -> None:
        """Records a part that ends now."""
        now = time.perf_counter()
        thread = threading.current_thread().name
        self.parts.append((name, begin - self.zero, now - self.zero, thread))

    def wrap(self, owner: Any, name: str) -> None:
        """Replaces a function by one that is recorded."""
        function: Callable[..., Any] | None = getattr(owner, name, None)
        if function is None:
            return

        def recorded(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.add(name, begin)

        setattr(owner, name, recorded)


def run_child(job: Path) -> None:
    """The job with its parts recorded."""
    recorder = Recorder()
    recorder.add("python", recorder.zero)
    begin = time.perf_counter()
    import torch

    recorder.add("import torch", begin)
    begin = time.perf_counter()
    torch.cuda.is_available() and torch.zeros(1, device="cuda")
    recorder.add("CUDA", begin)
    begin = time.perf_counter()
    from cap4d_core.diffusion import compiled_network, fast_sampling, sampler, sampling
    from cap4d_core.flame.model import HeadModel

    recorder.add("import of the stage", begin)
    for owner, names in (
        (sampling, ("read_plan", "_load", "load_model", "_starting_state", "ConditioningRenderer")),
        (sampling, ("route_denoiser", "sample_stochastic_io", "write_image", "_preview")),
        (sampling, ("fingerprint", "sha256_file", "write_safetensors")),
        (HeadModel, ("load",)),
        (fast_sampling.FastSamplingDenoiser, ("prepare",)),
        (compiled_network.CompiledNetwork, ("_prepare", "_load", "_compile_to")),
        (sampler, ("step_latents",)),
    ):
        for name in names:
            recorder.wrap(owner, name)
    from cap4d_core import job as job_module

    sys.argv = [__file__, str(job), "--in-place"]
    sys.path.insert(0, str(ROOT / "workflow_scripts"))
    import sample_views  # type: ignore[import-not-found]

    try:
        job_module.run(sample_views.main)
    finally:
        Path(os.environ[TIMES_VARIABLE]).write_text(json.dumps(recorder.parts))


if __name__ == "__main__":
    main()
