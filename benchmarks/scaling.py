"""Sampling stage through Snakemake on several GPUs against one unsharded process on one GPU.

    python -m benchmarks.scaling --work FOLDER [--views 840] [--steps 100] [--shards 8]
        [--gpus 4] [--subjects 1] [--size released|small] [--cold-jobs] [--only one|several]
        [--kernels make|kept] [--precision auto|fp8] [--json FILE]

Demo subjects, random weights, default preset. What comes before sampling (head model, weights,
plans, references) is made first and not timed, nor is compiling kernels (one short run). Prints the
sampling loops (seconds per step x steps, as the jobs log them), the wall time of the whole stage,
the share of everything else in it, and both as ratios to one GPU. `--cold-jobs`: no warm workers.
`--kernels make` ends after compiling; `--kernels kept` goes on from there in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cap4d_core.gpu import visible_gpus

ROOT = Path(__file__).resolve().parents[1]
PACE = re.compile(r"views: ([\d.]+) s per step, (\d+) steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--views", type=int, default=840)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=len(visible_gpus()) or 1)
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--precision", default="auto", help="as sampling.precision")
    parser.add_argument("--cold-jobs", action="store_true")
    parser.add_argument("--only", choices=["one", "several"])
    parser.add_argument("--kernels", choices=["make", "kept"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_weights(arguments)
    gpus = visible_gpus() or ["cpu"]
    start = time.perf_counter()
    snakemake(
        arguments, "base", arguments.shards, gpus, "--until", "plan_views", "encode_references"
    )
    print(f"made what comes before: {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    if arguments.only != "several":
        rows += measure(arguments, "one", 1, gpus[:1])
    if arguments.only != "one":
        rows += measure(arguments, "several", arguments.shards, gpus[: arguments.gpus])
    if len(rows) == 2:
        one, several = rows
        print(
            f"speed-up on {several['gpus']} GPUs: sampling loops "
            f"{one['loop_s'] / several['loop_per_gpu_s']:.2f}, "
            f"whole stage {one['wall_s'] / several['wall_s']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def make_weights(arguments: argparse.Namespace) -> None:
    if (arguments.work / "mmdm/config.json").exists():
        return
    code = (
        "import sys; from benchmarks.job_start import write_weights; "
        "write_weights(sys.argv[1], sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(arguments.work), arguments.size],
        check=True, cwd=ROOT, env=environment(arguments, []),
    )  # fmt: skip


def measure(
    arguments: argparse.Namespace, name: str, shards: int, gpus: list[str]
) -> list[dict[str, Any]]:
    """Whole sampling stage of all subjects on these GPUs; nothing if only kernels are wanted."""
    if arguments.kernels != "kept":
        # As many batches per call as in the run to come, two steps.
        start = time.perf_counter()
        copy_base(arguments.work, f"{name}-compile")
        snakemake(arguments, f"{name}-compile", shards, gpus[:1], short=True)
        seconds = time.perf_counter() - start
        print(f"{name}: compiled and sampled 2 steps: {seconds:.1f} s", flush=True)
    if arguments.kernels == "make":
        return []
    copy_base(arguments.work, name)
    start = time.perf_counter()
    snakemake(arguments, name, shards, gpus)
    wall = time.perf_counter() - start
    results = arguments.work / name / "results"
    loops, starts = [], []
    for log in sorted((results / "logs/sample_views").rglob("*.log")):
        found = PACE.search(log.read_text())
        if found:
            loops.append(float(found[1]) * int(found[2]))
        table = results / "benchmarks" / log.relative_to(results / "logs").with_suffix(".tsv")
        if found and table.exists():
            starts.append(float(table.read_text().split("\n")[1].split("\t")[0]) - loops[-1])
    decoding = [
        float(table.read_text().split("\n")[1].split("\t")[0])
        for table in sorted((results / "benchmarks/decode_views").rglob("*.tsv"))
    ]
    row = {
        "name": name,
        "gpus": len(gpus),
        "shards": shards,
        "jobs": len(loops),
        "wall_s": wall,
        "loop_s": sum(loops),
        "loop_per_gpu_s": sum(loops) / len(gpus),
        "rest_of_jobs_s": [round(s, 2) for s in starts],
        "decode_jobs_s": [round(s, 2) for s in decoding],
        "other_share": 1 - sum(loops) / len(gpus) / wall,
    }
    print(
        f"{name}: {len(gpus)} GPU(s), {shards} shard(s), {len(loops)} sampling jobs: {wall:.1f} s, "
        f"loops {row['loop_per_gpu_s']:.1f} s per GPU, everything else {row['other_share']:.1%}\n"
        f"  sampling jobs without their loops: {row['rest_of_jobs_s']} s\n"
        f"  decoding jobs: {row['decode_jobs_s']} s",
        flush=True,
    )
    return [row]


def copy_base(work: Path, name: str) -> None:
    """What comes before sampling, as links, with its times."""
    shutil.rmtree(work / name, ignore_errors=True)
    # Not its locks: a link to one is held with it.
    locks = shutil.ignore_patterns("lock", "*.lock")
    shutil.copytree(work / "base", work / name, copy_function=os.link, ignore=locks)


def snakemake(
    arguments: argparse.Namespace,
    name: str,
    shards: int,
    gpus: list[str],
    *options: str,
    short: bool = False,
) -> None:
    """A run of the workflow in a folder of its own."""
    folder = arguments.work / name
    folder.mkdir(exist_ok=True)
    names = [f"s{i}" for i in range(arguments.subjects)]
    rows = [f"{subject}\tdemo:{24 + i}" for i, subject in enumerate(names)]
    write(folder / "subjects.tsv", "\n".join(["subject\treference", *rows]) + "\n")
    write(folder / "driving.tsv", "driving\tfit\ntalk\tdemo\n")
    sampling: dict[str, Any] = {
        "num_views": arguments.views,
        "num_inference_steps": arguments.steps,
        "num_shards": shards,
        "max_references": arguments.references,
        "precision": arguments.precision,
        "compile": "on" if arguments.size == "released" else "off",
    }
    if short:
        # One shard alone: the batches of a step, and so the shapes of calls, are the same.
        sampling |= {"num_inference_steps": 2, "sync_steps": []}
    if arguments.size == "small":
        sampling |= {"resolution": 128}
    config = {
        "quality": "default",
        "subjects": "subjects.tsv",
        "driving": "driving.tsv",
        "results": "results",
        "demo": {"num_references": arguments.references},
        "mmdm": {"path": str(arguments.work / "mmdm")},
        "sampling": sampling,
    }
    write(folder / "config.yaml", json.dumps(config))
    target = ["sample_all"]
    if short:
        target = [f"results/s0/views/generated_images/index/1-of-{shards}.json", "--notemp"]
    command = [
        sys.executable, "-m", "snakemake", *target, "--snakefile", str(ROOT / "Snakefile"),
        "--workflow-profile", str(ROOT / "profiles/workstation"), "--configfile", "config.yaml",
        # What was copied was made with other numbers of shards and steps, and fits.
        "--rerun-triggers", "mtime", *options,
    ]  # fmt: skip
    with open(folder / "snakemake.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(
            command, cwd=folder, stdout=log, stderr=log, env=environment(arguments, gpus)
        ).returncode
    if code:
        print((folder / "snakemake.txt").read_text()[-4000:])
        raise SystemExit(f"Snakemake failed with code {code} in {folder}")


def write(path: Path, text: str) -> None:
    """A new file, for `path` may be a link to one that is used elsewhere."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def environment(arguments: argparse.Namespace, gpus: list[str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    extra = {"PYTHONPATH": path, "CAP4D_CACHE": str(arguments.work / "cache")}
    if gpus and gpus != ["cpu"]:
        extra["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    extra["CAP4D_WARM_WORKER"] = "0" if arguments.cold_jobs else "1"
    return os.environ | extra


if __name__ == "__main__":
    main()
