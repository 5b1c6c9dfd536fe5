"""Running Snakemake in a subprocess, as a user does, and reading what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def snakemake_command(*words: str, profile: str = "default") -> list[str]:
    """The project's Snakefile with a profile."""
    return [
        sys.executable, "-m", "snakemake",
        "--snakefile", str(ROOT / "Snakefile"),
        "--workflow-profile", str(ROOT / "profiles" / profile),
        *words,
    ]  # fmt: skip


def snakemake_environment(folder: Path, **changes: str) -> dict[str, str]:
    """Environment without a scheduler's variables, on the CPU, with a cache of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CAP4D_GPU"))}
    return clean | {"CAP4D_DEVICE": "cpu", "XDG_CACHE_HOME": str(folder / ".cache")} | changes


def run_snakemake(
    folder: Path,
    *words: str,
    profile: str = "default",
    timeout: float = 600,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs the project's Snakefile in `folder`; output of both kinds in `stdout`."""
    return subprocess.run(
        snakemake_command(*words, profile=profile),
        cwd=folder,
        env=snakemake_environment(folder, **(environment or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def dry_run(folder: Path, config: Path, *words: str, profile: str = "default") -> dict[str, int]:
    """Jobs per rule of a dry run; an empty dictionary when there is nothing to do."""
    result = run_snakemake(
        folder, "--cores", "2", "-n", "--quiet", "rules", "--configfile", str(config), *words,
        profile=profile,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return job_counts(result.stdout)


def job_counts(output: str) -> dict[str, int]:
    """The first table `Job stats` of Snakemake's output."""
    table = output.partition("Job stats:")[2].partition("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}
