"""A workflow job as a script sees it: files, params, log, GPU; and running it again by hand.

`run` is called by every script of workflow_scripts/. Under Snakemake it takes the job from the
`snakemake` object and writes a job file beside the log; by hand it takes it from that file:

    python workflow_scripts/fit_avatar.py results/logs/fit_avatar/ana.job.json

Outputs then go below debug/ unless `--in-place` is given, because Snakemake would take a file that
a person wrote into the results for its own.

Light: the standard library. torch is imported by the stage, after a GPU has been leased.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import glob
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cap4d_core import warm_worker
from cap4d_core.deadline import describe_limit, stop_before_limit
from cap4d_core.errors import NoGpuError, UserError
from cap4d_core.gpu import DEVICE_VARIABLE, lease_for_job
from cap4d_core.job_environment import package_versions, prepare_environment
from cap4d_core.job_errors import machine_advice
from cap4d_core.locks import FileLock, wait_for_lock
from cap4d_core.progress import ProgressCallback, ProgressLogger, format_duration

logger = logging.getLogger("cap4d")

JOB_FILE_FORMAT = 1
MEMORY_ELSEWHERE = "memory_elsewhere"
# The devices as the scheduler assigned them, before any of them is leased or hidden.
_SCHEDULER_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME", "SLURM_STEP_GPUS",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

_COLLECT_GARBAGE_AFTER = (50_000, 20, 50)

Files = dict[str, list[str]]


@dataclass(frozen=True)
class Job:
    """One job: named files and JSON params only, so it can be written to a file and read back."""

    rule: str
    input: Files
    output: Files
    params: dict[str, Any] = field(default_factory=dict)
    wildcards: dict[str, str] = field(default_factory=dict)
    log: str | None = None
    threads: int = 1
    num_gpus: int = 0
    runtime_min: float | None = None

    def input_file(self, name: str) -> Path:
        """The one input of this name."""
        return _single(self.input, name, self.rule, "input")

    def input_files(self, name: str) -> list[Path]:
        """All inputs of this name; an empty list when there are none."""
        return [Path(path) for path in self.input.get(name, [])]

    def output_file(self, name: str) -> Path:
        """The one output of this name."""
        return _single(self.output, name, self.rule, "output")

    def checkpoint_file(self, name: str) -> Path:
        """Where to keep resumable state: beside the first output, and not an output itself.

        Snakemake deletes outputs of failed jobs and before a job starts; this file survives.
        """
        first = Path(next(iter(self.output.values()))[0])
        return first.parent / "checkpoints" / name

    @property
    def device(self) -> str:
        """`cuda` when this process may use a GPU, else `cpu`."""
        import torch

        if torch.cuda.is_available():
            return "cuda"
        leased = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if leased:
            message = f"GPU {leased} was assigned, but torch {torch.__version__} cannot use it"
            if os.environ.get(DEVICE_VARIABLE) == "cuda":
                raise NoGpuError(f"{message}: install a CUDA build that fits the driver.")
            logger.warning("%s: running on the CPU", message)
        return "cpu"

    def progress(self, unit_of_work: str) -> ProgressCallback:
        """A progress callback that writes to the log, and ends the job before its time limit.

        Calling it raises `DeadlineError` then.
        """
        name = " ".join([*self.wildcards.values(), unit_of_work])
        return stop_before_limit(ProgressLogger(name), self.runtime_min)

    def files(self) -> list[str]:
        """All files that the job writes."""
        outputs = [path for paths in self.output.values() for path in paths]
        return [*outputs, *([self.log] if self.log else [])]

    def below(self, folder: Path) -> Job:
        """The same job with its outputs below `folder`."""
        moved = {
            name: [str(folder / Path(path).relative_to(Path(path).anchor)) for path in paths]
            for name, paths in self.output.items()
        }
        return replace(self, output=moved)


def _single(files: Files, name: str, rule: str, kind: str) -> Path:
    paths = files.get(name, [])
    if len(paths) != 1:
        raise KeyError(f"rule {rule}: {len(paths)} {kind} files named '{name}', expected one")
    return Path(paths[0])


def run(main: Callable[[Job], None], snakemake: Any = None) -> None:
    """Runs a script's `main` as a workflow job, or again from a job file named on the command line.

    Exits with code 1 after any error: a `UserError` is logged as one sentence, everything else with
    its traceback.
    """
    if snakemake is not None:
        job = job_from_snakemake(snakemake)
        with _sole_writer(job) as lock:
            if job.log:
                redirect_output(job.log)
                write_job_file(job_file_path(job.log), job)
            configure_logging()
            remove_unfinished(job)
            sys.exit(execute(main, job, lock))
    job = replace(_job_from_command_line(), runtime_min=None)  # nobody limits it
    configure_logging()
    sys.exit(execute(main, job))


def execute(main: Callable[[Job], None], job: Job, lock: FileLock | None = None) -> int:
    """Runs `main(job)` with the GPUs it asks for; returns the exit code.

    Where a warm worker does the job instead (see `warm_worker`), `lock` goes along.
    """
    prepare_environment(job.threads)

    def with_gpus(job: Job) -> None:
        lease = lease_for_job(job.num_gpus)
        code = None
        if lease is not None and len(lease.names) == 1 and warm_worker.is_wanted(job.rule):
            held = [*lease.descriptors, *([lock.descriptor] if lock else [])]
            screen = 2 if console is None else console
            code = warm_worker.run_in_worker(job, lease.names[0], screen, held)
            if code is not None and job.log:
                note_memory_elsewhere(job_file_path(job.log))
        elif lease is not None:
            for name in lease.names:
                warm_worker.stop_worker(name)
        if code is None:
            main(job)
        elif code:
            raise SystemExit(code)

    start = time.monotonic()
    _log_header(job)
    code = execute_here(with_gpus, job)
    if code == 0:
        logger.info("done in %s", format_duration(time.monotonic() - start))
    return code


def execute_here(main: Callable[[Job], None], job: Job) -> int:
    """Runs `main(job)` in this process as it is; returns the exit code, after logging errors."""
    # Imports of torch allocate much that lives on: looking through it takes a fourth of their time.
    gc.set_threshold(*_COLLECT_GARBAGE_AFTER)
    try:
        with _logged_termination():
            main(job)
    except UserError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except Exception as error:
        advice = machine_advice(error, job.rule, job.params.get("settings", {}), job.files())
        if advice:
            logger.error("%s\n%s", error, advice)
            _tell_console(f"{job.rule}: {advice}")  # the log may be on the full disk
        else:
            logger.exception("%s failed", job.rule)
        return 1
    return 0


def job_from_snakemake(snakemake: Any) -> Job:
    """Takes everything from the `snakemake` object of a script, through its public members."""
    return Job(
        rule=str(snakemake.rule),
        input=_named_files(snakemake.input),
        output=_named_files(snakemake.output),
        params=json.loads(json.dumps(dict(snakemake.params.items()))),
        wildcards={name: str(value) for name, value in snakemake.wildcards.items()},
        log=str(snakemake.log[0]) if len(snakemake.log) else None,
        threads=int(snakemake.threads),
        num_gpus=int(snakemake.resources.get("gpu", 0)),
        runtime_min=_number(snakemake.resources.get("runtime")),
    )


def _number(value: Any) -> float | None:
    """A resource that is known; in places Snakemake has a text for one that is not yet."""
    return float(value) if isinstance(value, int | float) else None


def _named_files(files: Any) -> Files:
    named: Files = {}
    for name, value in files.items():
        named[name] = [str(value)] if isinstance(value, str) else [str(path) for path in value]
    return named


def job_file_path(log: str | Path) -> Path:
    """Where the job file of a log is: `ana.log` -> `ana.job.json`."""
    return Path(log).with_suffix(".job.json")


def write_job_file(path: Path, job: Job) -> None:
    """Writes a job with what is needed to run it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_job_file(path, {"format": JOB_FILE_FORMAT, "folder": os.getcwd(), **asdict(job)})


