"""Snakemake's job schedulers compared: greedy and ILP (pulp), on the local executor.

Two small workflows of the same shape as ours (subjects x rounds x shards, each shard needs all
shards of the round before, then a fit and some animations):

- `trivial`: jobs that only touch their output; what is left is Snakemake's own time.
- `mixed`: jobs that sleep, GPU and CPU jobs with a limited number of GPUs; how well the scheduler
  keeps the GPUs busy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRIVIAL = """
S, R, N, A = {subjects}, {rounds}, {shards}, {animations}
rule all:
    input: expand("a/{{s}}/{{a}}", s=range(S), a=range(A))
rule track:
    output: "t/{{s}}"
    resources: mem_mb=100
    shell: "{track}"
def previous(w):
    if w.r == "0":
        return f"t/{{w.s}}"
    return expand("v/{{s}}/{{r}}/{{n}}", s=w.s, r=int(w.r) - 1, n=range(N))
rule sample:
    input: previous
    output: "v/{{s}}/{{r}}/{{n}}"
    resources: gpu=1, mem_mb=100
    shell: "{sample}"
rule fit:
    input: expand("v/{{{{s}}}}/{{r}}/{{n}}", r=R - 1, n=range(N))
    output: "f/{{s}}"
    resources: gpu=1, mem_mb=100
    shell: "{fit}"
rule animate:
    input: "f/{{s}}"
    output: "a/{{s}}/{{a}}"
    resources: gpu=1, mem_mb=100
    shell: "{animate}"
"""
TOUCH = "touch {output}"
# The kernel's clock in nanoseconds: no Python in the jobs.
TIMED = "b=$(date +%s%N); sleep {seconds}; echo $b $(date +%s%N) > {output}"


def count_jobs(a: argparse.Namespace) -> int:
    return a.subjects * (2 + a.rounds * a.shards + a.animations)


def run(folder: Path, scheduler: str, cores: int, gpus: int) -> dict[str, float]:
    """Wall time, CPU time and memory of one run of the Snakefile in `folder`."""
    command = [
        sys.executable, "-m", "snakemake", "--cores", str(cores), "--resources", f"gpu={gpus}",
        "--scheduler", scheduler, "--quiet", "all", "--workflow-profile", "none",
    ]  # fmt: skip
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    if status:
        raise SystemExit(f"{scheduler}: Snakemake failed in {folder}")
    return {
        "wall_s": wall,
        # Jobs are children that Snakemake waited for, so they are included.
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_mb": usage.ru_maxrss / 1024,
    }


def gpu_use(folder: Path, gpus: int) -> dict[str, float]:
    """Share of the GPUs' time that was used, and the most jobs on GPUs at once."""
    spans = []
    for kind in "vfa":
        for path in (folder / kind).rglob("*"):
            if path.is_file():
                begin, end = map(int, re.findall(r"\d+", path.read_text()))
                spans.append((begin / 1e9, end / 1e9))
    first, last = min(b for b, _ in spans), max(e for _, e in spans)
    busy = sum(e - b for b, e in spans)
    most = max(sum(b <= moment < e for b, e in spans) for moment, _ in spans)
    return {"gpu_busy": busy / (gpus * (last - first)), "most_gpu_jobs": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--animations", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    works = {
        "trivial": dict.fromkeys(("track", "sample", "fit", "animate"), TOUCH),
        # A tenth of what such jobs take in minutes, in seconds.
        "mixed": {
            name: TIMED.replace("{seconds}", str(seconds))
            for name, seconds in (("track", 2), ("sample", 1), ("fit", 3), ("animate", 0.5))
        },
    }
    rows = []
    print(f"{count_jobs(a)} jobs, {a.cores} cores, {a.gpus} GPUs")
    print(
        "| work | scheduler | wall | CPU of all | memory | GPUs busy |\n|---|---|---|---|---|---|"
    )
    for work, commands in works.items():
        for repeat in range(a.repeats):
            for scheduler in ("greedy", "ilp"):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    text = TRIVIAL.format(
                        subjects=a.subjects, rounds=a.rounds, shards=a.shards,
                        animations=a.animations, **commands,
                    )  # fmt: skip
                    (folder / "Snakefile").write_text(text)
                    row = run(folder, scheduler, a.cores, a.gpus)
                    if work == "mixed":
                        row |= gpu_use(folder, a.gpus)
                rows.append({"work": work, "scheduler": scheduler, "repeat": repeat, **row})
                busy = f"{row['gpu_busy']:.0%}" if "gpu_busy" in row else ""
                print(
                    f"| {work} | {scheduler} | {row['wall_s']:.1f} s | {row['cpu_s']:.1f} s "
                    f"| {row['rss_mb']:.0f} MB | {busy} |",
                    flush=True,
                )
    if a.json:
        a.json.write_text(json.dumps({"jobs": count_jobs(a), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
