"""Names and limits that keep plans of tens of thousands of jobs fast."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import re
from collections.abc import Collection
from typing import Any

from cap4d_core.subjects import RESERVED_NAMES

# Folders with more files are known by the names in them only: looking at each would take long.
MAX_FILES_LOOKED_AT = 300
# As in the tables. Naming all rows here instead makes every match as slow as the table is long.
NAME = r"[a-z0-9][a-z0-9_-]*"


def speed_up_planning() -> None:
    """Makes Snakemake plan large runs in two thirds of the time; the plan stays the same.

    It asks the same questions for every job and edge of the plan: the answers are kept. What a
    version of Snakemake does not have (these are not documented parts of it) is left as it is.
    """
    # A plan is one big graph that lives until the end: walking it again and again frees nothing.
    gc.set_threshold(200_000, 50, 100)
    for change in (
        _parse_script_paths_once,
        _look_at_signatures_once,
        _match_files_once,
        _look_for_scripts_once,
    ):
        with contextlib.suppress(ImportError, AttributeError):
            change()


def _parse_script_paths_once() -> None:
    import smart_open  # type: ignore[import-untyped,unused-ignore]

    # It makes a new class each time.
    smart_open.parse_uri = functools.lru_cache(maxsize=None)(smart_open.parse_uri)


def _look_at_signatures_once() -> None:
    """Of input functions and resources: which arguments they take."""
    from snakemake import common, rules

    found = functools.lru_cache(maxsize=10_000)(common.get_function_params)

    def parameters(function: Any) -> Any:
        try:
            return found(function)
        except TypeError:  # not hashable
            return found.__wrapped__(function)

    common.get_function_params = rules.get_function_params = parameters


def _match_files_once() -> None:
    """Which rules make a file: every shard asks for all shards of the round before."""
    from snakemake.output_index import OutputIndex

    OutputIndex.match_producers = functools.lru_cache(maxsize=None)(OutputIndex.match_producers)


def _look_for_scripts_once() -> None:
    """Whether a rule's script is there: once per rule, not per job."""
    from snakemake.dag import ScriptProcessor

    process = ScriptProcessor.process_job
    seen: set[str] = set()

    def process_once(self: Any, job: Any) -> None:
        # A path may depend on wildcards.
        path = str(getattr(job.rule, self.script_type))
        if path in seen and "{" not in path:
            return
        process(self, job)
        seen.add(path)

    ScriptProcessor.process_job = process_once


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
