"""The whole workflow on a real SLURM: one GPU per job, and the same bits as on one machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import GPUS_PER_NODE, NODES, Cluster
from tests.slurm.conftest import on_slurm
from tests.workflow.tiny_run import TinyRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

# Logs, timings, and what names machines; everything else must be equal.
LEFT_OUT = ("logs/", "benchmarks/", ".workflow/", "resources.json")
TIMES = {"seconds", "duration_s", "created", "elapsed_s", "finished"}


@dataclass(frozen=True)
class JobRecord:
    """What a job's own log says about where and when it ran."""

    name: str
    start: datetime
    end: datetime
    slurm_job: int | None
    node: str
    visible: str | None
    leased: str | None


def records(results: Path) -> list[JobRecord]:
    """All jobs of a run, from their logs."""
    found = []
    for path in sorted((results / "logs").rglob("*.log")):
        text = path.read_text()
        times = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ", text, re.MULTILINE)
        line = re.search(r"SLURM: (.*)", text)
        words = dict(word.split(" ", 1) for word in line[1].split(", ") if " " in word) \
            if line else {}  # fmt: skip
        leased = re.search(r"GPU leased: (\S+)", text)
        found.append(
            JobRecord(
                str(path.relative_to(results / "logs")),
                datetime.fromisoformat(times[0]),
                datetime.fromisoformat(times[-1]),
                int(words["SLURM_JOB_ID"]) if words else None,
                words.get("SLURMD_NODENAME", ""),
                words.get("CUDA_VISIBLE_DEVICES"),
                leased[1] if leased else None,
            )
        )
    return found


@pytest.fixture(scope="module")
def slurm_run(
    tiny_results: TinyRun, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> TinyRun:
    run = on_slurm(tiny_results, cluster, tmp_path_factory.mktemp("slurm"))
    run.run()
    return run


GPU_RULES = {
    "encode_references", "sample_views", "decode_views", "fit_avatar", "evaluate_avatar",
    "animate_avatar",
}  # fmt: skip
LOCAL_RULES = {"plan_views", "write_report"}


def test_every_gpu_job_has_one_gpu_of_its_own(slurm_run: TinyRun) -> None:
    jobs = records(slurm_run.results)
    gpu_jobs = [job for job in jobs if re.split(r"[/.]", job.name)[0] in GPU_RULES]
    assert len(gpu_jobs) == 10
    for job in gpu_jobs:
        assert job.visible in {str(i) for i in range(GPUS_PER_NODE)}, job
        # Where torch has no CUDA the GPU is leased all the same.
        assert job.leased in (job.visible, None), job
        assert job.slurm_job is not None and job.node in ("n1", "n2")
    others = [job for job in jobs if job not in gpu_jobs]
    assert all(job.visible is None and job.leased is None for job in others)
    assert {re.split(r"[/.]", job.name)[0] for job in others if job.slurm_job is None} == (
        LOCAL_RULES
    )


def test_never_more_jobs_than_gpus(slurm_run: TinyRun, cluster: Cluster) -> None:
    gpu_jobs = [job for job in records(slurm_run.results) if job.visible is not None]
    for job in gpu_jobs:
        # Half-open: a GPU that is free again may be given away in the same second.
        overlapping = [o for o in gpu_jobs if o.start <= job.start < o.end or o is job]
        assert len(overlapping) <= NODES * GPUS_PER_NODE
        places = [(other.node, other.visible) for other in overlapping]
        assert len(set(places)) == len(places), overlapping
    # As SLURM itself recorded it.
    numbers = {job.slurm_job for job in gpu_jobs}
    ended = [job for job in cluster.ended_jobs() if job.number in numbers]
    assert len(ended) == len(numbers) == len(gpu_jobs)
    for job in ended:
        assert job.state == "COMPLETED"
        assert sum(o.start <= job.start < o.end for o in ended) <= NODES * GPUS_PER_NODE
    # The two shards of a round do not wait for each other.
    shards = [job for job in gpu_jobs if job.name.startswith("sample_views/ada/1/")]
    assert len({(job.node, job.visible) for job in shards}) == 2


def without_times(content: Any) -> Any:
    """JSON without measured times, and without what manifests say of files that hold some."""
    if isinstance(content, dict):
        return {
            key: without_times(value)
            for key, value in content.items()
            # Somebody may commit between the two runs.
            if key not in TIMES and key != "commit" and not key.endswith(".json")
        }
    if isinstance(content, list):
        return [without_times(item) for item in content]
    return content


def read_json(path: Path, folder: Path) -> Any:
    """A result without times and without the folder it was made in."""
    return without_times(json.loads(path.read_text().replace(str(folder), "")))


def files_of(results: Path) -> dict[str, Path]:
    """Results by relative path."""
    names = {str(p.relative_to(results)): p for p in results.rglob("*") if p.is_file()}
    return {name: path for name, path in names.items() if not name.startswith(LEFT_OUT)}


def test_results_are_those_of_one_machine_to_the_bit(
    slurm_run: TinyRun, tiny_results: TinyRun
) -> None:
    here, there = files_of(tiny_results.results), files_of(slurm_run.results)
    assert here.keys() == there.keys()
    arrays = [name for name in here if name.endswith((".npz", ".safetensors", ".ply"))]
    images = [name for name in here if name.endswith((".png", ".jpg", ".mp4"))]
    assert len(arrays) >= 12 and len(images) >= 20
    for name, path in here.items():
        if name.endswith(".json"):
            mine = read_json(path, tiny_results.folder)
            assert mine == read_json(there[name], slurm_run.folder), name
        elif name in arrays or name in images:
            assert path.read_bytes() == there[name].read_bytes(), name


def test_second_run_submits_nothing(slurm_run: TinyRun, cluster: Cluster) -> None:
    before = len(cluster.ended_jobs())
    assert "Nothing to be done" in slurm_run.run()
    assert len(cluster.ended_jobs()) == before and not cluster.queue()
