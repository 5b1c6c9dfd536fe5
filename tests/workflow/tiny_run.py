"""The tiny procedural workflow in a folder of its own: run, left running, killed, copied."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.workflow.snakemake_runs import ROOT, snakemake_command, snakemake_environment
from tests.workflow.tiny_mmdm import write_tiny_checkpoint

CONFIG = ROOT / "tests" / "data" / "tiny" / "config.yaml"
# One thread per job everywhere, so that results can be compared to the bit.
THREADS = [
    f"{rule}=1"
    for rule in (
        "prepare_mmdm", "track_subject", "track_driving", "encode_references", "sample_views",
        "decode_views", "fit_avatar", "evaluate_avatar", "animate_avatar",
    )
]  # fmt: skip
LOCAL = ("--cores", "2", "--resources", "gpu=2")


@dataclass
class RunningSnakemake:
    """A Snakemake in the background."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """What it said so far."""
        return self.log.read_text("utf-8", "replace")

    def wait(self, timeout: float) -> str:
        """Waits for success; returns its output."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not finished after {timeout} s:\n{self.output()}") from None
        assert self.process.returncode == 0, self.output()
        return self.output()

    def wait_until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Waits for something to become true while it runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < end, f"no {what} after {timeout} s:\n{self.output()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """As a login node that is switched off: nothing can be cleaned up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class TinyRun:
    """A folder with (or for) results of the tiny configuration."""

    folder: Path
    weights: Path
    profile: str = "default"
    # Words of every call: where to run; and settings.
    where: tuple[str, ...] = LOCAL
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    # Of what Snakemake says; default: beside the folder.
    log_folder: Path | None = None

    @property
    def results(self) -> Path:
        """Folder of the results."""
        return self.folder / "results"

    def start(self, *targets: str, options: tuple[str, ...] = ()) -> RunningSnakemake:
        """Starts Snakemake; `targets` are rules or files below the folder."""
        words = [
            *targets, *self.where, *options, "--set-threads", *THREADS,
            "--configfile", str(CONFIG), *(["--config", *self.settings] if self.settings else []),
        ]  # fmt: skip
        folder = self.log_folder or self.folder.parent
        log = folder / f"{self.folder.name}-{time.monotonic_ns()}.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                snakemake_command(*words, profile=self.profile),
                cwd=self.folder,
                env=snakemake_environment(
                    self.folder, CAP4D_TINY_MMDM=str(self.weights), **self.environment
                ),
                stdout=output,
                stderr=subprocess.STDOUT,
                # Tests that run in the background of a shell ignore Ctrl-C, and so would it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return RunningSnakemake(process, log)

    def run(self, *targets: str, options: tuple[str, ...] = (), timeout: float = 900) -> str:
        """Runs to success; returns the output."""
        return self.start(*targets, options=options).wait(timeout)

    def fail(self, *targets: str, options: tuple[str, ...] = (), timeout: float = 900) -> str:
        """Runs to failure; returns the output."""
        running = self.start(*targets, options=options)
        running.process.wait(timeout)
        assert running.process.returncode == 1, running.output()
        return running.output()

    def copy(self, folder: Path) -> TinyRun:
        """The same state elsewhere, times of files included."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return TinyRun(
            folder, self.weights, self.profile, self.where, self.settings, dict(self.environment)
        )


def finished_run(folder: Path) -> TinyRun:
    """Makes the tiny results on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    run = TinyRun(folder / "run", write_tiny_checkpoint(folder / "weights"))
    run.folder.mkdir()
    run.run()
    return run


def log_of(results: Path, name: str) -> str:
    """Text of a job's log, by its path below results/logs."""
    return (results / "logs" / name).read_text()


def is_alive(pid: int) -> bool:
    """Whether a process is still there (and no zombie)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == folder and is_alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
