"""What can be compiled, and where compiled kernels are kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from cap4d_core.batch.asset_cache import CACHE_VARIABLE
from cap4d_core.compiling import can_compile, use_compile_cache

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"


@pytest.fixture(autouse=True)
def no_folders_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (INDUCTOR, TRITON, CACHE_VARIABLE):
        monkeypatch.setenv(name, "")  # what the tests set is taken back
        monkeypatch.delenv(name)


def test_beside_the_weights(tmp_path: Path) -> None:
    folder = use_compile_cache(tmp_path / "compiled")
    assert folder is not None and folder.parent == tmp_path / "compiled" and folder.is_dir()
    assert os.environ[INDUCTOR] == str(folder) and os.environ[TRITON] == str(folder / "triton")


def test_in_the_cache_between_workflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = use_compile_cache(tmp_path / "compiled")
    assert folder is not None and folder.parent == tmp_path / "cache" / "compiled"
    assert not (tmp_path / "compiled").exists()


def test_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(INDUCTOR, str(tmp_path / "own"))
    assert use_compile_cache(tmp_path / "compiled") == tmp_path / "own"


def test_nowhere_if_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "compiled").write_text("a file")
    assert use_compile_cache(tmp_path / "compiled") is None and not {INDUCTOR, TRITON} & set(
        os.environ
    )


@pytest.mark.parametrize(
    ("capability", "possible"), [((6, 1), False), ((7, 5), True), ((9, 0), True)]
)
def test_old_gpus_compile_nothing(
    capability: tuple[int, int], possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    assert can_compile(torch.device("cuda")) is possible


def test_compiling_needs_a_compiler_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert can_compile(torch.device("cpu"))
    assert not can_compile(torch.device("cuda"))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not can_compile(torch.device("cpu"))
