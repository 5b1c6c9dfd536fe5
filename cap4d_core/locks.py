"""Locks of files that end with their process, whatever ends it.

flock(2) on an open descriptor: nothing is left to clean up after SIGKILL or a lost machine. File
systems without flock get a warning instead of a lock.

Light: the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_NOTICE_S = 60.0


@dataclass(frozen=True)
class FileLock:
    """A lock held by this process."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        with contextlib.suppress(OSError):
            # Before the lock goes: afterwards the file may be somebody else's.
            self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def try_lock(path: Path) -> FileLock | None:
    """Locks a file, which is made when needed; None while another process holds it.

    Raises:
        OSError: the file cannot be made or opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); going on without", path, error)
        if _is_current(descriptor, path):
            _write_holder(descriptor)
            return FileLock(path, descriptor)
        os.close(descriptor)  # its holder removed it between our two calls


def wait_for_lock(path: Path, tell: Callable[[str], object]) -> FileLock:
    """Locks a file, waiting for the process that holds it; says so once a minute.

    Raises:
        OSError: the file cannot be made or opened.
    """
    next_notice = time.monotonic()
    while (lock := try_lock(path)) is None:
        if time.monotonic() >= next_notice:
            next_notice = time.monotonic() + _NOTICE_S
            tell(f"{path}: held by {describe_holder(path)}; waiting for it to end")
        time.sleep(_POLL_S)
    return lock


def describe_holder(path: Path) -> str:
    """Who holds a lock, for people: host, process, folder, time."""
    try:
        holder = json.loads(path.read_text("utf-8"))
        return (
            f"process {holder['pid']} on {holder['host']}, started in {holder['folder']} at "
            f"{holder['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the path still names the opened file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "host": platform.node(),
        "pid": os.getpid(),
        "folder": os.getcwd(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):  # a full disk must not keep the lock from working
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
