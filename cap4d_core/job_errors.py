"""What a job's log says about errors of the machine: memory and disks.

Light: the standard library.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries that are not written in Python raise their own types, with the system's words.
_FULL_WORDS = ("No space left on device", "Disk quota exceeded")


def machine_advice(
    error: Exception, rule: str, settings: Mapping[str, Any], files: Iterable[str]
) -> str | None:
    """Cause and remedy of an error that the machine caused; None for all others.

    Args:
        error: what ended the job.
        rule: name of the job's rule.
        settings: of the job's stage.
        files: outputs and log of the job.
    """
    if is_out_of_memory(error):
        return _memory_advice(rule, settings)
    if is_disk_full(error):
        return _disk_advice(files)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or GPU memory ran out."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota was full, also below other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _memory_advice(rule: str, settings: Mapping[str, Any]) -> str:
    advice = {
        "encode_references": "set sampling.low_memory: true",
        "sample_views": "set sampling.low_memory: true, or lower sampling.views_per_call",
        "decode_views": "set sampling.low_memory: true",
        "fit_avatar": "lower fitting.batch_size "
        f"(now {settings.get('batch_size', 'default')}) or fitting.num_gaussians_init "
        f"(now {settings.get('num_gaussians_init', 'default')})",
        "animate_avatar": "lower animation.frame_batch "
        f"(now {settings.get('frame_batch', 'default')}) or animation.resolution",
    }.get(rule, "lower the resolution")
    return (
        f"Out of memory in {rule}: {advice}; or run on a device with more memory. A job that "
        "keeps checkpoints goes on from the last one."
    )


def _disk_advice(files: Iterable[str]) -> str:
    free: dict[str, float] = {}
    for name in files:
        folder = Path(name).absolute()
        while not folder.is_dir():
            folder = folder.parent
        free[str(folder)] = shutil.disk_usage(folder).free / 1e6
    places = ", ".join(f"{folder}: {megabytes:.0f} MB free" for folder, megabytes in free.items())
    return (
        f"The disk is full, or a quota is used up ({places}). Nothing unfinished was left behind; "
        "make room and run the same command again."
    )
