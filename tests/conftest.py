"""Options and fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.workflow.tiny_run import TinyRun

# Before torch is imported: waiting threads that spin make tests slow where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds options: reference arrays, tables to write, generated files to rewrite."""
    parser.addoption(
        "--goldens", action="append", default=[], help="directory of reference arrays; repeatable"
    )
    parser.addoption(
        "--parity-table",
        type=Path,
        default=None,
        help="write the table of parity errors into this Markdown file",
    )
    parser.addoption(
        "--fault-table",
        type=Path,
        default=None,
        help="write what the tests of faults saw into the table of this Markdown file",
    )
    parser.addoption(
        "--fix", action="store_true", help="rewrite generated files instead of failing"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw without a generator of their own draw the same every time."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real photos and fits (`CAP4D_REAL_DATA`, default ../shared/real)."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("CAP4D_REAL_DATA", root.parent / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip(f"real test data absent: {folder} (set CAP4D_REAL_DATA)")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_results(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny workflow, run once on this machine; tests work on copies."""
    from tests.workflow.tiny_run import finished_run

    return finished_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def saw_fault(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Takes (fault, lost, recovery, action), for the table of `--fault-table`."""
    from tests.fault_table import Row, update_table

    rows: list[Row] = []
    yield lambda *words: rows.append(Row(*words))
    path = request.config.getoption("--fault-table")
    for row in rows:
        print(row)
    if path is not None:
        update_table(path, rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
