"""The head model that golden files belong to, prepared once per source folder."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel


@functools.cache
def prepared_head(head_folder: Path) -> Path:
    """Head-model folder made from `g.head_folder` by `prepare_head_model`."""
    folder = Path(tempfile.mkdtemp(prefix="cap4d_parity_head_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return prepare_head_model(head_folder, None, folder)


@functools.cache
def _load(head_folder: Path, options: tuple[tuple[str, Any], ...]) -> HeadModel:
    return HeadModel.load(prepared_head(head_folder), **dict(options))


def load_head(head_folder: Path, **options: Any) -> HeadModel:
    """`HeadModel.load` of the prepared head, cached."""
    return _load(Path(head_folder), tuple(sorted(options.items())))
