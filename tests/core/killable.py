"""Jobs that tests kill: a server process that runs one job per line of its standard input.

Each job is a forked child that may be killed; forking after the imports saves most of the time that
a fresh process would take.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cap4d_core.progress import Progress


def serve(run: Callable[[list[str]], None]) -> None:
    """Runs jobs until standard input ends; `run` gets the arguments of the process."""
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                # Bits depend on the number of threads.
                torch.set_num_threads(int(os.environ["CAP4D_TEST_THREADS"]))
                run(sys.argv[1:])
                status = 0
            finally:
                os._exit(status)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"end {os.waitstatus_to_exitcode(status)}", flush=True)


def tell(progress: Progress) -> None:
    """Callback of a job: reports its progress to the test."""
    print(f"step {progress.done}", flush=True)


class KillableJob:
    """The server, from the side of the test.

    Args:
        module: runs `serve`.
        arguments: of the process.
    """

    def __init__(self, module: str, arguments: Sequence[object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"CAP4D_TEST_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip

    def run(self, kill_after_steps: int | None, delay_s: float = 0.0) -> list[str]:
        """Lines that a job wrote; it is killed so long after that many steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("start\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline().split()[1])
        lines: list[str] = []
        while not (line := self.process.stdout.readline().strip()).startswith("end"):
            lines.append(line)
            if line.startswith("step") and len(lines) - 1 == kill_after_steps:
                time.sleep(delay_s)
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(pid, signal.SIGKILL)
        return [*lines, line]

    def close(self) -> None:
        """Ends the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
