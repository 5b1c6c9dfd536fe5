"""Sinusoidal embeddings of timesteps and of positions.

Conventions: both use plain radians (no factor pi). Time: cosines first, then sines. Position: per
coordinate all sines, then all cosines, with coordinates one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cap4d_core.diffusion.diffusers_parts import Timesteps

POSITION_FREQUENCIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def time_projection(num_channels: int) -> Timesteps:
    """Module that maps (n,) timesteps to (n, num_channels): [cos(t f_k), sin(t f_k)].

    f_k = 10000^(-k / (num_channels // 2)), as in Ho et al. 2020 with cosines first.
    """
    return Timesteps(num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)


def encode_positions(
    positions: Tensor,
    frequencies: Tensor | Sequence[float] = POSITION_FREQUENCIES,
    multiplier: float = 1.0,
) -> Tensor:
    """Positional encoding of the last axis (Mildenhall et al. 2020, without pi).

    Args:
        positions: (..., D) points.
        frequencies: (F,) angular frequencies.
        multiplier: factor on the points before encoding.

    Returns:
        (..., 2 * D * F): for each coordinate x its F sines sin(x f), then its F cosines; 42
        channels for a point in space and the 7 default frequencies.
    """
    f = torch.as_tensor(frequencies, dtype=positions.dtype, device=positions.device)
    angles = (positions * multiplier).unsqueeze(-1) * f  # (..., D, F)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
