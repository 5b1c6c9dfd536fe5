"""Collects golden directories (`--goldens DIR`, repeatable) and prints the table of errors."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.goldens import SLOW, Golden, manifest_entries

DEFAULT = [Path(__file__).parents[1] / "goldens" / name for name in ("mmdm", "avatar")]
MAKE_HEAD = Path(__file__).parents[1] / "goldens" / "head" / "make_head.py"

for _module in sorted(Path(__file__).parent.glob("adapters_*.py")):
    importlib.import_module(f"tests.parity.{_module.stem}")

_finished: list[Golden] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per golden file."""
    if "golden_file" not in metafunc.fixturenames:
        return
    directories = [Path(d) for d in metafunc.config.getoption("--goldens")] or DEFAULT
    cases = []
    for directory in directories:
        if not directory.is_dir():
            raise pytest.UsageError(f"--goldens {directory}: no such folder")
        files = sorted([*directory.glob("*.npz"), *directory.glob("*.ply")])
        if not files:
            raise pytest.UsageError(f"--goldens {directory}: no golden files (*.npz, *.ply)")
        for file in files:
            marks = [pytest.mark.slow] if file.stem in SLOW else []
            cases.append(
                pytest.param((directory, file), id=f"{directory.name}-{file.stem}", marks=marks)
            )
    metafunc.parametrize("golden_file", cases)


@pytest.fixture(scope="session")
def default_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source folder of the synthetic head, built once per session."""
    folder = tmp_path_factory.mktemp("golden_head")
    subprocess.run([sys.executable, str(MAKE_HEAD), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def golden(golden_file: tuple[Path, Path], request: pytest.FixtureRequest) -> Golden:
    """The golden file of a test, with the head model that belongs to it."""
    directory, file = golden_file
    own_head = directory / "head"
    head = own_head if own_head.is_dir() else request.getfixturevalue("default_head")
    result = Golden(file, directory, head, manifest_entries(directory).get(file.stem, {}))
    _finished.append(result)
    return result


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Table: file, arrays compared, ignored, max abs error, tolerance of that array."""
    if not _finished:
        return
    rows = [_row(golden) for golden in _finished]
    terminalreporter.section("parity")
    terminalreporter.write_line(
        f"{'file':32} {'compared':>8} {'ignored':>7} {'max abs error':>13}  array, tolerance"
    )
    for stem, compared, ignored, error, detail in rows:
        terminalreporter.write_line(f"{stem:32} {compared:8d} {ignored:7d} {error:>13}  {detail}")
    document = config.getoption("--parity-table")
    if document:
        _write_table(document, rows)


def _row(golden: Golden) -> tuple[str, int, int, str, str]:
    worst = max(golden.comparisons, key=lambda c: c.max_error, default=None)
    error = f"{worst.max_error:.3g}" if worst else "-"
    detail = f"{worst.name}, {worst.tolerance}" if worst else "-"
    return golden.stem, len(golden.comparisons), len(golden.ignored), error, detail


def _write_table(document: Path, rows: list[tuple[str, int, int, str, str]]) -> None:
    """Replaces what stands between the two markers of the document."""
    begin, end = "<!-- parity table: begin -->", "<!-- parity table: end -->"
    before, _, rest = document.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    machine = f"{platform.machine()}, {platform.system()}, torch {torch.__version__}"
    lines = [f"Measured on: {machine}, CPU.", ""]
    lines += ["| file | compared | ignored | max abs error | where, tolerance |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {s} | {c} | {i} | {e} | `{d.replace('|', '/')}` |" for s, c, i, e, d in rows]
    document.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}", "utf-8")
