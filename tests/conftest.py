"""Options and fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported: waiting threads that spin make tests slow where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--goldens` (reference arrays) and `--fix` (rewrite generated files)."""
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
