"""Triton kernels of `fused_pointwise`, `float8_convolution` and `float8_linear`.

Convolutions are implicit matrix products of boxes of pixels: the tensor memory accelerator (from
Hopper on) fetches a box shifted by each of the nine taps and fills what lies outside of the picture
with zeros, so padding needs no code. The others are bound by memory and pass over it once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cap4d_core.diffusion.float8_linear import LARGEST, SMALLEST_SCALE, TYPE
from cap4d_core.diffusion.fused_pointwise import TILE, num_parts, power_of_two, tile_of

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
def _gelu(gate):
    # erf by Abramowitz and Stegun, 7.1.26, off by at most 1.5e-7: a fourth of the exact one's work.
    size = tl.abs(gate)
    t = 1.0 / (1.0 + 0.23164189 * size)
    tail = t * (0.5307027145 * t - 0.7265760135)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + tail)))
    tail *= tl.exp2(gate * gate * -0.7213475204)
    return tl.maximum(gate, 0.0) - size * tail


@triton.jit
def _geglu(product, place, k, num_out):
    inside = k < num_out
    value = tl.load(product + place + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(product + place + num_out + k, mask=inside, other=0.0).to(tl.float32)
    return value * _gelu(gate)


@triton.jit
def _store(out, k, value, size, num_out):
    tl.store(out + k, (value * (1.0 / size)).to(out.dtype.element_ty), mask=k < num_out)


@triton.jit
def _gate(
    product, out, scale, num_out, largest, smallest, block: tl.constexpr, parts: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row * 2 * num_out
    out += row * num_out
    k = tl.arange(0, block)
    v0 = _geglu(product, place, k, num_out)
    most = tl.abs(v0)
    if parts == 5:
        v1 = _geglu(product, place, k + block, num_out)
        v2 = _geglu(product, place, k + 2 * block, num_out)
        v3 = _geglu(product, place, k + 3 * block, num_out)
        v4 = _geglu(product, place, k + 4 * block, num_out)
        most = tl.maximum(tl.maximum(most, tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3)))
        most = tl.maximum(most, tl.abs(v4))
    size = tl.maximum(tl.max(most, axis=0) / largest, smallest)
    _store(out, k, v0, size, num_out)
    if parts == 5:
        _store(out, k + block, v1, size, num_out)
        _store(out, k + 2 * block, v2, size, num_out)
        _store(out, k + 3 * block, v3, size, num_out)
        _store(out, k + 4 * block, v4, size, num_out)
    tl.store(scale + row, size)


def gate(product: Tensor) -> tuple[Tensor, Tensor]:
    """As `float8_linear.gate`."""
    rows, width = product.shape
    num_out = width // 2
    out = torch.empty((rows, num_out), dtype=TYPE, device=product.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=product.device)
    # Rows of the network are five times a power of two; one block would be empty for a third.
    parts = 5 if num_out % 5 == 0 and num_out // 5 & (num_out // 5 - 1) == 0 else 1
    block = triton.next_power_of_2(num_out // parts)
    _gate[(rows,)](
        product, out, scale, num_out, LARGEST, SMALLEST_SCALE, block, parts,
        num_warps=max(1, min(block // 256, 16)),
    )  # fmt: skip
    return out, scale


@triton.jit
def _geglu_tile(
    product, out, num_rows, num_out, rows: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    k = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < num_rows)[:, None] & (k < num_out)[None, :]
    place = row[:, None] * 2 * num_out + k[None, :]
    value = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(product + place + num_out, mask=inside, other=0.0).to(tl.float32)
    result = value * _gelu(gate)
    tl.store(
        out + row[:, None] * num_out + k[None, :], result.to(out.dtype.element_ty), mask=inside
    )


def geglu(product: Tensor) -> Tensor:
    """As `fused_pointwise.geglu`."""
    num_rows, width = product.shape
    num_out = width // 2
    out = torch.empty((num_rows, num_out), dtype=product.dtype, device=product.device)
    block = power_of_two(num_out, 256)
    rows = TILE // block
    _geglu_tile[(triton.cdiv(num_rows, rows), triton.cdiv(num_out, block))](
        product, out, num_rows, num_out, rows, block, num_warps=4
    )
    return out


@triton.jit
def _partial_moments(
    pixels, sums, num_pixels, num_channels, part_stride, half,
    tiles: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    base = pixels + image * num_pixels * num_channels
    first = tl.load(base + c).to(tl.float32)
    total = tl.zeros((rows, columns), tl.float32)
    square = tl.zeros((rows, columns), tl.float32)
    r = part * tiles * rows + tl.arange(0, rows)
    for _ in range(tiles):
        x = tl.load(base + r[:, None] * num_channels + c[None, :]).to(tl.float32) - first[None, :]
        total += x
        square += x * x
        r += rows
    place = sums + image * part_stride + part * num_channels + c
    tl.store(place, tl.sum(total, axis=0))
    tl.store(place + half, tl.sum(square, axis=0))


def partial_moments(pixels: Tensor) -> Tensor:
    """As `fused_pointwise.partial_moments`."""
    batch, height, width, channels = pixels.shape
    rows, columns, tiles = tile_of(height * width, channels)
    parts = num_parts(pixels)
    shape = (2, batch, parts, channels)
    sums = torch.empty(shape, dtype=torch.float32, device=pixels.device)
    _partial_moments[(batch, parts, channels // columns)](
        pixels, sums, height * width, channels, parts * channels, batch * parts * channels, tiles,
        rows, columns, num_warps=4,
    )  # fmt: skip
    return sums


@triton.jit
def _normalise(
    pixels, factor, offset, out, num_pixels, num_channels, output_scale, largest,
    silu: tl.constexpr, saturates: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    image = first // num_pixels
    place = (first + tl.arange(0, rows))[:, None] * num_channels + c[None, :]
    value = tl.load(pixels + place).to(tl.float32)
    value = value * tl.load(factor + image * num_channels + c)[None, :]
    value += tl.load(offset + image * num_channels + c)[None, :]
    if silu:
        value = value / (1.0 + tl.exp(-value))
    if saturates:
        value = tl.minimum(tl.maximum(value * output_scale, -largest), largest)
    tl.store(out + place, value.to(out.dtype.element_ty))


def normalise(pixels: Tensor, factor: Tensor, offset: Tensor, silu: bool) -> Tensor:
    """As `fused_pointwise.normalise`."""
    return _normalised(pixels, factor, offset, torch.empty_like(pixels), silu, False)


def activate(pixels: Tensor, factor: Tensor, offset: Tensor, input_scale: float) -> Tensor:
    """As `float8_convolution.activate`."""
    out = torch.empty(pixels.shape, dtype=TYPE, device=pixels.device)
    return _normalised(pixels, factor, offset, out, True, True, input_scale)


def _normalised(
    pixels: Tensor,
    factor: Tensor,
    offset: Tensor,
    out: Tensor,
    silu: bool,
    saturates: bool,
    output_scale: float = 1.0,
) -> Tensor:
    batch, height, width, channels = pixels.shape
    columns = power_of_two(channels, 256)
    rows = power_of_two(height * width, 4096 // columns)
    _normalise[(batch * height * width // rows, channels // columns)](
        pixels, factor, offset, out, height * width, channels, output_scale, LARGEST,
        silu, saturates, rows, columns, num_warps=4,
    )  # fmt: skip
    return out


def _box(batch: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile: powers of two that divide the sizes."""
    w = power_of_two(width, 64 if pixels >= 256 else 32)
    h = power_of_two(height, pixels // w)
    return power_of_two(batch, pixels // (w * h)), h, w
