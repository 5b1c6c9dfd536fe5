"""A throw-away SLURM on this machine: see slurm_up.sh, slurm_down.sh and slurm_kill_node.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

SCRIPTS = Path(__file__).parent
NODES, GPUS_PER_NODE = 2, 2


@dataclass(frozen=True)
class EndedJob:
    """A line of SLURM's own record."""

    number: int
    name: str
    state: str
    start: datetime
    end: datetime
    nodes: str


def why_not() -> str | None:
    """Why no cluster can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        return "no SLURM here, and no apt-get to install it"
    return None


class Cluster:
    """The cluster in one state folder."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {
            "SLURM_CONF": str(state / "etc" / "slurm.conf"),
            # srun is wrapped: the executor's job step forgets SLURM_CONF.
            "PATH": f"{state / 'bin'}:{os.environ['PATH']}",
        }

    def up(self) -> None:
        """Starts what is not running: everything, or a node that was killed.

        Raises:
            RuntimeError: packages cannot be installed, or a daemon does not start.
        """
        # Nodes claim more than the machine has, so that the profile's figures fit.
        self._script("slurm_up.sh", str(NODES), str(GPUS_PER_NODE), str(self.state))

    def down(self) -> None:
        """Ends all jobs and daemons and removes the folder."""
        self._script("slurm_down.sh", "--purge", str(self.state))

    def kill_node(self, node: str) -> None:
        """As if its power failed."""
        self._script("slurm_kill_node.sh", node, str(self.state))

    def _script(self, name: str, *words: str) -> None:
        result = subprocess.run(
            ["bash", str(SCRIPTS / name), *words],
            env={**os.environ, "SLURM_TEST_MEM": "200000", "SLURM_TEST_CPUS": "16"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if result.returncode:
            raise RuntimeError(f"{name}: {result.stderr.strip() or result.stdout.strip()}")

    def call(self, *words: str) -> str:
        """Output of a SLURM command."""
        result = subprocess.run(
            words,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return result.stdout

    def queue(self, states: str = "PENDING,RUNNING,COMPLETING") -> dict[int, tuple[str, str]]:
        """Jobs: number -> (state, node)."""
        rows = self.call("squeue", "-h", "-t", states, "-o", "%i|%T|%N").split()
        return {int(n): (state, node) for n, state, node in (row.split("|") for row in rows)}

    def wait_for_running_job(self, timeout: float = 120, other_than: int = 0) -> tuple[int, str]:
        """Number and node of a job that runs."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for number, (state, node) in self.queue().items():
                if state == "RUNNING" and number != other_than:
                    return number, node
            time.sleep(0.2)
        raise AssertionError(f"no job runs after {timeout} s")

    def start_requeued_job(self, number: int, timeout: float = 120) -> None:
        """Waits until SLURM has put a job back, and spares it SLURM's two minutes of waiting."""
        end = time.monotonic() + timeout
        while self.queue().get(number, ("", ""))[0] != "PENDING":
            assert time.monotonic() < end, f"job {number} is not back in the queue: {self.queue()}"
            time.sleep(0.2)
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now")

    def ended_jobs(self) -> list[EndedJob]:
        """SLURM's record of all jobs so far, requeued attempts included."""
        path = self.state / "log" / "jobs.txt"
        jobs = []
        for line in path.read_text().splitlines() if path.exists() else []:
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            jobs.append(
                EndedJob(
                    int(fields["JobId"]),
                    fields["Name"],
                    fields["JobState"],
                    datetime.fromisoformat(fields["StartTime"]),
                    datetime.fromisoformat(fields["EndTime"]),
                    fields["NodeList"],
                )
            )
        return jobs

    def processes(self) -> list[str]:
        """Command lines of everything that belongs to the cluster."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                marker = f"SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
                if marker in environment and command:
                    found.append(command)
        return found
