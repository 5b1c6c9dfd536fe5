"""Compiled kernels that blend depth-sorted splats front to back, with gradients.

Same compositing as gsplat 1.5.3 (`RasterizeToPixels3DGS*.cu`): alpha = min(0.999, opacity
exp(-sigma)), contributions below 1/255 are skipped, a pixel is finished before its transmittance
would fall to 1e-4. Two things differ in form only. A splat is evaluated inside its exact bounding
box instead of whole tiles: outside the box alpha is below 1/255 by construction. And loops run
splat by splat over rows of eight pixels instead of pixel by pixel over splats, because LLVM turns
the inner loop into SIMD instructions; therefore it holds no branch and no array but `pixels`.

Gradients go first to one slot per (splat, tile) pair and are then added per splat in slot order:
no atomics, and results do not depend on the number of threads.
"""

# mypy: disallow-untyped-defs=False
# (compiled functions: numba infers the argument types, annotations would be ignored)

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from cap4d_core.avatar.renderer_cpu_tiles import RECORD, TILE

_AREA = TILE * TILE
_LANES = 8
# Channels of the per-tile pixel buffer; the first is the transmittance, negative once a pixel is
# finished. Unsigned, because numba's support for negative indices keeps LLVM from vectorising.
_LAST, _RED, _GREEN, _BLUE, _DEPTH, _BEHIND = (np.uint64(_AREA * c) for c in range(1, 7))
_CHANNELS = 7

_KERNEL: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},  # not nnan: NaN must cull a splat
}


def _exp_negative(x):
    """exp(-x) for x >= 0."""
    return math.exp(-x)


@overload(_exp_negative)  # what compiled code calls instead
def _compile_exp_negative(x):
    if x != types.float32:
        return lambda x: math.exp(-x)

    def single_precision(x):
        # 2^n times the Taylor polynomial of 2^f, |f| <= 1/2: 1e-6 relative, and SIMD-able,
        # which a call to the C library is not.
        real = np.float32
        t = min(x, real(80.0)) * real(-1.4426950408889634)
        n = np.int32(t - real(0.5))
        f = t - real(n)
        p = real(1.5403530393381606e-4)
        p = p * f + real(1.3333558146428443e-3)
        p = p * f + real(9.618129107628477e-3)
        p = p * f + real(5.5504108664821576e-2)
        p = p * f + real(2.402265069591007e-1)
        p = p * f + real(6.931471805599453e-1)
        p = p * f + real(1.0)
        return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)

    return single_precision


