#!/usr/bin/env python3
"""Submits one workflow job as a Kubernetes Job; prints its name.

    submit.py JOBSCRIPT

Called by snakemake-executor-plugin-cluster-generic. The first line of a job script holds the job's
properties as JSON. Everything that names the cluster comes from the environment:

CAP4D_K8S_IMAGE      container image; needs bash, and CUDA's libraries where torch has none
CAP4D_K8S_CLAIM      PersistentVolumeClaim (ReadWriteMany) with the project, .venv, data and results
CAP4D_K8S_MOUNT      where it is mounted: the same path as here
CAP4D_K8S_NAMESPACE  default: kubectl's own
CAP4D_K8S_GPU        resource name of a GPU, default nvidia.com/gpu
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any


def properties_of(jobscript: Path) -> dict[str, Any]:
    """Rule, threads and resources of a job script of Snakemake."""
    found = re.search(r"^# properties = (\{.*\})$", jobscript.read_text("utf-8"), re.MULTILINE)
    if not found:
        raise SystemExit(f"{jobscript}: no job script of Snakemake (no line '# properties = ...')")
    properties: dict[str, Any] = json.loads(found[1])
    return properties


def manifest(jobscript: Path, properties: dict[str, Any], name: str) -> dict[str, Any]:
    """The Job: one pod, one try; retries are Snakemake's, with more memory and time."""
    resources = properties["resources"]
    limits = {"memory": f"{resources['mem_mb']}M"}
    requests = {**limits, "cpu": str(properties["threads"])}
    if resources.get("gpu"):
        limits[os.environ.get("CAP4D_K8S_GPU", "nvidia.com/gpu")] = str(resources["gpu"])
    passed = {key: value for key, value in os.environ.items() if key.startswith("CAP4D_")}
    container = {
        "name": "job",
        "image": os.environ["CAP4D_K8S_IMAGE"],
        "command": ["/bin/bash", str(jobscript.absolute())],
        "workingDir": os.getcwd(),
        # The job ends by itself before its limit, after a checkpoint.
        "env": [
            {"name": key, "value": value}
            for key, value in sorted({**passed, "CAP4D_TIME_LIMITED": "1"}.items())
        ],
        "resources": {"requests": requests, "limits": limits},
        "volumeMounts": [
            {"name": "shared", "mountPath": os.environ["CAP4D_K8S_MOUNT"]},
            # Worker processes of torch exchange data there; the default is 64 MB.
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {
                "name": "shared",
                "persistentVolumeClaim": {"claimName": os.environ["CAP4D_K8S_CLAIM"]},
            },
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    labels = {"app": "cap4d", "cap4d/rule": properties["rule"]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": int(resources["runtime"]) * 60,
            "ttlSecondsAfterFinished": 86400,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def main() -> None:
    """Creates the Job with kubectl."""
    needed = ("CAP4D_K8S_IMAGE", "CAP4D_K8S_CLAIM", "CAP4D_K8S_MOUNT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise SystemExit(f"set {', '.join(missing)}; {__file__} says what they mean")
    jobscript = Path(sys.argv[1])
    properties = properties_of(jobscript)
    name = f"cap4d-{properties['rule'].replace('_', '-')}-{uuid.uuid4().hex[:12]}"
    namespace = os.environ.get("CAP4D_K8S_NAMESPACE")
    words = ["--namespace", namespace] if namespace else []
    subprocess.run(
        ["kubectl", *words, "create", "-f", "-"],
        input=json.dumps(manifest(jobscript, properties, name)),
        text=True,
        check=True,
        stdout=sys.stderr,
    )
    print(name)


if __name__ == "__main__":
    main()
