"""`python -m cap4d_core` in a subprocess, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_cap4d(folder: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Runs one command in `folder`; output of both kinds."""
    result = subprocess.run(
        [sys.executable, "-m", "cap4d_core", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == code, result.stdout
    return result.stdout