@njit(**_KERNEL)
def _blend_tile(ranks, records, boxes, left, top, live, pixels):
    """Composite the splats `ranks` into the pixel buffer of the tile at (left, top)."""
    real = pixels.dtype.type
    zero, half, one = real(0.0), real(0.5), real(1.0)
    alpha_min, alpha_max, stop_at = real(1.0 / 255.0), real(0.999), real(1e-4)
    finished = zero
    for e in range(len(ranks)):
        rank = ranks[e]
        u, v, xx, xy, yy = (
            records[rank, 0], records[rank, 1], records[rank, 2], records[rank, 3], records[rank, 4]
        )  # fmt: skip
        opacity, depth = records[rank, 5], records[rank, 9]
        red, green, blue = records[rank, 6], records[rank, 7], records[rank, 8]
        x0 = (max(boxes[rank, 0] - left, 0) // _LANES) * _LANES
        span = -(-(min(boxes[rank, 1] - left, TILE) - x0) // _LANES) * _LANES
        y0, y1 = max(boxes[rank, 2] - top, 0), min(boxes[rank, 3] - top, TILE)
        index = real(e + 1)
        for row in range(y0, y1):
            dy = real(top + row) + half - v
            s0, s1, s2 = half * yy * dy * dy, xy * dy, half * xx
            base = np.uint64(row * TILE + x0)
            start_x = real(left + x0) + half - u
            for lane in range(span):
                p = base + np.uint64(lane)
                dx = start_x + real(np.int32(lane))
                sigma = (s2 * dx + s1) * dx + s0
                alpha = min(opacity * _exp_negative(sigma), alpha_max)
                before = pixels[p]
                alpha = alpha if alpha >= alpha_min else zero
                alpha = alpha if sigma >= zero else zero
                alpha = alpha if before > zero else zero
                full = before * (one - alpha) <= stop_at
                stop = one if full else zero
                stop = stop if alpha > zero else zero
                alpha = zero if full else alpha
                weight = alpha * before
                last = pixels[_LAST + p]
                pixels[_LAST + p] = index if alpha > zero else last
                pixels[_RED + p] += weight * red
                pixels[_GREEN + p] += weight * green
                pixels[_BLUE + p] += weight * blue
                pixels[_DEPTH + p] += weight * depth
                pixels[p] = (before - weight) * (one - stop - stop)
                finished += stop
        if finished >= live:
            break


@njit(**_KERNEL)
def blend(
    first, last, stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, background,
    image, depth, transmittance, last_index,
):  # fmt: skip
    """Composite tiles into image (B, H, W, 3), depth, transmittance and last_index (B, H, W).

    depth is the sum of weight times depth; last_index counts a tile's list entries up to the last
    one that a pixel used. `first`..`last` number the tiles of all views in a scattered order, in
    steps of `stride` (coprime to their number), so that every thread gets its share of the crowded
    ones.
    """
    height, width = image.shape[1], image.shape[2]
    total = image.shape[0] * tiles_x * tiles_y
    pixels = np.empty(_CHANNELS * _AREA, image.dtype)
    for task in range(first, last):
        b, tile = divmod((task * stride) % total, tiles_x * tiles_y)
        top, left = (tile // tiles_x) * TILE, (tile % tiles_x) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        for i in range(_CHANNELS * _AREA):
            pixels[i] = 0
        for row in range(TILE):
            for column in range(TILE):  # pixels beyond the image border count as finished
                pixels[row * TILE + column] = 1 if row < rows and column < columns else -1
        ranks = tile_lists[tile_starts[b, tile] : tile_starts[b, tile + 1]]
        _blend_tile(ranks, records[b], boxes[b], left, top, rows * columns, pixels)
        for row in range(rows):
            for column in range(columns):
                p = np.uint64(row * TILE + column)
                y, x = top + row, left + column
                remaining = abs(pixels[p])
                transmittance[b, y, x] = remaining
                last_index[b, y, x] = int(pixels[_LAST + p])
                image[b, y, x, 0] = pixels[_RED + p] + remaining * background[b, 0]
                image[b, y, x, 1] = pixels[_GREEN + p] + remaining * background[b, 1]
                image[b, y, x, 2] = pixels[_BLUE + p] + remaining * background[b, 2]
                depth[b, y, x] = pixels[_DEPTH + p]


@njit(**_KERNEL)
def _blend_splat_backward(rank, records, boxes, left, top, index, pixels, slot, slot_gradients):
    """Gradients of one splat in one tile to its record, going back to front."""
    real = pixels.dtype.type
    zero, half, one = real(0.0), real(0.5), real(1.0)
    alpha_min, alpha_max = real(1.0 / 255.0), real(0.999)
    u, v, opacity, depth = records[rank, 0], records[rank, 1], records[rank, 5], records[rank, 9]
    xx, xy, yy = records[rank, 2], records[rank, 3], records[rank, 4]
    red, green, blue = records[rank, 6], records[rank, 7], records[rank, 8]
    x0 = (max(boxes[rank, 0] - left, 0) // _LANES) * _LANES
    span = -(-(min(boxes[rank, 1] - left, TILE) - x0) // _LANES) * _LANES
    y0, y1 = max(boxes[rank, 2] - top, 0), min(boxes[rank, 3] - top, TILE)
    g_red = g_green = g_blue = g_depth = zero
    m0 = mx = my = mxx = mxy = myy = zero  # moments of d(loss)/d(sigma)
    for row in range(y0, y1):
        dy = real(top + row) + half - v
        s0, s1, s2 = half * yy * dy * dy, xy * dy, half * xx
        base = np.uint64(row * TILE + x0)
        start_x = real(left + x0) + half - u
        r0 = r1 = r2 = zero
        for lane in range(span):
            p = base + np.uint64(lane)
            dx = start_x + real(np.int32(lane))
            sigma = (s2 * dx + s1) * dx + s0
            raw = opacity * _exp_negative(sigma)
            alpha = min(raw, alpha_max)
            alpha = alpha if alpha >= alpha_min else zero
            alpha = alpha if sigma >= zero else zero
            alpha = alpha if pixels[_LAST + p] >= index else zero
            inverse = one / (one - alpha)
            before = pixels[p] * inverse
            weight = alpha * before
            v_red, v_green = pixels[_RED + p], pixels[_GREEN + p]
            v_blue, v_depth = pixels[_BLUE + p], pixels[_DEPTH + p]
            value = red * v_red + green * v_green + blue * v_blue + depth * v_depth
            behind = pixels[_BEHIND + p]
            v_sigma = raw * (behind * inverse - before * value)
            v_sigma = v_sigma if alpha > zero else zero
            v_sigma = v_sigma if raw <= alpha_max else zero
            pixels[p] = before
            pixels[_BEHIND + p] = behind + weight * value
            g_red += weight * v_red
            g_green += weight * v_green
            g_blue += weight * v_blue
            g_depth += weight * v_depth
            r0 += v_sigma
            r1 += v_sigma * dx
            r2 += v_sigma * dx * dx
        m0 += r0
        mx += r1
        mxx += r2
        my += dy * r0
        mxy += dy * r1
        myy += dy * dy * r0
    slot_gradients[slot, 0] = -(xx * mx + xy * my)
    slot_gradients[slot, 1] = -(xy * mx + yy * my)
    slot_gradients[slot, 2] = half * mxx
    slot_gradients[slot, 3] = mxy
    slot_gradients[slot, 4] = half * myy
    slot_gradients[slot, 5] = -m0 / opacity
    slot_gradients[slot, 6] = g_red
    slot_gradients[slot, 7] = g_green
    slot_gradients[slot, 8] = g_blue
    slot_gradients[slot, 9] = g_depth


@njit(**_KERNEL)
def blend_backward(
    first, last, stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, slots,
    slot_starts, background, transmittance, last_index, v_image, v_alpha, v_depth, slot_gradients,
):  # fmt: skip
    """Fill slot_gradients (P, RECORD), zero on entry; v_* are gradients to image, alpha, depth.

    `first`, `last` and `stride` as in `blend`.
    """
    height, width = transmittance.shape[1], transmittance.shape[2]
    total = transmittance.shape[0] * tiles_x * tiles_y
    real = transmittance.dtype.type
    pixels = np.empty(_CHANNELS * _AREA, transmittance.dtype)
    for task in range(first, last):
        b, tile = divmod((task * stride) % total, tiles_x * tiles_y)
        tile_y, tile_x = divmod(tile, tiles_x)
        top, left = tile_y * TILE, tile_x * TILE
        for i in range(_CHANNELS * _AREA):
            pixels[i] = 0
        last_used = 0
        for row in range(min(TILE, height - top)):
            for column in range(min(TILE, width - left)):
                p = np.uint64(row * TILE + column)
                y, x = top + row, left + column
                remaining = transmittance[b, y, x]
                red, green, blue = v_image[b, y, x, 0], v_image[b, y, x, 1], v_image[b, y, x, 2]
                last_used = max(last_used, last_index[b, y, x])
                pixels[p] = remaining
                pixels[_LAST + p] = last_index[b, y, x]
                pixels[_RED + p], pixels[_GREEN + p], pixels[_BLUE + p] = red, green, blue
                pixels[_DEPTH + p] = v_depth[b, y, x]
                # What lies behind the last splat: background colour, and 1 - alpha.
                pixels[_BEHIND + p] = remaining * (
                    red * background[b, 0]
                    + green * background[b, 1]
                    + blue * background[b, 2]
                    - v_alpha[b, y, x]
                )
        start = tile_starts[b, tile]
        view_records, view_boxes = records[b], boxes[b]
        for e in range(last_used - 1, -1, -1):
            rank = tile_lists[start + e]
            first_x, first_y = boxes[b, rank, 0] // TILE, boxes[b, rank, 2] // TILE
            across = (boxes[b, rank, 1] - 1) // TILE + 1 - first_x
            slot = slots[b, rank] + (tile_y - first_y) * across + (tile_x - first_x)
            _blend_splat_backward(
                rank, view_records, view_boxes, left, top, real(e + 1), pixels,
                slot_starts[b] + slot, slot_gradients,
            )  # fmt: skip


@njit(**_KERNEL)
def sum_slots(
    start, stop, counts, order, slots, slot_starts, slot_gradients,
    v_means2d, v_conics, v_opacities, v_colors, v_depths,
):  # fmt: skip
    """Add the slots of the splats with depth ranks start..stop of every view, in slot order.

    Outputs are (B, N, ...) and zero on entry.
    """
    total = np.empty(RECORD, slot_gradients.dtype)
    for b in range(len(counts)):
        for rank in range(start, min(stop, counts[b])):
            for c in range(RECORD):
                total[c] = 0
            for slot in range(slots[b, rank], slots[b, rank + 1]):
                for c in range(RECORD):
                    total[c] += slot_gradients[slot_starts[b] + slot, c]
            n = order[b, rank]
            v_means2d[b, n, 0], v_means2d[b, n, 1] = total[0], total[1]
            v_opacities[b, n] = total[5]
            v_depths[b, n] = total[9]
            for c in range(3):
                v_conics[b, n, c] = total[2 + c]
                v_colors[b, n, c] = total[6 + c]
