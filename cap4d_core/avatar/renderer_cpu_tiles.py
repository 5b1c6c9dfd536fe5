"""Compiled kernels that sort splats into tiles and blend them front to back, with gradients.

Same compositing as gsplat 1.5.3 (`RasterizeToPixels3DGS*.cu`): alpha = min(0.999, opacity
exp(-sigma)), contributions below 1/255 are skipped, a pixel is finished before its transmittance
would fall to 1e-4. Two things differ in form only. A splat is evaluated inside its exact bounding
box instead of whole tiles: outside of the box alpha is below 1/255 by construction. And loops run
splat by splat over rows of eight pixels instead of pixel by pixel over splats, because LLVM turns
the inner loop into SIMD instructions; therefore it holds no branch and no array but `pixels`.

Gradients go first to one slot per (splat, tile) pair and are then added per splat in slot order:
no atomics, and results do not depend on the number of threads.
"""

# mypy: disallow-untyped-defs=False
# (compiled functions: numba infers the argument types, annotations would be ignored)

import math

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

TILE = 16
RECORD = 10
"""Values per sorted splat: u, v, conic xx, xy, yy, opacity, red, green, blue, depth."""

_AREA = TILE * TILE
_LANES = 8
# Channels of the per-tile pixel buffer; the first is the transmittance, negative once a pixel is
# finished. Unsigned, because numba's support for negative indices keeps LLVM from vectorising.
_LAST, _RED, _GREEN, _BLUE, _DEPTH, _BEHIND = (np.uint64(_AREA * c) for c in range(1, 7))
_CHANNELS = 7
_TILES_PER_TASK = 4

_MATH = {"contract", "nsz", "arcp", "reassoc"}
_INNER = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": _MATH}
_OUTER = {"cache": True, "nogil": True, "error_model": "numpy", "parallel": True}


def _exp_negative(x):
    """exp(-x) for x >= 0."""
    return math.exp(-x)


@overload(_exp_negative)
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


@njit(**_INNER)
def _sort_by_bits(keys, values, count):
    """Stable radix sort of values[:count] by keys[:count] (uint32), three passes of 11 bits."""
    other_keys, other_values = np.empty_like(keys), np.empty_like(values)
    starts = np.empty(2049, np.int64)
    for shift in (0, 11, 22):
        starts[:] = 0
        for i in range(count):
            starts[((keys[i] >> np.uint32(shift)) & np.uint32(2047)) + 1] += 1
        for i in range(2048):
            starts[i + 1] += starts[i]
        for i in range(count):
            digit = (keys[i] >> np.uint32(shift)) & np.uint32(2047)
            other_keys[starts[digit]] = keys[i]
            other_values[starts[digit]] = values[i]
            starts[digit] += 1
        keys, other_keys = other_keys, keys
        values, other_values = other_values, values
    return values


