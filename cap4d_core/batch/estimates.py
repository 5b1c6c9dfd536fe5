"""What a run will take, before it starts: jobs, disk and time, per subject and in total.

Sizes come from a model (`disk_use`), times from jobs of the same settings that are finished already
(`resources`): where there are none, no time is said.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cap4d_core.batch.disk_use import BOOKKEEPING_BYTES, JobSize, job_sizes
from cap4d_core.batch.measurements import read_measurements
from cap4d_core.batch.resources import learn
from cap4d_core.config import Config
from cap4d_core.errors import UserError
from cap4d_core.progress import format_duration

# Rules that only collect what others made.
_TARGETS = frozenset({"all", "track_all", "sample_all", "fit_all", "animate_all", "evaluate_all"})
GPU_RULES = frozenset(
    {
        "encode_references",
        "sample_views",
        "decode_views",
        "fit_avatar",
        "animate_avatar",
        "evaluate_avatar",
        "evaluate_reenactment",
    }
)  # fmt: skip
# Made once, whatever the number of subjects.
_SHARED_RULES = frozenset(
    {
        "download_flame",
        "download_companions",
        "download_mmdm",
        "download_lpips",
        "make_demo_head",
        "make_demo_driving",
        "prepare_head_model",
        "prepare_mmdm",
        "place_landmarks",
        "track_driving",
        "write_report",
        "evaluate",
    }
)
PLAN_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class StageEstimate:
    """Jobs of one rule that are still to be run.

    Attributes:
        rule: its name.
        jobs: how many.
        size: of one job.
        seconds: median of earlier jobs of these settings; None without any.
    """

    rule: str
    jobs: int
    size: JobSize
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What is still to be made."""

    stages: tuple[StageEstimate, ...]
    subjects: int

    @property
    def jobs(self) -> int:
        """Number of jobs."""
        return sum(stage.jobs for stage in self.stages)

    @property
    def kept_bytes(self) -> float:
        """Disk that is filled when everything is made."""
        return sum(stage.jobs * stage.size.kept for stage in self.stages)

    @property
    def peak_bytes(self) -> float:
        """Disk that is filled at most meanwhile, if all subjects are at the same stage."""
        return self.kept_bytes + max((s.jobs * s.size.temporary for s in self.stages), default=0.0)

    def seconds(self, *, gpu: bool) -> float:
        """Time of all jobs whose time is known, one after the other."""
        return sum(
            stage.jobs * stage.seconds
            for stage in self.stages
            if stage.seconds is not None and (stage.rule in GPU_RULES) == gpu
        )

    @property
    def unmeasured(self) -> list[str]:
        """Rules of which no time is known."""
        return [stage.rule for stage in self.stages if stage.seconds is None]


def estimate(config: Config, jobs: Mapping[str, int]) -> Estimate:
    """What jobs will take.

    Args:
        config: the configuration; times are learned in its results folder.
        jobs: how many jobs of each rule are to be run, as planned by Snakemake.
    """
    sizes = job_sizes(config)
    learned = learn(read_measurements(config.results))
    stages = []
    for rule, count in jobs.items():
        if rule in _TARGETS or count == 0:
            continue
        found = learned.find(rule, config.settings)
        size = sizes.get(rule, JobSize(BOOKKEEPING_BYTES))
        stages.append(StageEstimate(rule, count, size, found.median_s if found else None))
    return Estimate(tuple(stages), len(config.subjects))


