"""The benchmark that CI watches fails when a part becomes slower than it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import ratios


def work(amount: int) -> None:
    sum(range(amount))


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, committed: dict[str, float], *options: str
) -> None:
    def parts() -> Iterator[ratios.Part]:
        yield "sum", lambda: work(400_000), lambda: work(100_000)

    file = folder / "ratios.json"
    file.write_text(json.dumps(committed))
    monkeypatch.setattr(ratios, "parts", parts)
    monkeypatch.setattr(ratios, "COMMITTED", file)
    monkeypatch.setattr("sys.argv", ["ratios", "--repeats", "2", *options])
    ratios.main()


def test_ratio_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path, {}, "--write")
    (ratio,) = json.loads((tmp_path / "ratios.json").read_text()).values()
    assert 2 < ratio < 8
    run(monkeypatch, tmp_path, {"sum": 4.0}, "--check")


@pytest.mark.parametrize(
    ("committed", "message"),
    [
        ({"sum": 40.0}, r"sum: \d.*at least 24.00"),
        ({}, "sum: not in"),
        ({"sum": 4.0, "gone": 1.0}, "gone"),
    ],
)
def test_regressions_fail(
    committed: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, committed, "--check")


@pytest.mark.parametrize(("committed", "expected"), [(30.0, 18.0), (1.2, 1.06)])
def test_what_still_passes(committed: float, expected: float) -> None:
    assert ratios.least(committed) == pytest.approx(expected)


def test_committed_ratios_are_all_of_faster_parts() -> None:
    committed = json.loads(ratios.COMMITTED.read_text())
    assert len(committed) > 4 and all(ratio > 1 for ratio in committed.values())
