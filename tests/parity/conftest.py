"""Collects golden directories (`--goldens DIR`, repeatable) and prints the table of errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Table: file, arrays compared, ignored, max abs error, tolerance of that array."""
    if not _finished:
        return
    terminalreporter.section("parity")
    terminalreporter.write_line(
        f"{'file':32} {'compared':>8} {'ignored':>7} {'max abs error':>13}  array, tolerance"
    )
    for golden in _finished:
        worst = max(golden.comparisons, key=lambda c: c.max_error, default=None)
        detail = f"{worst.name}, {worst.tolerance}" if worst else "-"
        error = f"{worst.max_error:13.3g}" if worst else f"{'-':>13}"
        counts = f"{len(golden.comparisons):8d} {len(golden.ignored):7d}"
        terminalreporter.write_line(f"{golden.stem:32} {counts} {error}  {detail}")
