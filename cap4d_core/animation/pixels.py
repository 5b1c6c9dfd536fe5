"""Rendered values to the integers that files hold."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(values: Tensor) -> Tensor:
    """Values in 0..1 to uint8, clipped and rounded half up."""
    return (values * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def over_background(premultiplied: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """Composites (..., 3) colours rendered on black, with (..., 1) coverage, over a colour (3,)."""
    return premultiplied + (1 - alpha) * background


def straight_rgba(premultiplied: Tensor, alpha: Tensor) -> Tensor:
    """(..., 4) uint8 with colour independent of alpha, from colours rendered on black.

    Compositing programs multiply by alpha themselves; a colour that already holds a background
    would be blended twice. Where nothing covers the pixel the colour is black.
    """
    colour = torch.where(alpha > 1 / 1024, premultiplied / alpha.clamp(min=1 / 1024), 0.0)
    return torch.cat([to_bytes(colour), to_bytes(alpha)], dim=-1)


def depth_to_millimetres(depth: Tensor, parity: bool = False) -> Tensor:
    """Metres to whole millimetres, (...) int32 in 0..65535, rounded and clipped.

    Args:
        depth: metres.
        parity: published arithmetic: cut off instead of rounded.
    """
    millimetres = depth * 1000
    whole = millimetres.trunc() if parity else millimetres.round()
    return whole.clamp(0, 65535).to(torch.int32)
