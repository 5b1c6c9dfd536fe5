"""Triton kernel of `float8_convolution`: implicit matrix products of boxes of pixels.

The tensor memory accelerator (from Hopper on) fetches a box of pixels shifted by each of the nine
taps and fills what lies outside of the picture with zeros, so padding needs no code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Channels of a tile, channels summed at a time, warps.
_CHANNELS, _SUMMED, _WARPS = 128, 128, 8
# Pixels of a tile, if that makes enough tiles to keep all processors busy.
_PIXELS = ((256, 512), (128, 0))


@triton.jit
def _convolve(
    pixels, weight, scale, bias, out, height, width, num_in: tl.constexpr, num_out,
    box_b: tl.constexpr, box_h: tl.constexpr, box_w: tl.constexpr, box_n: tl.constexpr,
    box_k: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    tiles_w, tiles_h = width // box_w, height // box_h
    tile = tl.program_id(1)
    w0 = (tile % tiles_w) * box_w
    h0 = ((tile // tiles_w) % tiles_h) * box_h
    b0 = (tile // (tiles_w * tiles_h)) * box_b
    n0 = tl.program_id(0) * box_n
    box_m: tl.constexpr = box_b * box_h * box_w
    parts: tl.constexpr = (num_in + box_k - 1) // box_k
    total = tl.zeros((box_m, box_n), tl.float32)
    for i in tl.range(0, 9 * parts, num_stages=stages):
        tap, k0 = i // parts, (i % parts) * box_k
        a = pixels.load([b0, h0 + tap // 3 - 1, w0 + tap % 3 - 1, k0]).reshape(box_m, box_k)
        b = weight.load([tap, n0, k0]).reshape(box_n, box_k)
        total = tl.dot(a, b.T, total)
    n, m = n0 + tl.arange(0, box_n), tl.arange(0, box_m)
    inside = n < num_out
    factor = tl.load(scale + n, mask=inside, other=0.0)
    offset = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    total = total * factor[None, :] + offset[None, :]
    row = (b0 + m // (box_h * box_w)) * height + h0 + (m // box_w) % box_h
    row = row * width + w0 + m % box_w
    place = out + row[:, None].to(tl.int64) * num_out + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[None, :])


def launch(pixels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As `float8_convolution.convolve`."""
    batch, height, width, num_in = pixels.shape
    num_out = weight.shape[1]
    out = torch.empty((batch, height, width, num_out), dtype=bias.dtype, device=pixels.device)
    columns = triton.cdiv(num_out, _CHANNELS)
    total = batch * height * width
    pixels_of_tile = next(n for n, enough in _PIXELS if total * columns >= n * enough)
    box = _box(batch, height, width, pixels_of_tile)
    # At least what one instruction sums; what lies beyond the channels is zero.
    summed = max(32, min(_SUMMED, triton.next_power_of_2(num_in)))
    if num_in % summed:
        summed = 64  # less of the last part is empty
    grid: Any = (
        columns,
        (batch // box[0]) * (height // box[1]) * (width // box[2]),
    )
    _convolve[grid](
        TensorDescriptor.from_tensor(pixels, [*box, summed]),
        TensorDescriptor.from_tensor(weight, [1, _CHANNELS, summed]),
        scale, bias, out, height, width, num_in, num_out, *box, _CHANNELS, summed,
        3 if summed == _SUMMED else 4,
        num_warps=_WARPS,
    )  # fmt: skip
    return out


def _box(batch: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile: powers of two that divide the sizes."""
    w = _power_of_two(width, 64 if pixels >= 256 else 32)
    h = _power_of_two(height, pixels // w)
    return _power_of_two(batch, pixels // (w * h)), h, w


def _power_of_two(number: int, limit: int) -> int:
    """The largest that divides a number, at most `limit`."""
    return min(number & -number, limit)
