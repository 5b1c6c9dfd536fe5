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
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cap4d_core import __version__
from cap4d_core.errors import NoGpuError, UserError
from cap4d_core.gpu import DEVICE_VARIABLE, lease_for_job
from cap4d_core.progress import ProgressLogger, format_duration

logger = logging.getLogger("cap4d")

JOB_FILE_FORMAT = 1
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"
)  # fmt: skip

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

    def progress(self, unit_of_work: str) -> ProgressLogger:
        """A progress callback that writes to the log."""
        name = " ".join([*self.wildcards.values(), unit_of_work])
        return ProgressLogger(name)

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
        if job.log:
            redirect_output(job.log)
            write_job_file(job_file_path(job.log), job)
    else:
        job = _job_from_command_line()
    configure_logging()
    sys.exit(execute(main, job))


def execute(main: Callable[[Job], None], job: Job) -> int:
    """Runs `main(job)`; returns the exit code."""
    start = time.monotonic()
    _log_header(job)
    _prepare_environment(job)
    try:
        with _logged_termination():
            lease_for_job(job.num_gpus)
            main(job)
    except UserError as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except Exception as error:
        if _is_out_of_memory(error):
            logger.error("%s\n%s", error, _out_of_memory_advice(job))
        else:
            logger.exception("%s failed", job.rule)
        return 1
    logger.info("done in %s", format_duration(time.monotonic() - start))
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
    )


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
    content = {"format": JOB_FILE_FORMAT, "folder": os.getcwd(), **asdict(job)}
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


def redirect_output(log: str | Path) -> None:
    """Sends everything this process and its children print to `log`.

    On the level of descriptors: assigning sys.stderr would miss what ffmpeg and CUDA write.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
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
    slurm = {key: os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
             if key in os.environ}  # fmt: skip
    if slurm:
        logger.info("SLURM: %s", ", ".join(f"{key} {value}" for key, value in slurm.items()))


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers; without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"cap4d_core": __version__, "Python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "diffusers", "gsplat"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _prepare_environment(job: Job) -> None:
    """Thread counts and caches; before torch and numba are imported."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(job.threads)
    # Threads that wait sleep: spinning makes jobs many times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Less fragmentation where one process holds network and images of changing size.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    set_numba_cache(os.environ)


def set_numba_cache(environment: Any, package: Path = Path(__file__).parent) -> None:
    """Sends numba's compiled loops to a folder of the user when the package may not be written."""
    if "NUMBA_CACHE_DIR" in environment or os.access(package, os.W_OK):
        return
    for root in (environment.get("XDG_CACHE_HOME"), "~/.cache", f"/tmp/cap4d-{os.getuid()}"):
        if not root:
            continue
        folder = Path(root).expanduser() / "cap4d" / "numba"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                environment["NUMBA_CACHE_DIR"] = str(folder)
                return


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


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError)


def _out_of_memory_advice(job: Job) -> str:
    settings: Mapping[str, Any] = job.params.get("settings", {})
    advice = {
        "encode_references": "set sampling.low_memory: true",
        "sample_views": "set sampling.low_memory: true, or lower sampling.views_per_call",
        "decode_views": "set sampling.low_memory: true",
        "fit_avatar": "lower fitting.batch_size "
        f"(now {settings.get('batch_size', 'default')}) or fitting.num_gaussians_init "
        f"(now {settings.get('num_gaussians_init', 'default')})",
        "animate_avatar": "lower animation.frame_batch "
        f"(now {settings.get('frame_batch', 'default')}) or animation.resolution",
    }.get(job.rule, "lower the resolution")
    return (
        f"Out of memory in {job.rule}: {advice}; or run on a device with more memory. A job that "
        "keeps checkpoints goes on from the last one."
    )
