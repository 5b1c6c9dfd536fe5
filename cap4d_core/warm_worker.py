"""A process that stays on a GPU between jobs, so that the next one need not start up.

Sampling cuts a subject into tens of jobs of a minute or less; importing torch, initialising CUDA
and loading weights takes seconds in each. So the first such job on a GPU starts a worker, and the
jobs after it hand themselves over: their process waits while the worker computes and writes to
their log.

- Only who holds the lease of a GPU talks to its worker, over a socket beside the lock file. The
  lease goes along with the job, so the GPU stays leased until the worker is done with it or dead.
- A worker ends with the job that waits for it: kill the job, and its worker is gone, too.
- If a worker dies, the job goes on by itself, from its checkpoint where it has one.
- A worker ends when it has failed at a job, has been idle for IDLE_S, differs from a job in code or
  environment, or is in the way of another kind of job.

CAP4D_WARM_WORKER=0 switches them off. Not under SLURM and Kubernetes, which end all processes of a
job with it. The job's side is light: the standard library.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import logging
import os
import runpy
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cap4d_core.gpu import lock_folder, lock_name

if TYPE_CHECKING:
    from cap4d_core.job import Job

logger = logging.getLogger(__name__)

SWITCH = "CAP4D_WARM_WORKER"
RULES = frozenset({"encode_references", "sample_views", "decode_views"})
IDLE_S = 30.0
_PACKAGE = Path(__file__).resolve().parent
_SCRIPTS = _PACKAGE.parent / "workflow_scripts"
# Set anew for every job, without effect on it.
_VOLATILE = ("_", "PWD", "OLDPWD", "SHLVL")
_LENGTH = struct.Struct("!Q")
_MAX_DESCRIPTORS = 64
# Closed by the system when the worker has ended and given back the memory of the GPU.
_open_to_the_end: list[socket.socket] = []


def is_wanted(rule: str) -> bool:
    """Whether jobs of a rule are handed to a worker here."""
    if rule not in RULES or os.environ.get(SWITCH, "1") == "0":
        return False
    return not os.environ.keys() & {"SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"}


def run_in_worker(
    job: Job, gpu: str, console: int, held: Sequence[int], scripts: Path = _SCRIPTS
) -> int | None:
    """Hands a job over and waits for it.

    Args:
        job: what to do.
        gpu: name of the leased GPU.
        console: descriptor of what the user looks at.
        held: descriptors of locks to be held while the job runs.
        scripts: folder with a script for each rule, whose function `main` does the job.

    Returns:
        Exit code; None if no worker did it, so that this process has to.
    """
    script = str(scripts / f"{job.rule}.py")
    request = {"key": _key(), "job": asdict(job), "script": script, "folder": os.getcwd()}
    for connect in (_connect, _start):
        try:
            connection = connect(gpu)
        except OSError as error:
            logger.info("no warm worker: %s", error)
            continue
        if connection is None:
            continue
        with connection:
            accepted = False
            try:
                _send(connection, request, [1, 2, console, *held])
                accepted = "accepted" in _receive(connection)[0]
                if accepted:
                    return int(_receive(connection)[0]["code"])
                # Of another version or environment: it ends.
                connection.settimeout(10.0)
                connection.recv(1)
            except (OSError, EOFError, ValueError, KeyError):
                if accepted:
                    logger.warning("The warm worker ended; this process goes on.")
                    return None
    return None


def stop_worker(gpu: str) -> None:
    """Ends the worker of a leased GPU, if there is one, and waits for its end."""
    with contextlib.suppress(OSError, EOFError, ValueError):
        connection = _connect(gpu)
        if connection is not None:
            with connection:
                connection.settimeout(10.0)
                _send(connection, {"key": None}, [])
                _receive(connection)
                connection.recv(1)


def _socket_path(gpu: str) -> Path:
    return lock_folder() / f"{lock_name(gpu)}.{os.getuid()}.sock"


def _connect(gpu: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(_socket_path(gpu)))
        if _peer(connection) == os.getuid():
            return connection
    except OSError:
        pass  # nobody there
    connection.close()
    return None


def _start(gpu: str) -> socket.socket:
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "cap4d_core.warm_worker", str(_socket_path(gpu)), _key(),
             str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches it through the job only
        )  # fmt: skip
    return ours


def _key() -> str:
    """Names the code and the environment that a worker must share with a job."""
    environment = {k: v for k, v in os.environ.items() if k not in (*_VOLATILE, "PYTHONPATH")}
    newest = max(path.stat().st_mtime_ns for path in _PACKAGE.rglob("*.py"))
    content = [sys.executable, str(_PACKAGE), newest, sorted(environment.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _peer(connection: socket.socket) -> int:
    """User id of the process at the other end."""
    size = struct.calcsize("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", raw)[1])


def _send(connection: socket.socket, content: Any, descriptors: Sequence[int]) -> None:
    body = json.dumps(content).encode()
    header = _LENGTH.pack(len(body))
    if descriptors:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        connection.sendmsg([header], [rights])
    else:
        connection.sendall(header)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A message and its descriptors.

    Raises:
        EOFError: the other end is gone.
    """
    space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    header, ancillary, _, _ = connection.recvmsg(_LENGTH.size, space)
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    try:
        while len(header) < _LENGTH.size:
            header += _some(connection, _LENGTH.size - len(header))
        length, body = _LENGTH.unpack(header)[0], b""
        while len(body) < length:
            body += _some(connection, length - len(body))
        content: dict[str, Any] = json.loads(body)
    except (OSError, EOFError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return content, list(descriptors)


def _some(connection: socket.socket, size: int) -> bytes:
    part = connection.recv(min(size, 1 << 20))
    if not part:
        raise EOFError
    return part


def serve(path: Path, key: str, first: socket.socket, idle_s: float = IDLE_S) -> None:
    """Does the job of `first`, then those of whoever connects, until it is time to end."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        with contextlib.suppress(OSError):  # path too long or not writable: one job only
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
        inode = path.stat().st_ino if path.exists() else None
        listener.settimeout(idle_s)
        connection = first
        try:
            while _serve_one(connection, key):
                connection, _ = listener.accept()
        except OSError:  # idle for long
            pass
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()


def _serve_one(connection: socket.socket, key: str) -> bool:
    """Does one job; whether to wait for another."""
    connection.settimeout(None)
    if _peer(connection) != os.getuid():
        connection.close()
        return True
    try:
        request, descriptors = _receive(connection)
    except (OSError, EOFError, ValueError):
        connection.close()
        return True
    if request["key"] != key:
        _send(connection, {"refused": True}, [])
        _open_to_the_end.append(connection)
        return False
    with contextlib.suppress(OSError):
        _send(connection, {"accepted": True}, [])
    finished = threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        if not finished.is_set():
            os._exit(1)  # whoever waited is gone

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = _do(request, descriptors)
    finished.set()
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        _send(connection, {"code": code}, [])
    watcher.join()
    connection.close()
    return code == 0


def _do(request: dict[str, Any], descriptors: Sequence[int]) -> int:
    from cap4d_core import job as jobs

    job = jobs.Job(**request["job"])
    os.chdir(request["folder"])
    out, err, jobs.console = descriptors[:3]
    os.dup2(out, 1)
    os.dup2(err, 2)
    jobs.configure_logging()
    logger.info("in the warm worker, pid %d", os.getpid())
    try:
        return jobs.execute_here(runpy.run_path(request["script"], run_name="job")["main"], job)
    except SystemExit as error:  # told to end
        return error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        if "torch" in sys.modules:
            import torch

            torch.cuda.empty_cache()  # of the GPU, only what is kept stays taken


def main() -> None:
    """The worker: socket path, key and descriptor of the first job's connection as arguments."""
    from cap4d_core.kept import KEEPER

    path, key, descriptor = sys.argv[1:]
    KEEPER.enabled = True
    serve(Path(path), key, socket.socket(fileno=int(descriptor)))
    os._exit(0)  # without Python closing the connection long before the memory is given back


if __name__ == "__main__":
    main()
