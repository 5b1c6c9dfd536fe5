"""Group norm and gated units in as few passes over memory as they need.

What a compiler makes of them reads channels-last features in pieces of a group, ten channels, and
computes what it fuses several times. Here statistics take one pass and norm, SiLU and gates another
one each, computed in float32 and rounded once. On CUDA by Triton (`triton_kernels`); elsewhere the
same by torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels that are read together; images whose rows of pixels are not powers of two work, too.
_MULTIPLE = 16
# Pixels times channels of a tile, and tiles summed by one program.
TILE, TILES_SUMMED = 2048, 8


def fits(norm: nn.GroupNorm) -> bool:
    """Whether a norm's channels can be read so."""
    return norm.affine and norm.num_channels % _MULTIPLE == 0


def group_norm(features: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
    """`norm`, then SiLU if asked for, of (B, C, H, W) channels last; the same type and layout."""
    factor, offset = factors(features, norm)
    return normalise(_pixels(features), factor, offset, silu).permute(0, 3, 1, 2)


def factors(features: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """(B, C) float32 factors and offsets that a group norm of (B, C, H, W) comes to.

    Variances of channels are those of what is left after subtracting the first pixel, so that no
    digits cancel where a mean is large (Chan, Golub, LeVeque, 1983); groups join them exactly.
    """
    pixels = _pixels(features)
    count = pixels.shape[1] * pixels.shape[2]
    shifted, squares = partial_moments(pixels).sum(2) / count
    mean = (pixels[:, 0, 0].float() + shifted).unflatten(1, (norm.num_groups, -1))
    variance = (squares - shifted * shifted).unflatten(1, (norm.num_groups, -1))
    of_group = mean.mean(2, keepdim=True)
    whole = (variance + (mean - of_group).square()).mean(2, keepdim=True).clamp(min=0)
    inverse = (whole + norm.eps).rsqrt()
    weight, bias = (t.float().unflatten(0, (norm.num_groups, -1)) for t in (norm.weight, norm.bias))
    factor = inverse * weight
    return factor.flatten(1), (bias - of_group * factor).flatten(1)


def _pixels(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).contiguous()


def tile_of(num_pixels: int, channels: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and tiles that a program sums: powers of two."""
    columns = power_of_two(channels, 256)
    rows = power_of_two(num_pixels, TILE // columns)
    return rows, columns, power_of_two(num_pixels // rows, TILES_SUMMED)


def power_of_two(number: int, limit: int) -> int:
    """The largest that divides a number, at most `limit`."""
    return min(number & -number, limit)


@torch.library.custom_op("cap4d_core::partial_moments", mutates_args=())
def partial_moments(pixels: Tensor) -> Tensor:
    """(2, B, P, C) float32 sums and sums of squares of P parts of (B, H, W, C).

    Of the differences from each image's first pixel.
    """
    if pixels.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.partial_moments(pixels)
    parts = num_parts(pixels)
    shifted = (pixels.float() - pixels[:, :1, :1].float()).flatten(1, 2).unflatten(1, (parts, -1))
    return torch.stack([shifted.sum(2), shifted.square().sum(2)])


@partial_moments.register_fake
def _(pixels: Tensor) -> Tensor:
    batch, _, _, channels = pixels.shape
    shape = (2, batch, num_parts(pixels), channels)
    return pixels.new_empty(shape, dtype=torch.float32)


def num_parts(pixels: Tensor) -> int:
    """Parts of an image of (B, H, W, C) that are summed by themselves."""
    _, height, width, channels = pixels.shape
    rows, _, tiles = tile_of(height * width, channels)
    return height * width // (rows * tiles)


@torch.library.custom_op("cap4d_core::normalise", mutates_args=())
def normalise(pixels: Tensor, factor: Tensor, offset: Tensor, silu: bool) -> Tensor:
    """(B, H, W, C) times `factor` plus `offset`, both (B, C) float32; then SiLU if asked for."""
    if pixels.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.normalise(pixels, factor, offset, silu)
    values = pixels.float() * factor[:, None, None] + offset[:, None, None]
    return (F.silu(values) if silu else values).to(pixels.dtype)


@normalise.register_fake
def _(pixels: Tensor, factor: Tensor, offset: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(pixels)


@torch.library.custom_op("cap4d_core::geglu", mutates_args=())
def geglu(product: Tensor) -> Tensor:
    """GEGLU (Shazeer, GLU Variants Improve Transformer, 2020) of (M, 2 K), values before gates."""
    if product.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.geglu(product)
    values, gates = product.float().chunk(2, dim=-1)
    return (values * F.gelu(gates)).to(product.dtype)


@geglu.register_fake
def _(product: Tensor) -> Tensor:
    return product.new_empty((product.shape[0], product.shape[1] // 2))
