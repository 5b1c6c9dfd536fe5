"""Warm workers on a real GPU: the same bits as jobs in processes of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cap4d_core.gpu import LOCK_DIR_VARIABLE, visible_gpus
from cap4d_core.warm_worker import stop_worker
from tests.core.test_warm_worker import sampled_shards

pytestmark = pytest.mark.gpu


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, because names of sockets are limited."""
    path = Path(tempfile.mkdtemp(prefix="warm"))
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(path / "locks"))
    yield path
    stop_worker(visible_gpus()[0])
    shutil.rmtree(path)


def test_sampling_jobs_give_the_same_bits(folder: Path) -> None:
    results = sampled_shards(folder, {"CAP4D_DEVICE": "cuda"})
    for shard in ("1-of-2", "2-of-2"):
        assert results["1", shard] == results["0", shard]
    assert results["1", "1-of-2"] != results["1", "2-of-2"]
