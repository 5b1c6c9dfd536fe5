"""Kernels of norms and gates against the same by torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.fused_pointwise import geglu, group_norm
from tests.core.test_fused_pointwise import channels_last, normal, some_norm

pytestmark = pytest.mark.gpu

# Of one rounding, and of sums in another order before it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.008, torch.float16: 0.001}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 320, 64, 64), (2, 640, 32, 32), (2, 2560, 8, 8), (3, 960, 16, 16), (1, 48, 6, 10)]
)
def test_group_norm(shape: tuple[int, ...], silu: bool, kind: torch.dtype) -> None:
    features, norm = (channels_last(*shape) * 3 + 1).to(kind), some_norm(8, shape[1]).to(kind)
    expected = group_norm(features, norm, silu)
    actual = group_norm(features.cuda(), norm.cuda(), silu)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_near(actual, expected)


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("shape", [(300, 1280), (33, 5120), (7, 96)])
def test_geglu(shape: tuple[int, int], kind: torch.dtype) -> None:
    product = (normal(shape[0], 2 * shape[1]) * 3).to(kind)
    assert_near(geglu(product.cuda()), geglu(product))
