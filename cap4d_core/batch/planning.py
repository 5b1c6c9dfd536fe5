"""Names and limits that keep plans of tens of thousands of jobs fast."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import re
from collections.abc import Collection

from cap4d_core.subjects import RESERVED_NAMES

# Folders with more files are known by the names in them only: looking at each would take long.
MAX_FILES_LOOKED_AT = 300
# As in the tables. Naming all rows here instead makes every match as slow as the table is long.
NAME = r"[a-z0-9][a-z0-9_-]*"


def speed_up_planning() -> None:
    """Saves about a quarter of the time of a large plan; changes nothing else."""
    # A plan is one big graph that lives until the end: walking it again and again frees nothing.
    gc.set_threshold(200_000, 50, 100)
    with contextlib.suppress(ImportError, AttributeError):
        import smart_open  # type: ignore[import-untyped,unused-ignore]

        # Asked for the same few script paths for every job, it makes a new class each time.
        smart_open.parse_uri = functools.lru_cache(maxsize=None)(smart_open.parse_uri)


def folder_state(path: str | None) -> str:
    """A short text that changes when a file in a folder of the user does.

    Snakemake sees the time of the folder only, which stays when a photo in it is overwritten. For a
    file, and for nothing, the text is empty: that is Snakemake's business.
    """
    if path is None or not os.path.isdir(path):
        return ""
    names: list[str] = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        names += sorted(os.path.join(folder, file) for file in files if not file.startswith("."))
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.path.relpath(name, path).encode())
        if len(names) <= MAX_FILES_LOOKED_AT:
            with contextlib.suppress(OSError):  # gone just now, a dead link
                found = os.stat(name)
                # Whole seconds: disks that are shared round differently.
                digest.update(f" {found.st_size} {int(found.st_mtime)}\n".encode())
    return digest.hexdigest()[:16]


def subject_pattern() -> str:
    """Wildcard pattern of subjects: any name but the other folders of the results."""
    return rf"(?!(?:{'|'.join(sorted(RESERVED_NAMES))})/){NAME}"


def pattern_without(names: Collection[str]) -> str:
    """Wildcard pattern of subjects that are not among `names`."""
    return rf"(?!(?:{_one_of(names)})/){subject_pattern()}" if names else subject_pattern()


def pattern_of(names: Collection[str]) -> str:
    """Wildcard pattern of exactly these names; matches nothing when there are none."""
    return _one_of(names) if names else "NONE"


def _one_of(names: Collection[str]) -> str:
    return "|".join(map(re.escape, names))
