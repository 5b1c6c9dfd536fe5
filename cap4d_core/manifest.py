"""`manifest.json`: how a result folder was made, for people who want to make it again.

Settings, seeds, versions, hardware, times, and SHA-256 sums of inputs, weights and outputs, of the
job itself and of the jobs before it (known from their job files). No absolute paths, no user or
host names, no secrets of addresses: a manifest may be published with the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cap4d_core.batch.measurements import benchmark_seconds
from cap4d_core.files.basic import sha256_file, write_json
from cap4d_core.job import Job, read_job_file
from cap4d_core.job_environment import package_versions

FILE_NAME = "manifest.json"
FORMAT = 1
_OTHER_PACKAGES = ("diffusers", "safetensors", "scipy", "opencv-python-headless", "snakemake")
_PROVENANCE = "provenance.json"
_ASSET_RULES = frozenset({"prepare_head_model", "prepare_mmdm", "download_mmdm", "make_demo_head"})
_TIMESTAMP = ".snakemake_timestamp"


@contextlib.contextmanager
def manifest(job: Job, folder: Path) -> Iterator[None]:
    """Writes `folder`/manifest.json when the block ends well; an old one is removed before.

    Args:
        job: the job whose results `folder` holds.
        folder: of one subject's avatar or animation.
    """
    start = time.monotonic()
    (folder / FILE_NAME).unlink(missing_ok=True)
    yield
    write_json(folder / FILE_NAME, describe(job, folder, time.monotonic() - start))


def describe(job: Job, folder: Path, seconds: float) -> dict[str, Any]:
    """Content of a manifest, keys sorted.

    Args:
        job: the finished job.
        folder: what it wrote.
        seconds: how long it took.
    """
    before = upstream_jobs(job)
    return sorted_keys(
        {
            "format": FORMAT,
            "rule": job.rule,
            "stage_version": job.params.get("version"),
            "wildcards": job.wildcards,
            "settings": public({k: v for k, v in job.params.items() if k != "version"}),
            "seeds": _seeds([job, *before]),
            "inputs": {name: _input_sums(paths) for name, paths in job.input.items() if paths},
            "sources": _sources(before),
            "assets": _assets([job, *before]),
            "outputs": _file_sums(folder, {FILE_NAME, _TIMESTAMP}),
            "made_before": _stages(before),
            "software": software(),
            "hardware": hardware(job.threads),
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )


def sorted_keys(value: Any) -> Any:
    """The same with the keys of all mappings in order."""
    if isinstance(value, Mapping):
        return {str(key): sorted_keys(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [sorted_keys(item) for item in value]
    return value


def public(value: Any) -> Any:
    """The same without places and secrets: of paths the last part, of addresses no credentials."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        parts = urllib.parse.urlsplit(value)
        return urllib.parse.urlunsplit((parts.scheme, parts.hostname or "", parts.path, "", ""))
    if value.startswith(("/", "~", "..")):
        return Path(value).name
    return value


# What came before -------------------------------------------------------------------------------


def upstream_jobs(job: Job) -> list[Job]:
    """Jobs that the inputs of a job come from, directly or not, as their job files tell."""
    made_by: dict[str, Job] = {}
    for job_file in _job_files(job):
        with contextlib.suppress(Exception):  # of another version, half written
            other = read_job_file(job_file)
            made_by |= {output: other for outputs in other.output.values() for output in outputs}
    found: list[Job] = []
    open_ones = [job]
    while open_ones:
        inputs = [path for paths in open_ones.pop().input.values() for path in paths]
        for path in inputs:
            maker = made_by.pop(path, None)
            if maker is not None and maker not in found and maker != job:
                found.append(maker)
                open_ones.append(maker)
    return sorted(found, key=lambda j: (j.rule, sorted(j.wildcards.items())))


def _job_files(job: Job) -> Iterator[Path]:
    """Job files of shared stages, of the job's subject and of its driving sequence."""
    logs = _logs_folder(job)
    if logs is None or not logs.is_dir():
        return
    names = [job.wildcards[name] for name in ("subject", "driving") if name in job.wildcards]
    yield from logs.glob("*.job.json")
    for folder in sorted(logs.iterdir()):
        for name in names if folder.is_dir() else []:
            yield from folder.glob(f"{name}.job.json")
            yield from (folder / name).rglob("*.job.json")


