"""A cache between workflows for what does not depend on the subject.

Where the environment variable CAP4D_CACHE names a folder, jobs look there before they compute, and
leave there what they made:

    {cache}/{rule}/{key}/files/...      what the job writes
    {cache}/{rule}/{key}/entry.json     size and SHA-256 of each file; written last
    {cache}/compiled/{GPU}-torch{...}/  compiled kernels, see `compiled_folder`

The key is a hash of the contents of the inputs (not of their names or times), of the settings that
matter and of the stage's version. Snakemake's own cache is not used: it refuses rules that are
benchmarked, does not look into folders, and does not notice damaged entries.

Files are hard links where the disk allows it, so an entry takes no second copy; only those that
Snakemake knows by name are copied, because it goes by their times. Everything is checked before it
is used; a damaged entry is thrown away and made again. Who may write into the cache can change what
later runs compute: share it only among people who trust each other.

Light: the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cap4d_core.job import Job
from cap4d_core.job_environment import package_versions

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "CAP4D_CACHE"
_ENTRY = "entry.json"
_FILES = "files"
# Written by Snakemake, or naming the place where something was made.
_NOT_CONTENT = frozenset({".snakemake_timestamp", "provenance.json"})
_NOT_CACHED = frozenset({".snakemake_timestamp"})


def cache_root() -> Path | None:
    """Folder of the cache; None where none is wanted."""
    text = os.environ.get(CACHE_VARIABLE, "").strip()
    return Path(text).expanduser().resolve() if text else None


def compiled_folder() -> Path | None:
    """Where kernels are kept that torch compiled; it makes a subfolder per GPU and torch."""
    root = cache_root()
    return None if root is None else root / "compiled"


def through_cache(
    job: Job,
    folder: Path,
    inputs: Mapping[str, Path | Sequence[Path]],
    make: Callable[[], Any],
    params: Iterable[str] = (),
    versions: Mapping[str, str] | None = None,
) -> None:
    """Fills `folder` from the cache, or runs `make` and keeps what it wrote there.

    Args:
        job: the job; its rule and stage version belong to the key.
        folder: what `make` fills; it is the job's alone.
        inputs: files and folders whose contents decide the result.
        make: the work itself.
        params: names of the job's params that decide the result, too.
        versions: versions of libraries that do.
    """
    root = cache_root()
    if root is None:
        make()
        return
    key = {
        "rule": job.rule,
        "version": job.params["version"],
        "params": {name: job.params[name] for name in sorted(params)},
        "inputs": {name: content_hash(paths) for name, paths in sorted(inputs.items())},
        "versions": dict(versions or {}),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    entry = root / job.rule / digest
    declared = frozenset(job.files())
    if _restore(entry, folder, declared):
        logger.info("taken from the cache, nothing computed: %s", entry)
        return
    make()
    try:
        _store(entry, folder, key, declared)
    except OSError as error:  # full, not writable: the job itself is done
        logger.warning("not kept in the cache: %s", error)


def library_versions(device: str) -> dict[str, str]:
    """What else decides the bits of a computation: libraries, and the kind of device."""
    versions = package_versions()
    return {name: versions.get(name, "") for name in ("torch", "numpy")} | {"device": device}


def content_hash(paths: Path | Sequence[Path]) -> str:
    """SHA-256 of the contents of files and folders, the same wherever they are.

    Raises:
        OSError: something is missing or unreadable.
    """
    digest = hashlib.sha256()
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir():
            for file in _files_below(path, _NOT_CONTENT):
                name = file.relative_to(path).as_posix()
                digest.update(f"{name}\0{_sha256(file)}\n".encode())
        else:
            digest.update(f"{_sha256(path)}\n".encode())
    return digest.hexdigest()


def _restore(entry: Path, folder: Path, declared: frozenset[str]) -> bool:
    """Whether `folder` was filled; a damaged entry is removed, with a message."""
    try:
        listed = json.loads((entry / _ENTRY).read_text("utf-8"))["files"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        _discard(entry, f"{_ENTRY} is unreadable ({error})")
        return False
    for name, expected in listed.items():
        problem = _problem(entry / _FILES / name, expected)
        if problem:
            _discard(entry, problem)
            return False
    try:
        for name in listed:
            _place(entry / _FILES / name, folder / name, str(folder / name) not in declared)
    except OSError as error:  # removed by somebody else just now, or no space
        logger.warning("not taken from the cache: %s", error)
        return False
    return True


def _problem(path: Path, expected: Mapping[str, Any]) -> str:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, {expected['bytes']} were written"
        found = _sha256(path)
    except OSError as error:
        return f"{path.name} is unreadable ({error.strerror})"
    if found != expected["sha256"]:
        return f"{path.name} has SHA-256 {found}, written was {expected['sha256']}"
    return ""


def _discard(entry: Path, problem: str) -> None:
    logger.warning("%s: the cached copy is damaged: %s. It is made again.", entry, problem)
    aside = entry.with_name(f"{entry.name}.damaged-{os.getpid()}")
    with contextlib.suppress(OSError):  # another job may be faster
        os.replace(entry, aside)
        shutil.rmtree(aside)


def _store(entry: Path, folder: Path, key: Mapping[str, Any], declared: frozenset[str]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Oldest first: what stages write last, as a sign that all is there, is also restored last.
    files = sorted(
        _files_below(folder, _NOT_CACHED), key=lambda file: (file.stat().st_mtime_ns, file)
    )
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-") as work:
        staging = Path(work) / "entry"
        listed = {}
        for file in files:
            name = file.relative_to(folder).as_posix()
            _place(file, staging / _FILES / name, str(file) not in declared)
            listed[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        content = {"key": key, "files": listed}
        (staging / _ENTRY).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        try:
            os.rename(staging, entry)
        except OSError:
            if not entry.exists():  # else another workflow made the same meanwhile
                raise


def _place(source: Path, target: Path, may_link: bool) -> None:
    """Puts a file at `target` at once, replacing what is there: a hard link if possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        if not may_link:
            raise OSError
        os.link(source, temporary)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _files_below(folder: Path, left_out: frozenset[str]) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in left_out)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
