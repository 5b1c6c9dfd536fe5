"""The procedural head of the goldens, as source folder and prepared, built once per session."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cap4d_core.flame.assets import prepare_head_model

MAKE_HEAD = Path(__file__).parents[1] / "goldens" / "head" / "make_head.py"


@functools.cache
def head_source() -> Path:
    """Folder with data/assets/... and examples/input/{subject,animation/sequence_00}."""
    folder = Path(tempfile.mkdtemp(prefix="cap4d_head_source_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([sys.executable, str(MAKE_HEAD), str(folder)], check=True, capture_output=True)
    return folder


@functools.cache
def head_folder() -> Path:
    """The head as `prepare_head_model` writes it."""
    folder = Path(tempfile.mkdtemp(prefix="cap4d_head_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return prepare_head_model(head_source(), None, folder)
