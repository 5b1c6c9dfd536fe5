"""Files into the disk cache while something else is imported. Light: the standard library."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_BLOCK = 4 * 2**20


def read_ahead(folder: Path, pattern: str = "*.safetensors") -> threading.Thread:
    """Reads the files of a folder in a thread of its own and forgets them.

    Weights are mapped into memory and read when touched, which a disk or a network does in small
    pieces; before that, imports keep a job busy for seconds without the disk. Errors are left to
    whoever reads the files in earnest.
    """

    def read() -> None:
        buffer = bytearray(_BLOCK)
        for path in sorted(folder.glob(pattern)):
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    return thread