def _logs_folder(job: Job) -> Path | None:
    """`{results}/logs`, from the job's log: {results}/logs/{rule}.log or .../{rule}/ana.log."""
    if job.log is None:
        return None
    log = Path(job.log)
    places = [log.with_suffix(""), *log.parents]
    return next((place.parent for place in places if place.name == job.rule), None)


def _sources(jobs: list[Job]) -> dict[str, dict[str, str]]:
    """Sums of what the jobs before read and none of them made: photos, ready fits."""
    made = {path for job in jobs for paths in job.output.values() for path in paths}
    sources: dict[str, dict[str, str]] = {}
    for job in jobs:
        if job.rule in _ASSET_RULES:  # gigabytes; their folders say what they were made from
            continue
        for name, paths in job.input.items():
            sums = _input_sums([path for path in paths if path not in made])
            if sums:
                sources.setdefault(job.rule, {}).update(
                    {f"{name}: {file}": digest for file, digest in sums.items()}
                )
    return sources


def _stages(jobs: Iterable[Job]) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for job in jobs:
        stage = stages.setdefault(
            job.rule,
            {
                "jobs": 0,
                "seconds": 0.0,
                "stage_version": job.params.get("version"),
                "settings": public(job.params.get("settings")),
            },
        )
        stage["jobs"] += 1
        seconds = _seconds(job)
        if seconds is None or stage["seconds"] is None:
            stage["seconds"] = None
        else:
            stage["seconds"] = round(stage["seconds"] + seconds, 2)
    return stages


def _seconds(job: Job) -> float | None:
    logs = _logs_folder(job)
    if logs is None or job.log is None:
        return None
    name = Path(job.log).relative_to(logs).with_suffix(".tsv")
    return benchmark_seconds(logs.parent / "benchmarks" / name)


def _seeds(jobs: Iterable[Job]) -> dict[str, int]:
    seeds = {}
    for job in jobs:
        settings = job.params.get("settings") or {}
        for place in (job.params, settings if isinstance(settings, Mapping) else {}):
            if place.get("seed") is not None:
                seeds[job.rule] = place["seed"]
    return seeds


def _assets(jobs: Iterable[Job]) -> dict[str, Any]:
    """SHA-256 of the sources of head model and weights, as their folders tell."""
    assets: dict[str, Any] = {}
    for job in jobs:
        for name, paths in job.input.items():
            for path in paths:
                source = Path(path) / _PROVENANCE
                if name not in assets and source.is_file():
                    with contextlib.suppress(OSError, ValueError):
                        assets[name] = _without_places(json.loads(source.read_text("utf-8")))
    return assets


def _without_places(content: Any) -> Any:
    """Provenance without `source` and `config_source` where these are paths."""
    if not isinstance(content, Mapping):
        return content
    return {
        key: _without_places(item)
        for key, item in content.items()
        if not (isinstance(item, str) and key.endswith("source"))
    }


# Sums -------------------------------------------------------------------------------------------


def _input_sums(paths: list[str]) -> dict[str, str]:
    sums: dict[str, str] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            digest = hashlib.sha256()
            for name, entry in _file_sums(path, {_TIMESTAMP, _PROVENANCE}).items():
                digest.update(f"{name} {entry['sha256']}\n".encode())
            sums[f"{path.name}/"] = digest.hexdigest()
        elif path.is_file():
            # Shards have the same names in different folders.
            name = path.name if path.name not in sums else f"{path.parent.name}/{path.name}"
            sums[name] = sha256_file(path)
    return sums


def _file_sums(folder: Path, left_out: set[str]) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in left_out)
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in files
        if ".tmp-" not in file.name and "checkpoints" not in file.relative_to(folder).parts
    }


# Where it ran ------------------------------------------------------------------------------------


def software() -> dict[str, Any]:
    """Versions of what decides the numbers, and the commit of a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = dict(package_versions())
    for package in _OTHER_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["CUDA"] = torch.version.cuda
    commit = git_commit()
    if commit is not None:
        found["commit"] = commit
    return found


def git_commit(package: Path = Path(__file__).parent) -> str | None:
    """Commit of the checkout that the package is run from, `+changes` when files differ from it."""

    def git(*words: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(
                ["git", "-C", str(package), *words],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            return result.stdout.strip()
        return None

    # Another repository may contain the folder that the package is installed in.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit if git("diff", "--quiet", "HEAD", "--", ".") is not None else f"{commit}+changes"


def hardware(threads: int) -> dict[str, Any]:
    """CPU, memory and GPU; no names of hosts."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["driver"] = _driver_version()
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return result.stdout.split()[0] if result.stdout.split() else None
    return None