def planned_jobs(config_file: str, overrides: Sequence[str] = ()) -> dict[str, int]:
    """Jobs per rule that Snakemake would run now in the current folder.

    Raises:
        UserError: the plan cannot be made; with Snakemake's words.
    """
    snakefile = Path(__file__).parents[2] / "Snakefile"
    if not snakefile.is_file():
        raise UserError(f"{snakefile} is not there: run this from a checkout of the pipeline.")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    command += ["--workflow-profile", "none", "--rerun-triggers", "mtime", "input", "params"]
    command += ["--cores", "1", "--dry-run", "--quiet", "rules", "--configfile", config_file]
    command += ["--config", *overrides] if overrides else []
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PLAN_TIMEOUT_S, check=False
    )
    if result.returncode:
        raise UserError(f"No plan can be made:\n{(result.stderr or result.stdout).strip()}")
    table = result.stdout.partition("Job stats:")[2].partition("\ntotal")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def stage_table(found: Estimate) -> str:
    """Jobs, time and disk of every stage."""
    width = max(len("stage"), *(len(stage.rule) for stage in found.stages))
    lines = [f"{'stage':{width}}  {'jobs':>6}  {'time each':>12}  {'disk each':>9}  {'disk':>9}"]
    for stage in found.stages:
        each = "unknown" if stage.seconds is None else format_duration(stage.seconds)
        lines.append(
            f"{stage.rule:{width}}  {stage.jobs:>6}  {each:>12}  "
            f"{size_text(stage.size.kept):>9}  {size_text(stage.jobs * stage.size.kept):>9}"
        )
    return "\n".join(lines)


def describe(found: Estimate, results: str | Path, num_gpus: int | None = None) -> str:
    """Jobs, disk and time in a few lines.

    Args:
        found: the estimate.
        results: folder that is written to, to look at its free space.
        num_gpus: how many GPU jobs may run at once, where known.
    """
    subjects = f"{found.subjects} subject{'s' if found.subjects != 1 else ''}"
    lines = [f"To be run: {found.jobs} jobs for {subjects}."]
    per_subject = [stage for stage in found.stages if stage.rule not in _SHARED_RULES]
    if found.subjects > 1 and per_subject:
        disk = sum(stage.jobs * stage.size.kept for stage in per_subject) / found.subjects
        lines.append(f"Disk per subject: about {size_text(disk)}.")
    free = free_bytes(results)
    lines.append(
        f"Disk in all: about {size_text(found.kept_bytes)}, at most "
        f"{size_text(found.peak_bytes)} meanwhile; {size_text(free)} are free."
    )
    lines += _times(found, num_gpus)
    return "\n".join(lines)


def _times(found: Estimate, num_gpus: int | None) -> list[str]:
    if len(found.unmeasured) == len(found.stages):
        return [
            "Time: unknown, because no job with these settings was finished here yet. One subject "
            "first (--config subject=...) tells."
        ]
    gpu, cpu = found.seconds(gpu=True), found.seconds(gpu=False)
    at_least = "at least " if found.unmeasured else ""
    line = f"Time: {at_least}{format_duration(gpu)} of GPU jobs"
    if num_gpus:
        line += f" ({format_duration(gpu / num_gpus)} with {num_gpus} at once)"
    lines = [f"{line}, {at_least}{format_duration(cpu)} of other jobs; medians of finished jobs."]
    if found.subjects > 1:
        lines.append(
            f"Time per subject: {at_least}{format_duration((gpu + cpu) / found.subjects)}."
        )
    if found.unmeasured:
        lines.append(f"Not measured yet with these settings: {', '.join(found.unmeasured)}.")
    return lines


def check_space(found: Estimate, results: str | Path, *, refuse: bool = True) -> str | None:
    """Compares what will be filled with what is free.

    Args:
        found: the estimate.
        results: folder that is written to.
        refuse: whether too little space is an error.

    Returns:
        A warning, None when all is well.

    Raises:
        UserError: what is kept does not fit on the disk, and `refuse`.
    """
    free = free_bytes(results)
    if found.kept_bytes > free:
        text = (
            f"About {size_text(found.kept_bytes)} will be written below {results}, but only "
            f"{size_text(free)} are free there."
        )
        if refuse:
            raise UserError(
                f"{text} Free some, name another 'results' folder, or start anyway with --config "
                "check_disk_space=false."
            )
        return f"Warning: {text}"
    if found.peak_bytes > free:
        return (
            f"Warning: up to {size_text(found.peak_bytes)} may be needed meanwhile below "
            f"{results}, {size_text(free)} are free."
        )
    return None


def free_bytes(folder: str | Path) -> float:
    """Free space for this user on the disk of a folder that need not exist yet; no quotas."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
