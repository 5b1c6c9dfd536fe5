"""Where sampling is cut into rounds."""

from __future__ import annotations

import pytest

from cap4d_core.diffusion.round_plan import round_boundaries, round_steps
from cap4d_core.errors import UserError


def test_fractions_are_rounded_to_steps() -> None:
    assert round_boundaries([0.02, 0.06, 0.14, 0.30], 100) == [2, 6, 14, 30]
    assert round_boundaries([0.02, 0.06, 0.14, 0.30], 10) == [1, 3]


def test_indices_fractions_zero_and_duplicates() -> None:
    assert round_boundaries([7, 0.5, 0, 5, 0.501, 0.99], 10) == [5, 7]


def test_rounds_cover_all_steps_once() -> None:
    for sync in ([], [0.3], [1, 2, 3], [0.1, 0.2, 0.9]):
        steps = [s for first, stop in round_steps(sync, 12) for s in range(first, stop)]
        assert steps == list(range(12))
        assert all(first < stop for first, stop in round_steps(sync, 12))


def test_one_shard_needs_no_rounds() -> None:
    assert round_steps([0.2, 0.4], 10, num_shards=1) == [(0, 10)]
    assert len(round_steps([0.2, 0.4], 10, num_shards=2)) == 3


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan"), float("inf"), 10.0])
def test_impossible_values_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"sampling\.sync_steps"):
        round_boundaries([value], 10)
