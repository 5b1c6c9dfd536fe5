"""What finished jobs of a results folder took: benchmark files beside the job files.

{results}/benchmarks/{rule}/**.tsv        seconds and memory, written when a job went well
{results}/logs/{rule}/**.job.json         its settings, written when it started
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cap4d_core.job import MEMORY_ELSEWHERE

# More say nothing new, and reading them takes long on a network disk.
MAX_JOBS_PER_RULE = 200
# Settings that do not change what a job costs.
_IRRELEVANT = frozenset({"seed"})


@dataclass(frozen=True)
class Measurement:
    """One finished job.

    Attributes:
        rule: its stage.
        settings: digest of the settings it ran with, see `settings_digest`.
        seconds: wall time.
        memory_mb: largest resident memory of its processes, in MB; None where it was not sampled.
    """

    rule: str
    settings: str
    seconds: float
    memory_mb: float | None


def settings_digest(settings: Mapping[str, Any] | None) -> str:
    """Short name of a stage's settings: jobs of other settings take other times."""
    if settings is None:
        return "none"
    relevant = {key: value for key, value in settings.items() if key not in _IRRELEVANT}
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_measurements(results: str | Path) -> list[Measurement]:
    """Finished jobs below a results folder, evenly chosen where there are very many.

    What is unreadable, or was measured with other settings than its job file says, is left out.
    """
    root = Path(results) / "benchmarks"
    found = []
    for rule, files in sorted(_files_by_rule(root).items()):
        step = max(1, len(files) / MAX_JOBS_PER_RULE)
        chosen = [files[int(i * step)] for i in range(min(len(files), MAX_JOBS_PER_RULE))]
        for file in chosen:
            job = Path(results) / "logs" / file.relative_to(root).with_suffix(".job.json")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found.append(_read(rule, file, job))
    return found


def _files_by_rule(root: Path) -> dict[str, list[Path]]:
    by_rule: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        if entry.is_dir():
            by_rule[entry.name] = sorted(entry.rglob("*.tsv"))
        elif entry.suffix == ".tsv":  # stages with a single job
            by_rule[entry.stem] = [entry]
    return by_rule


def _read(rule: str, benchmark: Path, job_file: Path) -> Measurement:
    if benchmark.stat().st_mtime < job_file.stat().st_mtime - 1:
        raise ValueError("of an earlier job: the last one was begun after it, and failed")
    row = next(_rows(benchmark))
    job = json.loads(job_file.read_text("utf-8"))
    # Where a warm worker did the job, Snakemake measured the process that waited for it.
    memory = "-" if job.get(MEMORY_ELSEWHERE) else row["max_rss"]
    return Measurement(
        rule,
        settings_digest(job["params"].get("settings")),
        float(row["s"]),
        float(memory) if memory not in ("-", "NA", "") else None,
    )


def benchmark_seconds(path: Path) -> float | None:
    """Wall time in a benchmark file; None without a readable one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(next(_rows(path))["s"])
    return None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return iter(rows)
