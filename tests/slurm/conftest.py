"""One cluster per test session, and the tiny workflow on it."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, why_not
from tests.workflow.tiny_run import TinyRun

# Short waits: the profile's are for real clusters.
ON_SLURM = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "20")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two pretended GPUs each."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Nodes of two clusters would share their cgroups.
    with open(Path(tempfile.gettempdir()) / "cap4d-test-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A short path: a socket lies in it.
        found = Cluster(Path(tempfile.mkdtemp(prefix="cap4d-slurm-")))
        try:
            found.up()
        except RuntimeError as error:
            found.down()
            # Packages are the machine's business; daemons that do not start may be ours.
            if "could not install" in str(error) or os.environ.get("CAP4D_SLURM_OPTIONAL"):
                pytest.skip(f"no SLURM can be started here: {error}")
            raise
        yield found
        found.down()
        assert found.processes() == []


@pytest.fixture
def idle_cluster(cluster: Cluster) -> Cluster:
    """The cluster with both nodes up and no jobs."""
    cluster.up()
    cluster.call("scancel", "--user=root")
    end = time.monotonic() + 60
    while cluster.queue():
        assert time.monotonic() < end, f"jobs do not end: {cluster.queue()}"
        time.sleep(0.2)
    return cluster


def on_slurm(run: TinyRun, cluster: Cluster, folder: Path) -> TinyRun:
    """The same workflow in another folder, on the cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    return TinyRun(
        folder, run.weights, "slurm", ON_SLURM, run.settings,
        # auto: the scheduler's GPU is leased. Where torch could use a real one, results would not
        # be those of the CPU.
        {**cluster.environment, "CAP4D_DEVICE": "cpu" if torch.cuda.is_available() else "auto"},
    )  # fmt: skip
