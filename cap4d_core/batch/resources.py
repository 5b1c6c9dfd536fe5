"""Memory and time of jobs, learned from finished ones.

`{results}/resources.json` is written at the end of every run (and by `python -m cap4d_core
learn-resources`) and read at the start of the next. It may be edited or deleted; it changes no
results and makes nothing run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cap4d_core.batch.measurements import Measurement, read_measurements, settings_digest
from cap4d_core.settings import SubjectSettings

FILE_NAME = "resources.json"
FORMAT = 1
# Which settings a rule's jobs get; other rules have none.
SECTIONS = {
    "make_demo_subject": "demo",
    "make_demo_held_out": "demo",
    "make_demo_driving": "demo",
    "track_subject": "tracking",
    "track_driving": "tracking",
    "plan_views": "sampling",
    "encode_references": "sampling",
    "crop_references": "sampling",
    "sample_views": "sampling",
    "decode_views": "sampling",
    "fit_avatar": "fitting",
    "animate_avatar": "animation",
    "evaluate_avatar": "evaluation",
    "evaluate_reenactment": "evaluation",
}
# Nineteen of twenty jobs were below; the margins are for the twentieth and for other machines.
QUANTILE = 0.95
MEMORY_MARGIN = 1.4
TIME_MARGIN = 2.0
# Snakemake itself rides along in every cluster job (two processes), and a job starts up.
MEMORY_EXTRA_MB = 300
TIME_EXTRA_MIN = 5
FLOOR_MB = 1500
FLOOR_MIN = 10
# Fewer jobs than these may raise what a rule asks for, but not lower it.
ENOUGH_JOBS = 5


@dataclass(frozen=True)
class Learned:
    """What to ask for in jobs of one rule and settings; `jobs` is how many were measured."""

    jobs: int
    median_s: float
    mem_mb: int | None
    runtime: int


class LearnedResources:
    """Learned values by rule and settings."""

    def __init__(self, entries: Mapping[tuple[str, str], Learned] | None = None) -> None:
        self.entries = dict(entries or {})

    def find(self, rule: str, settings: SubjectSettings) -> Learned | None:
        """What was learned about a rule with these settings."""
        section = SECTIONS.get(rule)
        values = getattr(settings, section).model_dump(mode="json") if section else None
        return self.entries.get((rule, settings_digest(values)))

    def memory_mb(self, rule: str, settings: SubjectSettings, default: int) -> int:
        """Memory to ask for: learned, or the default."""
        learned = self.find(rule, settings)
        if learned is None or learned.mem_mb is None:
            return default
        return _apply(learned.mem_mb, default, learned.jobs)

    def runtime_min(self, rule: str, settings: SubjectSettings, default: int) -> int:
        """Minutes to ask for: learned, or the default."""
        learned = self.find(rule, settings)
        return default if learned is None else _apply(learned.runtime, default, learned.jobs)


def _apply(learned: int, default: int, jobs: int) -> int:
    return learned if jobs >= ENOUGH_JOBS else max(learned, default)


def learn(measurements: Iterable[Measurement]) -> LearnedResources:
    """Quantile times margin, never below the floors; the same for any order of the jobs."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for measured in measurements:
        groups.setdefault((measured.rule, measured.settings), []).append(measured)
    entries = {}
    for key, group in groups.items():
        seconds = sorted(m.seconds for m in group)
        memory = sorted(m.memory_mb for m in group if m.memory_mb is not None)
        mem_mb = None
        if memory:
            mem_mb = max(FLOOR_MB, _up(quantile(memory) * MEMORY_MARGIN + MEMORY_EXTRA_MB, 100))
        minutes = quantile(seconds) / 60 * TIME_MARGIN + TIME_EXTRA_MIN
        entries[key] = Learned(
            len(group), round(quantile(seconds, 0.5), 2), mem_mb, max(FLOOR_MIN, _up(minutes, 5))
        )
    return LearnedResources(entries)


def quantile(values: Sequence[float], share: float = QUANTILE) -> float:
    """The smallest of sorted values that at least this share of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def _up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def learn_resources(results: str | Path) -> LearnedResources:
    """Learns from the finished jobs of a results folder and writes its resources.json."""
    learned = learn(read_measurements(results))
    stages: dict[str, dict[str, Any]] = {}
    for (rule, settings), entry in sorted(learned.entries.items()):
        stages.setdefault(rule, {})[settings] = {
            "jobs": entry.jobs,
            "median_s": entry.median_s,
            "mem_mb": entry.mem_mb,
            "runtime": entry.runtime,
        }
    if stages:
        path = Path(results) / FILE_NAME
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps({"format": FORMAT, "stages": stages}, indent=2) + "\n")
        temporary.replace(path)
    return learned


def read_learned(results: str | Path) -> LearnedResources:
    """What was learned in a results folder; nothing where there is no usable file."""
    try:
        content = json.loads((Path(results) / FILE_NAME).read_text("utf-8"))
        if content["format"] != FORMAT:
            return LearnedResources()
        return LearnedResources(
            {
                (rule, settings): Learned(**entry)
                for rule, entries in content["stages"].items()
                for settings, entry in entries.items()
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return LearnedResources()
