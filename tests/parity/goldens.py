"""Reference arrays on disk, and the adapters that compare the package with them.

A directory of goldens holds `manifest.json` and one npz per subject of comparison. An adapter is
chosen by file stem; it must account for every array of its file: consumed as input, compared, or
ignored with a reason. Sizes, seeds and configurations come from the files, never from the adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Adapter = Callable[["Golden"], None]
ADAPTERS: dict[str, Adapter] = {}
SLOW: set[str] = set()


def adapter(*stems: str, slow: bool = False) -> Callable[[Adapter], Adapter]:
    """Registers the adapter of one or several file stems."""

    def register(function: Adapter) -> Adapter:
        for stem in stems:
            if stem in ADAPTERS:
                raise ValueError(f"two adapters for {stem}")
            ADAPTERS[stem] = function
            if slow:
                SLOW.add(stem)
        return function

    return register


@dataclass
class Comparison:
    """One compared array."""

    name: str
    max_error: float
    tolerance: str


@dataclass
class Golden:
    """One golden file while it is being checked.

    Attributes:
        path: the file. directory: its goldens directory.
        head_folder: source folder of the head model to use (layout of make_head.py's assets).
        entry: the file's entry in manifest.json ({} when absent).
    """

    path: Path
    directory: Path
    head_folder: Path
    entry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as archive:
                self._arrays = {name: archive[name] for name in archive.files}
        self._open = set(self._arrays)
        self.comparisons: list[Comparison] = []
        self.ignored: dict[str, str] = {}
        self.problems: list[str] = []

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return self.path.stem

    @property
    def names(self) -> list[str]:
        """All array names."""
        return list(self._arrays)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def input(self, name: str) -> np.ndarray:
        """An array used as input (marked as accounted for)."""
        self._open.discard(name)
        return self._arrays[name]

    def inputs(self, pattern: str = r"in\..*") -> dict[str, np.ndarray]:
        """All arrays whose name matches the regular expression, as inputs."""
        return {name: self.input(name) for _, name in self.match(pattern)}

    def match(self, pattern: str) -> Iterator[tuple[re.Match[str], str]]:
        """Names that match the regular expression as a whole, with the match."""
        for name in self._arrays:
            found = re.fullmatch(pattern, name)
            if found:
                yield found, name

    def sibling(self, stem: str) -> Golden:
        """Another file of the same directory (its arrays need not be accounted for)."""
        return Golden(
            self.directory / f"{stem}.npz",
            self.directory,
            self.head_folder,
            self.manifest_entry(stem),
        )

    def manifest_entry(self, stem: str) -> dict[str, Any]:
        """Manifest entry of another file."""
        return manifest_entries(self.directory).get(stem, {})

    def peek(self, name: str) -> np.ndarray:
        """An expected array, without marking it as compared."""
        return self._arrays[name]

    def compare(
        self,
        name: str,
        actual: Any,
        *,
        atol: float = 0.0,
        rtol: float = 0.0,
        rel_to_peak: float = 0.0,
        max_outliers: float = 0.0,
        mean_atol: float | None = None,
    ) -> None:
        """Compares one expected array with what the package computes.

        Args:
            name: array in the file.
            actual: array or tensor of the same shape.
            atol: absolute tolerance. rtol: relative to each expected value.
            rel_to_peak: relative to the largest absolute expected value.
            max_outliers: fraction of the elements that may exceed the tolerance.
            mean_atol: bound of the mean absolute error, on top.
        """
        self._open.discard(name)
        expected = self._arrays[name]
        if hasattr(actual, "detach"):
            actual = actual.detach().cpu().numpy()
        actual = np.asarray(actual)
        if actual.shape != expected.shape:
            self.problems.append(f"{name}: shape {actual.shape}, expected {expected.shape}")
            return
        if expected.dtype.kind in "biu" and actual.dtype.kind not in "biuf":
            self.problems.append(f"{name}: type {actual.dtype}, expected {expected.dtype}")
            return
        want = expected.astype(np.float64)
        have = actual.astype(np.float64)
        peak = float(np.abs(want).max(initial=0.0))
        limit = atol + rtol * np.abs(want) + rel_to_peak * peak
        error = np.abs(have - want)
        # NaN compares false, so it counts as an outlier instead of slipping through.
        outliers = ~(error <= limit)
        worst = float(np.nanmax(error, initial=0.0)) if error.size else 0.0
        if np.isnan(error).any():
            worst = float("nan")
        parts = [f"mean <= {mean_atol:g}"] if mean_atol is not None else []
        if np.isfinite(atol) and (atol or not (rtol or rel_to_peak)):
            parts.append(f"atol {atol:g}")
        parts += [f"rtol {rtol:g}"] if rtol else []
        parts += [f"{rel_to_peak:g} of peak"] if rel_to_peak else []
        parts += [f"<= {100 * max_outliers:g} % beyond"] if max_outliers else []
        self.comparisons.append(Comparison(name, worst, ", ".join(parts)))
        share = float(outliers.mean()) if outliers.size else 0.0
        if share > max_outliers:
            self.problems.append(
                f"{name}: {100 * share:.3g} % of {error.size} values beyond {', '.join(parts)}; "
                f"max error {worst:.3g}, peak {peak:.3g}"
            )
        if mean_atol is not None and not float(error.mean()) <= mean_atol:
            self.problems.append(f"{name}: mean error {error.mean():.3g} > {mean_atol:g}")

    def compare_with(self, name: str, expected: Any, actual: Any, **tolerance: Any) -> None:
        """Compares something derived from the file (a PLY, an image) under a label of its own."""
        self._arrays[name] = np.asarray(expected)
        self.compare(name, actual, **tolerance)

    def check(self, condition: bool, message: str) -> None:
        """Records a problem unless the condition holds."""
        if not condition:
            self.problems.append(message)

    def ignore(self, pattern: str, reason: str) -> None:
        """Leaves out arrays, with a reason that appears in the table."""
        for _, name in list(self.match(pattern)):
            self._open.discard(name)
            self.ignored[name] = reason

    def finish(self) -> None:
        """Fails on any difference or unaccounted array."""
        if self._open:
            self.problems.append(f"arrays not accounted for: {', '.join(sorted(self._open))}")
        if not self.comparisons and not self.ignored and not self.problems:
            self.problems.append("nothing was compared")
        if self.problems:
            raise AssertionError("\n".join([f"{self.path}:", *self.problems]))


def manifest_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Entries of a goldens directory by file stem (both manifest layouts)."""
    file = directory / "manifest.json"
    if not file.exists():
        return {}
    manifest = json.loads(file.read_text("utf-8"))
    if "files" in manifest:
        return {Path(entry["file"]).stem: entry for entry in manifest["files"]}
    return dict(manifest.get("entries", {}))
