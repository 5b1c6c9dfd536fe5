"""What one SLURM job costs beyond its work: trivial jobs through profiles/slurm.

    . STATE/env.sh; python benchmarks/slurm_overhead.py --jobs 500 [--json FILE]

needs a SLURM with a partition `gpu` (tests/slurm/slurm_up.sh makes a throw-away one). Every job
asks for a GPU and only notes the time. CPU time of the jobs is sampled from /proc twice a second,
so it is seen only where the nodes are this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SNAKEFILE = """
rule all:
    input: expand("out/{{i}}.txt", i=range({jobs}))
rule trivial:
    output: "out/{{i}}.txt"
    resources: gpu=1, mem_mb=400, runtime=5
    shell: "date +%s.%N > {{output}}"
"""
TICKS = os.sysconf("SC_CLK_TCK")


class JobProcesses(threading.Thread):
    """CPU seconds of all processes of SLURM jobs on this machine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[tuple[str, str], float] = {}
        self._known: dict[str, bool] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        """Looks at all processes until `total` is called."""
        while not self._stopped.wait(0.5):
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    self._look(entry)

    def _look(self, pid: str) -> None:
        try:
            if pid not in self._known:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                self._known[pid] = b"SLURM_JOB_ID=" in environment
            if self._known[pid]:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.seconds[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / TICKS
        except OSError:
            self._known.pop(pid, None)

    def total(self) -> float:
        """Stops looking; seconds of all processes seen."""
        self._stopped.set()
        self.join()
        return sum(self.seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=200, help="jobs in the queue")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    folder = a.work or Path(tempfile.mkdtemp(prefix="slurm-overhead-"))
    folder.mkdir(exist_ok=True)
    (folder / "Snakefile").write_text(SNAKEFILE.format(jobs=a.jobs))
    profile = ROOT / "profiles" / "slurm"
    command = [
        sys.executable, "-m", "snakemake", "--workflow-profile", str(profile),
        "--jobs", str(a.at_once), "--quiet", "rules", "--set-resources", "trivial:nodes=1",
        "--slurm-init-seconds-before-status-checks", "10",
        "--resources", f"gpu={a.at_once}",
    ]  # fmt: skip
    sampler = JobProcesses()
    sampler.start()
    load = os.getloadavg()[0]
    start = time.monotonic()
    with open(folder / "snakemake.txt", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    if status:
        raise SystemExit(f"Snakemake failed: {folder / 'snakemake.txt'}")
    job_cpu = sampler.total()
    worked = [float(path.read_text()) for path in (folder / "out").glob("*.txt")]
    row = {
        "jobs": a.jobs,
        "wall_s": wall,
        "wall_per_job_s": wall / a.jobs,
        "master_cpu_s": usage.ru_utime + usage.ru_stime,
        "master_rss_mb": usage.ru_maxrss / 1024,
        "job_cpu_s": job_cpu / a.jobs,
        "first_to_last_s": max(worked) - min(worked),
        "load_before": load,
        "cores": len(os.sched_getaffinity(0)),
    }
    for key, value in row.items():
        print(f"{key:18} {value:.3g}" if isinstance(value, float) else f"{key:18} {value}")
    if a.json:
        a.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
