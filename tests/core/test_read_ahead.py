"""Reading ahead touches nothing and fails silently."""

from __future__ import annotations

from pathlib import Path

from cap4d_core.read_ahead import read_ahead


def test_files_are_read_once_each(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "c.json"):
        (tmp_path / name).write_bytes(b"x" * 100)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    thread = read_ahead(tmp_path)
    thread.join(10)
    assert not thread.is_alive() and thread.daemon
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_cannot_be_read_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for folder in (tmp_path, tmp_path / "none"):
        thread = read_ahead(folder)
        thread.join(10)
        assert not thread.is_alive()
