"""Time and memory of `snakemake -n` for large batches, with and without cap4d_core's shortcuts.

    python -m benchmarks.planning --subjects 60 500 [--json FILE]

Every subject has 8 shards x 5 rounds and 4 driving sequences. Nothing is run: files are empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.workflow.snakemake_runs import ROOT, job_counts, snakemake_environment
from tests.workflow.test_dry_runs import write_project

SHORTCUTS = "speed_up_planning()\n"


def plain_checkout(folder: Path) -> Path:
    """The project as links, with rules that do not call for the shortcuts."""
    folder.mkdir()
    for name in ("workflow_scripts", "cap4d_core", "envs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "Snakefile", folder)
    shutil.copytree(ROOT / "rules", folder / "rules")
    common = folder / "rules" / "common.smk"
    text = common.read_text("utf-8")
    assert SHORTCUTS in text
    common.write_text(text.replace(SHORTCUTS, ""), "utf-8")
    return folder


def plan(checkout: Path, project: Path, config: Path) -> dict[str, float]:
    """One dry run."""
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"),
        "--workflow-profile", str(ROOT / "profiles" / "default"), "--cores", "2",
        "-n", "--quiet", "rules", "--configfile", str(config),
    ]  # fmt: skip
    with open(project / "plan.txt", "wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=project, env=snakemake_environment(project), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    text = (project / "plan.txt").read_text("utf-8")
    if status:
        raise SystemExit(text)
    return {
        "jobs": sum(job_counts(text).values()),
        "wall_s": time.monotonic() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, nargs="+", default=[60, 500])
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    rows = []
    print("| subjects | jobs | shortcuts | CPU | wall | memory |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        checkouts = {"no": plain_checkout(Path(name) / "plain"), "yes": ROOT}
        for subjects in a.subjects:
            project = Path(name) / str(subjects)
            config = write_project(project, subjects, 4)
            for shortcuts, checkout in checkouts.items():
                row = plan(checkout, project, config)
                rows.append({"subjects": subjects, "shortcuts": shortcuts, **row})
                print(
                    f"| {subjects} | {row['jobs']} | {shortcuts} | {row['cpu_s']:.1f} s "
                    f"| {row['wall_s']:.1f} s | {row['memory_gb']:.2f} GB |",
                    flush=True,
                )
    if a.json:
        a.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