@njit(**_INNER)
def _sort_view(
    means2d, conics, colors, depths, opacities, radii, width, height,
    order, records, boxes, slots, tile_counts,
):  # fmt: skip
    """Pack the visible splats of one view in depth order; returns their number.

    boxes: first and last + 1 pixel column and row. slots: number of (splat, tile) pairs of all
    splats before this one; slots[count] is the total.
    """
    count = 0
    ids = np.empty(len(depths), np.int32)
    keys = np.empty(len(depths), np.float32)
    for n in range(len(depths)):
        if radii[n, 0] > 0 and radii[n, 1] > 0:
            ids[count] = n
            # Positive floats order like their bits. float32 as in gsplat; ties keep splat order.
            keys[count] = depths[n]
            count += 1
    ids = _sort_by_bits(keys.view(np.uint32), ids, count)
    tiles_x = (width + TILE - 1) // TILE
    kept = 0
    slots[0] = 0
    for rank in range(count):
        n = ids[rank]
        u, v = float(means2d[n, 0]), float(means2d[n, 1])
        xx, xy, yy = float(conics[n, 0]), float(conics[n, 1]), float(conics[n, 2])
        # Half sizes of the ellipse alpha = 1/255, with slack for rounding.
        power = 2.0 * math.log(255.0 * opacities[n]) / (xx * yy - xy * xy)
        half_x = min(math.sqrt(max(power * yy, 0.0)) * 1.0001 + 0.01, float(radii[n, 0]))
        half_y = min(math.sqrt(max(power * xx, 0.0)) * 1.0001 + 0.01, float(radii[n, 1]))
        x0 = int(max(0.0, math.ceil(u - half_x - 0.5)))
        y0 = int(max(0.0, math.ceil(v - half_y - 0.5)))
        x1 = int(min(float(width), math.floor(u + half_x - 0.5) + 1.0))
        y1 = int(min(float(height), math.floor(v + half_y - 0.5) + 1.0))
        if x1 <= x0 or y1 <= y0:  # between pixel centres or on the border: touches none
            continue
        order[kept] = n
        boxes[kept, 0], boxes[kept, 1], boxes[kept, 2], boxes[kept, 3] = x0, x1, y0, y1
        records[kept, 0], records[kept, 1] = u, v
        records[kept, 2], records[kept, 3], records[kept, 4] = xx, xy, yy
        records[kept, 5] = opacities[n]
        for c in range(3):
            records[kept, 6 + c] = colors[n, c]
        records[kept, 9] = depths[n]
        pairs = 0
        for ty in range(y0 // TILE, (y1 - 1) // TILE + 1):
            for tx in range(x0 // TILE, (x1 - 1) // TILE + 1):
                tile_counts[ty * tiles_x + tx] += 1
                pairs += 1
        kept += 1
        slots[kept] = slots[kept - 1] + pairs
    return kept


@njit(**_INNER)
def _list_tiles(count, boxes, tile_starts, tiles_x, tile_lists):
    """Write the splat ranks of every tile of one view, front to back."""
    cursor = tile_starts.copy()
    for rank in range(count):
        for ty in range(boxes[rank, 2] // TILE, (boxes[rank, 3] - 1) // TILE + 1):
            for tx in range(boxes[rank, 0] // TILE, (boxes[rank, 1] - 1) // TILE + 1):
                tile = ty * tiles_x + tx
                tile_lists[cursor[tile]] = rank
                cursor[tile] += 1


@njit(**_OUTER)
def sort_views(
    means2d, conics, colors, depths, opacities, radii, width, height,
    order, records, boxes, slots, counts, tile_counts,
):  # fmt: skip
    """Depth-sort every view. Outputs per view: see `_sort_view`; tile_counts is zero on entry."""
    for b in prange(means2d.shape[0]):
        counts[b] = _sort_view(
            means2d[b], conics[b], colors[b], depths[b], opacities[b], radii[b], width, height,
            order[b], records[b], boxes[b], slots[b], tile_counts[b],
        )  # fmt: skip


@njit(**_OUTER)
def list_tiles(counts, boxes, tile_starts, tiles_x, tile_lists):
    """Fill tile_lists (P,); tile_starts (B, tiles + 1) holds the offsets into it."""
    for b in prange(len(counts)):
        _list_tiles(counts[b], boxes[b], tile_starts[b], tiles_x, tile_lists)


@njit(**_INNER)
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


@njit(**_INNER)
def _blend_tiles(
    first, last, stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, background,
    image, depth, transmittance, last_index,
):  # fmt: skip
    height, width = image.shape[1], image.shape[2]
    total = image.shape[0] * tiles_x * tiles_y
    pixels = np.empty(_CHANNELS * _AREA, image.dtype)
    for task in range(first, last):
        b, tile = divmod((task * stride) % total, tiles_x * tiles_y)
        top, left = (tile // tiles_x) * TILE, (tile % tiles_x) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        pixels[:] = 0
        pixels[:_AREA] = -1  # pixels beyond the image border count as finished
        for row in range(rows):
            pixels[row * TILE : row * TILE + columns] = 1
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


@njit(**_OUTER)
def blend(
    stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, background,
    image, depth, transmittance, last_index,
):  # fmt: skip
    """Composite all tiles of all views into image (B, H, W, 3), depth, transmittance, last_index.

    depth is the sum of weight times depth; last_index counts a tile's list entries up to the last
    one that a pixel used. `stride` is coprime to the number of tiles: visiting them in a scattered
    order gives every thread its share of the crowded ones.
    """
    total = image.shape[0] * tiles_x * tiles_y
    for task in prange((total + _TILES_PER_TASK - 1) // _TILES_PER_TASK):
        _blend_tiles(
            task * _TILES_PER_TASK, min(total, (task + 1) * _TILES_PER_TASK), stride, tiles_x,
            tiles_y, tile_starts, tile_lists, records, boxes, background,
            image, depth, transmittance, last_index,
        )  # fmt: skip


@njit(**_INNER)
def _blend_splat_backward(record, box, left, top, index, pixels, out):
    """Gradients of one splat in one tile to its record, going back to front."""
    real = pixels.dtype.type
    zero, half, one = real(0.0), real(0.5), real(1.0)
    alpha_min, alpha_max = real(1.0 / 255.0), real(0.999)
    u, v, xx, xy, yy, opacity = record[0], record[1], record[2], record[3], record[4], record[5]
    red, green, blue, depth = record[6], record[7], record[8], record[9]
    x0 = (max(box[0] - left, 0) // _LANES) * _LANES
    span = -(-(min(box[1] - left, TILE) - x0) // _LANES) * _LANES
    y0, y1 = max(box[2] - top, 0), min(box[3] - top, TILE)
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
    out[0] = -(xx * mx + xy * my)
    out[1] = -(xy * mx + yy * my)
    out[2] = half * mxx
    out[3] = mxy
    out[4] = half * myy
    out[5] = -m0 / opacity
    out[6], out[7], out[8], out[9] = g_red, g_green, g_blue, g_depth


@njit(**_INNER)
def _blend_tiles_backward(
    first, last, stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, slots,
    slot_starts, background, transmittance, last_index, v_image, v_alpha, v_depth, slot_gradients,
):  # fmt: skip
    height, width = transmittance.shape[1], transmittance.shape[2]
    total = transmittance.shape[0] * tiles_x * tiles_y
    real = transmittance.dtype.type
    pixels = np.empty(_CHANNELS * _AREA, transmittance.dtype)
    for task in range(first, last):
        b, tile = divmod((task * stride) % total, tiles_x * tiles_y)
        tile_y, tile_x = divmod(tile, tiles_x)
        top, left = tile_y * TILE, tile_x * TILE
        pixels[:] = 0
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
        for e in range(last_used - 1, -1, -1):
            rank = tile_lists[start + e]
            box = boxes[b, rank]
            first_x, first_y = box[0] // TILE, box[2] // TILE
            across = (box[1] - 1) // TILE + 1 - first_x
            slot = slots[b, rank] + (tile_y - first_y) * across + (tile_x - first_x)
            _blend_splat_backward(
                records[b, rank], box, left, top, real(e + 1), pixels,
                slot_gradients[slot_starts[b] + slot],
            )  # fmt: skip


@njit(**_OUTER)
def blend_backward(
    stride, tiles_x, tiles_y, tile_starts, tile_lists, records, boxes, slots, slot_starts,
    background, transmittance, last_index, v_image, v_alpha, v_depth, slot_gradients,
):  # fmt: skip
    """Fill slot_gradients (P, RECORD), zero on entry; v_* are gradients to image, alpha, depth."""
    total = transmittance.shape[0] * tiles_x * tiles_y
    for task in prange((total + _TILES_PER_TASK - 1) // _TILES_PER_TASK):
        _blend_tiles_backward(
            task * _TILES_PER_TASK, min(total, (task + 1) * _TILES_PER_TASK), stride, tiles_x,
            tiles_y, tile_starts, tile_lists, records, boxes, slots, slot_starts, background,
            transmittance, last_index, v_image, v_alpha, v_depth, slot_gradients,
        )  # fmt: skip


@njit(**_INNER)
def _sum_slots(
    start, stop, b, order, slots, slot_start, slot_gradients,
    v_means2d, v_conics, v_opacities, v_colors, v_depths,
):  # fmt: skip
    total = np.empty(RECORD, slot_gradients.dtype)
    for rank in range(start, stop):
        total[:] = 0
        for slot in range(slot_start + slots[rank], slot_start + slots[rank + 1]):
            for c in range(RECORD):
                total[c] += slot_gradients[slot, c]
        n = order[rank]
        v_means2d[b, n, 0], v_means2d[b, n, 1] = total[0], total[1]
        v_opacities[b, n] = total[5]
        v_depths[b, n] = total[9]
        for c in range(3):
            v_conics[b, n, c] = total[2 + c]
            v_colors[b, n, c] = total[6 + c]


@njit(**_OUTER)
def sum_slots(
    counts, order, slots, slot_starts, slot_gradients,
    v_means2d, v_conics, v_opacities, v_colors, v_depths,
):  # fmt: skip
    """Add the slots of each splat in order; outputs are (B, N, ...) and zero on entry."""
    block = 1024
    blocks = (order.shape[1] + block - 1) // block
    for task in prange(len(counts) * blocks):
        b, start = task // blocks, (task % blocks) * block
        _sum_slots(
            start, min(counts[b], start + block), b, order[b], slots[b], slot_starts[b],
            slot_gradients, v_means2d, v_conics, v_opacities, v_colors, v_depths,
        )  # fmt: skip
