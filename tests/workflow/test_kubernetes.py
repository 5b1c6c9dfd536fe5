"""The Kubernetes profile against a stand-in for kubectl that runs each job's command here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.workflow.snakemake_runs import ROOT, dry_run, run_snakemake
from tests.workflow.test_dry_runs import write_project

pytestmark = pytest.mark.workflow

KUBECTL = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
folder = Path({folder!r})
if words[:2] == ["--namespace", "heads"]:
    words = words[2:]
if words[0] == "create":
    job = json.load(sys.stdin)
    pod = job["spec"]["template"]["spec"]["containers"][0]
    path = folder / job["metadata"]["name"]
    path.with_suffix(".json").write_text(json.dumps(job))
    environment = dict(os.environ) | {{e["name"]: e["value"] for e in pod["env"]}}
    result = subprocess.run(pod["command"], cwd=pod["workingDir"], env=environment,
                            stdout=open(path.with_suffix(".out"), "w"), stderr=subprocess.STDOUT)
    path.with_suffix(".status").write_text("/1" if result.returncode else "1/")
elif words[0] == "get":
    path = folder / f"{{words[2]}}.status"
    if not path.exists():
        sys.exit("Error from server (NotFound)")
    print(path.read_text(), end="")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path / "jobs")))
    kubectl.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CAP4D_K8S_IMAGE": "registry/image:1",
        "CAP4D_K8S_CLAIM": "heads-data",
        "CAP4D_K8S_MOUNT": "/data",
        "CAP4D_K8S_NAMESPACE": "heads",
    }


def test_plan(tmp_path: Path) -> None:
    counts = dry_run(tmp_path, write_project(tmp_path), profile="kubernetes")
    assert counts["fit_avatar"] == 2


@pytest.mark.slow
def test_jobs_are_submitted_with_their_resources(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    result = run_snakemake(
        tmp_path, "results/demo_1/tracking/fit.npz", "--latency-wait", "5",
        "--config", "subject=demo:1", "driving=demo", "quality=demo",
        "demo={num_references: 1, num_frames: 1, resolution: 32, num_held_out: 1}",
        "--configfile", str(ROOT / "config.yaml"),
        profile="kubernetes", environment=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    jobs = {}
    for path in (tmp_path / "jobs").glob("*.json"):
        job = json.loads(path.read_text())
        jobs[job["metadata"]["labels"]["cap4d/rule"]] = job["spec"]
    assert {"make_demo_head", "make_demo_subject", "track_subject"} <= set(jobs)
    spec = jobs["track_subject"]
    pod = spec["template"]["spec"]
    assert spec["activeDeadlineSeconds"] == 120 * 60 and spec["backoffLimit"] == 0
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "8000M"}
    assert pod["containers"][0]["resources"]["requests"]["cpu"] == "4"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "heads-data"
    assert {"name": "CAP4D_TIME_LIMITED", "value": "1"} in pod["containers"][0]["env"]


def test_missing_description_of_the_cluster(tmp_path: Path, environment: dict[str, str]) -> None:
    del environment["CAP4D_K8S_CLAIM"]
    result = run_snakemake(
        tmp_path, "results/demo/head", "--retries", "0", "--configfile", str(ROOT / "config.yaml"),
        profile="kubernetes", environment=environment,
    )  # fmt: skip
    assert result.returncode == 1
    assert "set CAP4D_K8S_CLAIM" in result.stdout
