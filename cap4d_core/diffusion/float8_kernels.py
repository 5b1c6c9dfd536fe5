"""Triton kernels of `float8_convolution` and `float8_linear`.

Convolutions are implicit matrix products of boxes of pixels: the tensor memory accelerator (from
Hopper on) fetches a box shifted by each of the nine taps and fills what lies outside of the picture
with zeros, so padding needs no code. The other two make 8-bit numbers in one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cap4d_core.diffusion.float8_linear import LARGEST, SMALLEST_SCALE, TYPE

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


def convolve(pixels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
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


@triton.jit
def _gate(product, bias, out, scale, num_out, largest, smallest, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, block)
    inside = k < num_out
    wide = tl.load(product + row * 2 * num_out + k, mask=inside, other=0.0).to(tl.float32)
    wide += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(product + row * 2 * num_out + num_out + k, mask=inside, other=0.0)
    gate = gate.to(tl.float32) + tl.load(bias + num_out + k, mask=inside, other=0.0).to(tl.float32)
    value = wide * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    size = tl.maximum(tl.max(tl.abs(value), axis=0) / largest, smallest)
    tl.store(out + row * num_out + k, (value * (1.0 / size)).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, size)


def gate(product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `float8_linear.gate`."""
    rows, width = product.shape
    num_out = width // 2
    out = torch.empty((rows, num_out), dtype=TYPE, device=product.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=product.device)
    block = triton.next_power_of_2(num_out)
    _gate[(rows,)](
        product, bias, out, scale, num_out, LARGEST, SMALLEST_SCALE, block,
        num_warps=max(1, min(block // 512, 16)),
    )  # fmt: skip
    return out, scale


@triton.jit
def _activate(
    pixels, factor, offset, out, num_pixels, num_channels, input_scale, largest,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    image = first // num_pixels
    place = (first + tl.arange(0, rows))[:, None] * num_channels + c[None, :]
    value = tl.load(pixels + place).to(tl.float32)
    value = value * tl.load(factor + image * num_channels + c)[None, :]
    value += tl.load(offset + image * num_channels + c)[None, :]
    value = value / (1.0 + tl.exp(-value)) * input_scale
    value = tl.minimum(tl.maximum(value, -largest), largest)
    tl.store(out + place, value.to(out.dtype.element_ty))


def activate(pixels: Tensor, factor: Tensor, offset: Tensor, input_scale: float) -> Tensor:
    """As `float8_convolution.activate`."""
    batch, height, width, channels = pixels.shape
    out = torch.empty(pixels.shape, dtype=TYPE, device=pixels.device)
    columns = _power_of_two(channels, 256)
    rows = _power_of_two(height * width, 4096 // columns)
    _activate[(batch * height * width // rows, channels // columns)](
        pixels, factor, offset, out, height * width, channels, input_scale, LARGEST, rows, columns,
        num_warps=4,
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
