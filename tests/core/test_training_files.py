"""Files of a training run: tables that grow, metrics, names of folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.training.records import (
    add_record,
    draw_curves,
    forget_after,
    read_records,
)
from cap4d_core.diffusion.training.row_store import RowStore
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.images import read_rgb
from cap4d_core.training_settings import TrainingDataSettings, expand_folders


def rows(first: int, count: int) -> dict[str, Tensor]:
    numbers = torch.arange(first, first + count)
    return {
        "images": numbers.to(torch.uint8)[:, None].expand(count, 3),
        "cameras": numbers.float()[:, None, None].expand(count, 2, 2),
    }


def filled(folder: Path) -> RowStore:
    """Two subjects of 3 and 2 rows; the first came in two pieces."""
    store = RowStore(folder, "data")
    store.append("a", [rows(0, 2), rows(2, 1)])
    store.append("b", [rows(3, 2)])
    return store


def test_rows_come_back_mapped(tmp_path: Path) -> None:
    filled(tmp_path)
    store = RowStore(tmp_path, "data")
    assert store.keys == ["a", "b"] and store.starts().tolist() == [0, 3, 5]
    columns = store.columns()
    assert columns["images"].dtype == torch.uint8
    for name, expected in rows(0, 5).items():
        assert torch.equal(columns[name], expected)
    assert columns["cameras"][torch.tensor([[4, 0]])][0, :, 0, 0].tolist() == [4.0, 0.0]


def test_what_a_killed_process_left_is_cut_off(tmp_path: Path) -> None:
    filled(tmp_path)
    with open(tmp_path / "images.bin", "ab") as file:
        file.write(b"unfinished")
    with open(tmp_path / "journal.jsonl", "a") as journal:
        journal.write('{"key": "c", "ro')
    store = RowStore(tmp_path, "data")
    assert store.keys == ["a", "b"]
    store.append("c", [rows(5, 1)])
    again = RowStore(tmp_path, "data")
    assert again.keys == ["a", "b", "c"]
    assert again.columns()["images"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_changed_subjects_and_all_after_them_are_made_anew(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert store.keep(["a", "b", "new"]) == 2
    assert store.keep(["a", "changed"]) == 1
    store.append("changed", [rows(7, 1)])
    assert store.columns()["images"][:, 0].tolist() == [0, 1, 2, 7]
    assert RowStore(tmp_path, "other data").keys == []


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ValueError, match="columns"):
        RowStore(tmp_path, "data").append("c", [{"images": torch.zeros(1, 4)}])
    (tmp_path / "images.bin").write_bytes(b"12")
    with pytest.raises(InputFileError, match=r"images\.bin: found 2 bytes; expected at least 15"):
        RowStore(tmp_path, "data").columns()
    with pytest.raises(InputFileError, match="no table"):
        RowStore.existing(tmp_path / "nowhere", "frames")


def test_metrics_after_the_state_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (2, 4, 6):
        add_record(path, {"phase": "denoiser", "step": step, "loss": 1.0 / step})
        add_record(path, {"phase": "autoencoder", "step": step, "loss": 1.0})
    with open(path, "a") as file:
        file.write('{"phase": "den')
    forget_after(path, {"denoiser"}, 4)
    steps = [e["step"] for e in read_records(path) if e["phase"] == "denoiser"]
    assert steps == [2, 4] and len(read_records(path)) == 5
    assert all(json.loads(line) for line in path.read_text().splitlines())
    draw_curves(tmp_path / "curve.png", read_records(path))
    assert read_rgb(tmp_path / "curve.png").std() > 5


def test_patterns_of_folders(tmp_path: Path) -> None:
    for name in ("ana", "ben", "notes"):
        (tmp_path / name).mkdir()
    for name in ("ana", "ben"):
        (tmp_path / name / "fit.npz").touch()
    both = [str(tmp_path / "ana"), str(tmp_path / "ben")]
    assert expand_folders([both[1], f"{tmp_path}/*"]) == both[::-1]
    with pytest.raises(UserError, match=r"training\.data\.folders: no folder with a fit\.npz"):
        expand_folders([f"{tmp_path}/none*"])
    with pytest.raises(ValueError, match="name tracking folders"):
        TrainingDataSettings()