def note_memory_elsewhere(path: Path) -> None:
    """Notes in a job file that Snakemake's measurement of memory missed the process that worked."""
    with contextlib.suppress(OSError, ValueError):
        _replace_job_file(path, json.loads(path.read_text("utf-8")) | {MEMORY_ELSEWHERE: True})


def _replace_job_file(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(temporary, path)


def read_job_file(path: str | Path) -> Job:
    """Reads a job file.

    Raises:
        UserError: missing, or not a job file of this format.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        version = content.pop("format")
        content.pop("folder")
        content.pop(MEMORY_ELSEWHERE, None)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: no job file ({type(error).__name__}: {error}); expected the .job.json that "
            "lies beside the log of every job."
        ) from None
    if version != JOB_FILE_FORMAT:
        raise UserError(
            f"{path}: job file format {version}, this version reads {JOB_FILE_FORMAT}; run the job "
            "once more through Snakemake."
        )
    return Job(**content)


def _job_from_command_line() -> Job:
    parser = argparse.ArgumentParser(description="Run one workflow job again, without Snakemake.")
    parser.add_argument("job_file", help="results/logs/{rule}/....job.json of the job")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write to the results; Snakemake will take these files for its own",
    )
    parser.add_argument("--debug-dir", default="debug", help="where outputs go otherwise")
    arguments = parser.parse_args()
    try:
        job = read_job_file(arguments.job_file)
    except UserError as error:
        parser.exit(1, f"{error}\n")
    return job if arguments.in_place else job.below(Path(arguments.debug_dir))


@contextlib.contextmanager
def _sole_writer(job: Job) -> Iterator[FileLock | None]:
    """Waits for a process that still does the same job.

    A Snakemake that was killed leaves its jobs running, and a cluster may start a job anew whose
    node only lost its network: two writers would spoil each other's files.
    """
    lock: FileLock | None = None
    if job.log:
        # A file that cannot be made (full disk) is not why a job fails: it will say so itself.
        with contextlib.suppress(OSError):
            lock = wait_for_lock(Path(job.log).with_suffix(".lock"), _tell_console)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def remove_unfinished(job: Job) -> None:
    """Removes what killed attempts at this job left: files that never got their final name."""
    for path in map(Path, job.files()):
        for left in path.parent.glob(f"{glob.escape(path.stem)}.tmp-*{glob.escape(path.suffix)}"):
            logger.info("removing %s of an earlier attempt", left)
            with contextlib.suppress(OSError):
                left.unlink()


def _tell_console(message: str) -> None:
    """One line to where Snakemake's own messages go."""
    with contextlib.suppress(OSError):
        os.write(console if console is not None else 2, f"{message}\n".encode())


# Standard error as it was before `redirect_output`.
console: int | None = None


def redirect_output(log: str | Path) -> None:
    """Sends everything this process and its children print to `log`.

    On the level of descriptors: assigning sys.stderr would miss what ffmpeg and CUDA write.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    global console
    console = os.dup(2)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def configure_logging() -> None:
    """Time, level and message to standard error, for every logger of the package."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    logging.captureWarnings(True)


def _log_header(job: Job) -> None:
    words = [job.rule, *(f"{name}={value}" for name, value in job.wildcards.items())]
    logger.info("%s", " ".join(words))
    logger.info(
        "%s; package %s, host %s, pid %d, %d threads",
        ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        Path(__file__).parent,
        platform.node(),
        os.getpid(),
        job.threads,
    )
    if "SLURM_JOB_ID" in os.environ:
        scheduler = [f"{n} {os.environ[n]}" for n in _SCHEDULER_VARIABLES if n in os.environ]
        limit = [describe_limit(job.runtime_min)] if job.runtime_min is not None else []
        logger.info("SLURM: %s", ", ".join(scheduler + limit))


@contextlib.contextmanager
def _logged_termination() -> Iterator[None]:
    """Turns SIGTERM into a logged exit, so that the log says why it ends."""

    def handle(number: int, frame: object) -> None:
        logger.error("terminated by signal %s", signal.Signals(number).name)
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread, as in some tests
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
