"""Every golden file has an adapter and agrees with the package at its stated tolerance."""

from __future__ import annotations

import pytest

from tests.parity.goldens import ADAPTERS, Golden


def test_golden(golden: Golden) -> None:
    """One golden file: all arrays accounted for, all within tolerance."""
    check = ADAPTERS.get(golden.stem)
    if check is None:
        pytest.fail(f"no adapter for {golden.stem}; add one to tests/parity/adapters_*.py")
    check(golden)
    golden.finish()
