"""Linters, formatters, types and module boundaries: no findings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.snakemake_runs import ROOT, run_snakemake

pytestmark = pytest.mark.workflow
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
        ["snakefmt", "--check", "Snakefile", "rules"],
    ],
    ids=" ".join,
)
def test_no_findings(command: list[str]) -> None:
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_snakemake_lint(tmp_path: Path) -> None:
    result = run_snakemake(tmp_path, "--lint", "--configfile", str(ROOT / "config.yaml"))
    assert result.returncode == 0, result.stdout
