"""Sinusoidal embeddings."""

from __future__ import annotations

import torch

from cap4d_core.diffusion.embeddings import encode_positions, time_projection


def test_position_channels_are_sines_then_cosines_per_coordinate() -> None:
    points = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    encoded = encode_positions(points, [1.0, 2.0, 4.0])
    assert encoded.shape == (1, 18)
    for axis in range(3):
        block = encoded[0, 6 * axis : 6 * axis + 6]
        angles = points[0, axis] * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        torch.testing.assert_close(block, torch.cat([angles.sin(), angles.cos()]))


def test_multiplier_scales_points() -> None:
    points = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        encode_positions(points, multiplier=2.0), encode_positions(2.0 * points)
    )


def test_time_embedding_has_unit_pairs_and_cosine_first() -> None:
    embedded = time_projection(32)(torch.tensor([0, 17, 999]))
    assert torch.equal(embedded[0], torch.cat([torch.ones(16), torch.zeros(16)]))
    cos, sin = embedded.chunk(2, dim=-1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, 16))
