"""What a process that does several jobs keeps between them, such as weights on the GPU.

An ordinary job process does one job and keeps nothing. Light: the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Keeper:
    """The last thing made under each name.

    Attributes:
        enabled: whether anything is kept.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made last under `name` if it had this key, else what `make` returns."""
        if name in self._kept and self._kept[name][0] == key:
            return cast(T, self._kept[name][1])
        self._kept.pop(name, None)  # before the next takes memory
        made = make()
        if self.enabled:
            self._kept[name] = key, made
        return made


KEEPER = Keeper()


def file_states(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a file or of all files below a folder; empty if there is none."""
    path = Path(path).resolve()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
