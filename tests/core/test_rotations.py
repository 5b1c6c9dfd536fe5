"""Rotations: inverse maps, exactness, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from cap4d_core.geometry.rotations import (
    matrix_to_quaternion,
    minimal_rotation,
    quaternion_multiply,
    quaternion_to_matrix,
    rodrigues,
    so3_exp,
    so3_log,
)


def _vectors(max_angle: float, count: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(
        torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1
    )
    return axis * torch.rand(count, 1, generator=generator, dtype=torch.float64) * max_angle


def test_exponential_agrees_with_scipy() -> None:
    vectors = _vectors(6.0)
    expected = torch.from_numpy(Rotation.from_rotvec(vectors.numpy()).as_matrix())
    assert torch.allclose(so3_exp(vectors), expected, atol=1e-12)
    assert torch.allclose(rodrigues(vectors), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-5, 9.9e-3, 1.01e-2, 0.5, math.pi - 1e-6])
def test_log_inverts_exp(scale: float) -> None:
    vectors = torch.nn.functional.normalize(_vectors(1.0), dim=-1) * scale
    assert torch.allclose(so3_log(so3_exp(vectors)), vectors, atol=1e-7)


def test_log_of_half_turns() -> None:
    axes = torch.nn.functional.normalize(_vectors(1.0), dim=-1)
    half_turns = 2 * axes[:, :, None] * axes[:, None] - torch.eye(3, dtype=torch.float64)
    vectors = so3_log(half_turns)
    assert torch.allclose(vectors.norm(dim=-1), torch.tensor(math.pi, dtype=torch.float64))
    # The axis of a half turn is known up to sign.
    assert torch.allclose(so3_exp(vectors), half_turns, atol=1e-12)


@pytest.mark.parametrize("function", [rodrigues, so3_exp])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 0.3, 3.0])
def test_gradients_are_finite_and_right(function, scale: float) -> None:  # type: ignore[no-untyped-def]
    vectors = _vectors(1.0, 5) * scale
    exact = vectors.requires_grad_()
    (gradient,) = torch.autograd.grad(function(exact).square().sum() + function(exact).sum(), exact)
    assert torch.isfinite(gradient).all()
    # Finite differences straddle the clamp of `rodrigues` at 1e-4.
    if function is so3_exp or scale >= 1e-3:
        assert torch.autograd.gradcheck(function, (exact,), eps=1e-6, atol=1e-5)


def test_gradient_of_log_at_identity() -> None:
    matrix = torch.eye(3, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(so3_log(matrix).sum(), matrix)
    assert torch.isfinite(gradient).all()
    vectors = (_vectors(2.0, 5) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: so3_log(so3_exp(v)), (vectors,))


def test_rodrigues_of_zero_is_exactly_the_identity() -> None:
    assert torch.equal(rodrigues(torch.zeros(3)), torch.eye(3))


def test_quaternions_round_trip_and_multiply() -> None:
    matrices = so3_exp(_vectors(math.pi))
    quaternions = matrix_to_quaternion(matrices)
    assert torch.allclose(quaternion_to_matrix(3.0 * quaternions), matrices, atol=1e-12)
    product = quaternion_multiply(quaternions, quaternions.flip(0))
    assert torch.allclose(quaternion_to_matrix(product), matrices @ matrices.flip(0), atol=1e-12)
    scipy = torch.from_numpy(Rotation.from_matrix(matrices.numpy()).as_quat())[:, [3, 0, 1, 2]]
    assert torch.allclose((scipy * quaternions).sum(-1).abs(), torch.ones(200, dtype=torch.float64))


def test_minimal_rotation_takes_source_to_target_by_the_angle_between() -> None:
    vectors = torch.nn.functional.normalize(_vectors(1.0), dim=-1)
    source, target = vectors[:100], vectors[100:]
    rotation = minimal_rotation(source, target)
    # The formula guards its division with 1e-8, hence not exact to rounding.
    assert torch.allclose((rotation @ source[..., None])[..., 0], target, atol=1e-6)
    angle = torch.acos((source * target).sum(-1))
    assert torch.allclose(so3_log(rotation).norm(dim=-1), angle, atol=1e-4)


@pytest.mark.parametrize("source", [(0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_minimal_rotation_of_opposite_vectors(source: tuple[float, float, float]) -> None:
    vector = torch.tensor(source)
    rotation = minimal_rotation(vector, -vector)
    assert torch.allclose(rotation @ vector, -vector, atol=1e-6)
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-6)
    assert torch.linalg.det(rotation) > 0
