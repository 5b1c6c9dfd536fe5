"""Atomic writing and checked reading of JSON, npz, safetensors and images.

A file appears under its final name only when it is complete and on disk, so a killed job can never
leave something that looks finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` and renames it to `path` on success.

    The temporary name keeps the suffix, because many writers choose their format by it. On any
    exception the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        # Without fsync a crash can leave a renamed but empty file.
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as a hex string."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_file(path: str | Path, what: str, hint: str = "") -> Path:
    """Returns `path` if it is a non-empty file.

    Raises:
        InputFileError: missing, a folder, or empty.
    """
    path = Path(path)
    if not path.exists():
        raise InputFileError(path, "nothing there", what, hint)
    if not path.is_file():
        raise InputFileError(path, "a folder", what, hint)
    if path.stat().st_size == 0:
        raise InputFileError(path, "an empty file", what, hint)
    return path


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON atomically; refuses NaN, which is not JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def read_json(path: str | Path, what: str = "a JSON file") -> Any:
    """Reads JSON.

    Raises:
        InputFileError: missing or not JSON; says the line.
    """
    path = require_file(path, what)
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputFileError(path, f"invalid JSON ({error})", what) from None


def write_npz(path: str | Path, arrays: Mapping[str, NDArray[Any] | Any]) -> None:
    """Writes an uncompressed npz atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def read_npz(path: str | Path, what: str = "an npz file") -> dict[str, NDArray[Any]]:
    """Reads all arrays of an npz; object arrays (pickles) are refused.

    Raises:
        InputFileError: missing, truncated, or holding Python objects.
    """
    path = require_file(path, what)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputFileError(path, "a single array", what)
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError) as error:
        detail = f"an unreadable archive ({type(error).__name__}: {error})"
        raise InputFileError(path, detail, what, "Write the file again.") from None


def take_array(
    arrays: Mapping[str, NDArray[Any]],
    path: str | Path,
    name: str,
    shape: tuple[int | str | None, ...],
    dtype: type = np.float32,
) -> NDArray[Any]:
    """Takes one array of an npz, checked and converted.

    Args:
        arrays: content of the file.
        path: the file, for messages.
        name: field name.
        shape: expected sizes; None or a letter stands for any size.
        dtype: type to convert to; floating-point fields must be finite.

    Raises:
        InputFileError: missing field, wrong shape or kind, NaN or infinity.
    """
    if name not in arrays:
        present = ", ".join(sorted(arrays)) or "no fields"
        raise InputFileError(path, f"no field '{name}' (it has {present})", f"field '{name}'")
    array = arrays[name]
    wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
    fits = array.ndim == len(shape) and all(
        not isinstance(want, int) or want == have
        for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise InputFileError(path, f"'{name}' of shape {array.shape}", f"shape {wanted}")
    if array.dtype.kind not in "fiub":
        raise InputFileError(path, f"'{name}' of type {array.dtype}", "numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise InputFileError(
            path, f"'{name}' with NaN or infinity at index {bad}", "finite numbers"
        )
    return array.astype(dtype)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named tensors and string metadata atomically; equal ones give equal bytes."""
    from cap4d_core.files.safetensors_stream import write_safetensors_stream

    # Large types first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in ordered}
    write_safetensors_stream(path, layout, ordered, metadata)


def read_safetensors(
    path: str | Path, what: str = "a safetensors file", device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads named tensors and metadata.

    Raises:
        InputFileError: missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = require_file(path, what)
    try:
        with safe_open(path, framework="pt", device=device) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputFileError(
            path, f"unreadable content ({error})", what, "Delete it and run the workflow again."
        ) from None
