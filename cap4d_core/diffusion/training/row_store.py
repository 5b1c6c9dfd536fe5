"""Tables on disk that grow subject by subject and are read as memory-mapped tensors.

    {folder}/journal.jsonl   what the table belongs to, then one line per finished subject
    {folder}/{column}.bin    rows of a column, one after the other

A subject counts once its line is written, which happens after its rows are on disk; what a killed
process left behind its last line is cut off. Reading maps the files: rows occupy memory while the
system finds room for them, so a table may be larger than the memory, and processes share it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cap4d_core.errors import InputFileError

logger = logging.getLogger(__name__)

_TYPES = {str(t): t for t in (torch.uint8, torch.float16, torch.float32, torch.int64)}


class RowStore:
    """One table.

    Args:
        folder: made when needed.
        belongs_to: what its rows were made with; a table of something else is started over.

    Raises:
        InputFileError: a journal that is none.
    """

    def __init__(self, folder: str | Path, belongs_to: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.folder / "journal.jsonl"
        # Lines of finished subjects: key, rows and, in all of them alike, the columns.
        self.entries: list[dict[str, Any]] = []
        self.belongs_to = belongs_to
        lines, is_whole = self._read_journal()
        if lines and lines[0] == {"belongs_to": belongs_to}:
            self.entries = lines[1:]
        elif lines:
            logger.info("%s: made from other data or settings; starting over.", self.folder)
        if not (is_whole and self.entries):
            self._write_journal()

    @classmethod
    def existing(cls, folder: str | Path, what: str) -> RowStore:
        """A table that was made before, whatever it belongs to.

        Raises:
            InputFileError: it is not there.
        """
        journal = Path(folder) / "journal.jsonl"
        if not journal.is_file():
            raise InputFileError(folder, "no table", what, "Run again.")
        with open(journal, encoding="utf-8") as handle:
            return cls(folder, json.loads(handle.readline())["belongs_to"])

    def _read_journal(self) -> tuple[list[dict[str, Any]], bool]:
        """Its lines, and whether none was left unfinished."""
        if not self.journal.is_file():
            return [], False
        *lines, rest = self.journal.read_text("utf-8").split("\n")
        try:
            return [json.loads(line) for line in lines], not rest
        except json.JSONDecodeError as error:
            raise InputFileError(
                self.journal, f"a damaged line ({error})", "a journal", f"Delete {self.folder}."
            ) from None

    def _write_journal(self) -> None:
        lines = [{"belongs_to": self.belongs_to}, *self.entries]
        temporary = self.journal.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        os.replace(temporary, self.journal)

    @property
    def keys(self) -> list[str]:
        """Of the finished subjects, in order."""
        return [entry["key"] for entry in self.entries]

    @property
    def counts(self) -> list[int]:
        """Rows of the finished subjects."""
        return [entry["rows"] for entry in self.entries]

    def __len__(self) -> int:
        """Rows of all finished subjects."""
        return sum(self.counts)

    def keep(self, keys: Sequence[str]) -> int:
        """Forgets finished subjects from the first on that is not the one in `keys`.

        Returns:
            How many are left; the table goes on there.
        """
        kept = 0
        while kept < min(len(keys), len(self.entries)) and self.entries[kept]["key"] == keys[kept]:
            kept += 1
        if kept < len(self.entries):
            self.entries = self.entries[:kept]
            self._write_journal()
        return kept

    def append(self, key: str, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """Adds the rows of a subject.

        Args:
            key: says whether it is the same subject, later.
            parts: its rows, in pieces that fit into memory: tensors with a leading axis, of the
                same names, types and shapes for all pieces and subjects.

        Raises:
            ValueError: no rows, or other columns than before.
            InputFileError: rows of earlier subjects are gone.
        """
        layout = self.entries[0]["columns"] if self.entries else None
        before, rows = len(self), 0
        for part in parts:
            found = {name: [str(t.dtype), *t.shape[1:]] for name, t in part.items()}
            if layout not in (None, found):
                raise ValueError(f"columns {found}, before {layout}")
            layout = found
            counts = {len(tensor) for tensor in part.values()}
            if len(counts) != 1 or 0 in counts:
                raise ValueError(f"columns of {sorted(counts)} rows")
            for name, tensor in part.items():
                self._write_rows(name, tensor, before + rows)
            rows += counts.pop()
        if not rows:
            raise ValueError("no rows")
        for name in layout or {}:
            with open(self._file(name), "rb+") as handle:
                os.fsync(handle.fileno())
        entry = {"key": key, "rows": rows, "columns": layout}
        with open(self.journal, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.entries.append(entry)

    def _write_rows(self, name: str, tensor: Tensor, first: int) -> None:
        path, content = self._file(name), tensor.detach().cpu().contiguous().numpy()
        size = first * content[:1].nbytes
        self._require(path, size)
        with open(path, "r+b" if path.exists() else "wb") as handle:
            handle.truncate(size)
            handle.seek(size)
            handle.write(content.tobytes())

    def columns(self) -> dict[str, Tensor]:
        """All rows, as tensors on the CPU that map the files; read only.

        Raises:
            InputFileError: a file is shorter than the journal says.
        """
        if not self.entries:
            return {}
        total, result = len(self), {}
        for name, (kind, *shape) in self.entries[0]["columns"].items():
            dtype, path = _TYPES[kind], self._file(name)
            numel = total * torch.Size(shape).numel()
            self._require(path, numel * dtype.itemsize)
            mapped = torch.from_file(str(path), shared=False, size=numel, dtype=dtype)
            result[name] = mapped.view(total, *shape)
        return result

    def starts(self) -> Tensor:
        """(S + 1,) int64: first row of every subject, and the number of rows."""
        return torch.tensor([0, *self.counts]).cumsum(0)

    def _require(self, path: Path, size: int) -> None:
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise InputFileError(
                path, f"{found} bytes", f"at least {size}", f"Delete {self.folder}."
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
