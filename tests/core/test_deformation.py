"""Deformation network and face frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cap4d_core.avatar.deformation import (
    DeformationUNet,
    max_layers,
    network_size,
    positional_encoding,
)
from cap4d_core.avatar.face_frames import face_frames, gather_rows, squared_rotation_angle
from cap4d_core.geometry.rotations import quaternion_to_matrix, so3_exp

NAMES = Path(__file__).parents[1] / "goldens" / "avatar" / "unet_state_names.json"


def test_parameter_names_and_shapes_are_the_released_ones() -> None:
    shapes = json.loads(NAMES.read_text("utf-8"))
    state = DeformationUNet(64, 6).state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == shapes
    assert network_size(state) == (64, 6)


@pytest.mark.parametrize(("channels", "layers", "size"), [(4, 2, 8), (4, 4, 16), (8, 5, 32)])
def test_any_size_keeps_the_resolution(channels: int, layers: int, size: int) -> None:
    network = DeformationUNet(channels, layers)
    assert network(torch.randn(2, 27, size, size)).shape == (2, 3, size, size)
    assert network_size(network.state_dict()) == (channels, layers)


def test_initial_deformation_is_zero_but_can_learn() -> None:
    network = DeformationUNet(4, 3)
    network.initialise(torch.Generator().manual_seed(0))
    output = network(torch.randn(1, 27, 16, 16))
    assert (output == 0).all()
    output.sum().backward()
    assert network.last_layer.weight.grad is not None
    assert network.last_layer.weight.grad.abs().sum() > 0


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    network = DeformationUNet(4, 3)
    x = torch.randn(3, 27, 16, 16, generator=torch.Generator().manual_seed(1))
    # Same arithmetic per sample, other blocking of the convolutions.
    assert torch.allclose(network(x)[1:2], network(x[1:2]), atol=1e-5)


def test_too_small_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        DeformationUNet(4, 5)(torch.zeros(1, 27, 16, 16))
    with pytest.raises(ValueError, match="2 or more"):
        DeformationUNet(4, 1)
    assert max_layers(64) == 6


def test_positional_encoding_layout() -> None:
    encoding = positional_encoding(8)
    x = torch.arange(8) / 8 * 2 - 1
    assert encoding.shape == (24, 8, 8)
    assert torch.allclose(encoding[5, :, 3], torch.sin(32 * x))
    assert torch.allclose(encoding[6, :, 3], torch.cos(x))
    assert torch.allclose(encoding[12, 3], torch.sin(x))


def _random_mesh(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(2, 9, 3, generator=generator, dtype=dtype)
    return vertices, torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 4, 8]])


def test_frames_are_rotations_that_move_with_the_mesh() -> None:
    vertices, faces = _random_mesh()
    frames = face_frames(vertices, faces)
    identity = torch.eye(3).expand_as(frames.rotation)
    assert torch.allclose(frames.rotation @ frames.rotation.transpose(-1, -2), identity, atol=1e-5)
    assert torch.allclose(torch.linalg.det(frames.rotation), torch.ones(2, 4), atol=1e-5)
    assert torch.allclose(quaternion_to_matrix(frames.quaternion), frames.rotation, atol=1e-5)
    turn, shift = so3_exp(torch.tensor([0.3, -1.1, 0.5])), torch.tensor([1.0, 2.0, 3.0])
    moved = face_frames(vertices @ turn.T * 2 + shift, faces)
    assert torch.allclose(moved.rotation, turn @ frames.rotation, atol=1e-5)
    assert torch.allclose(moved.scale, 2 * frames.scale, atol=1e-5)
    assert torch.allclose(moved.centre, frames.centre @ turn.T * 2 + shift, atol=1e-5)


def test_frame_axes() -> None:
    """Base along x, normal along z of a triangle in the plane; scale = (base + height) / 2."""
    vertices = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [0.7, 1, 0]]])
    frame = face_frames(vertices, torch.tensor([[0, 1, 2]]))
    expected = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert torch.allclose(frame.rotation[0, 0], expected, atol=1e-6)
    assert float(frame.scale) == pytest.approx(1.5)


def test_frames_of_degenerate_faces_have_finite_gradients() -> None:
    vertices = torch.zeros(1, 3, 3, requires_grad=True)
    frames = face_frames(vertices, torch.tensor([[0, 1, 2]]))
    (frames.rotation.sum() + frames.scale.sum() + frames.quaternion.sum()).backward()
    assert vertices.grad is not None and torch.isfinite(vertices.grad).all()


def test_frame_gradients() -> None:
    vertices, faces = _random_mesh(torch.float64)

    def outputs(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = face_frames(v, faces)
        return f.rotation, f.quaternion, f.scale, f.centre

    assert torch.autograd.gradcheck(outputs, (vertices.requires_grad_(),))


@pytest.mark.parametrize("batch", [1, 3])
def test_gather_rows_is_indexing(batch: int) -> None:
    table = torch.randn(batch, 5, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 3, 0, 4])
    assert torch.equal(gather_rows(table, index), table[:, index])
    assert torch.autograd.gradcheck(lambda t: gather_rows(t, index), (table,))


def test_squared_angle() -> None:
    for angle in (0.0, 1e-5, 1e-3, 0.5, 2.0, 3.0):
        axis = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        value = squared_rotation_angle(so3_exp(axis * angle))
        assert float(value) == pytest.approx(angle**2, rel=1e-6, abs=1e-12)
    still = torch.eye(3).requires_grad_()
    squared_rotation_angle(still).backward()
    assert still.grad is not None and (still.grad == 0).all()
    r = so3_exp(torch.tensor([[0.4, -0.2, 0.1], [1e-6, 0, 0]], dtype=torch.float64))
    assert torch.autograd.gradcheck(squared_rotation_angle, (r.requires_grad_(),), atol=1e-6)
