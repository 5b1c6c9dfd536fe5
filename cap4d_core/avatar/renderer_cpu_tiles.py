"""Compiled kernels that sort splats by depth and list them per image tile.

One list per tile and view, front to back. Splats enter by the exact bounding box of the ellipse
alpha = 1/255, which is a little tighter than the integer radii.
"""

# mypy: disallow-untyped-defs=False
# (compiled functions: numba infers the argument types, annotations would be ignored)

import math
from typing import Any

import numpy as np
from numba import njit

TILE = 16
RECORD = 10
"""Values per sorted splat: u, v, conic xx, xy, yy, opacity, red, green, blue, depth."""

_KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_KERNEL)
def _sort_by_bits(keys, values, count):
    """Stable radix sort of values[:count] by keys[:count] (uint32), three passes of 11 bits."""
    other_keys, other_values = np.empty(count, np.uint32), np.empty(count, np.int32)
    starts = np.empty(2049, np.int64)
    for shift in (0, 11, 22):
        for i in range(2049):
            starts[i] = 0
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


@njit(**_KERNEL)
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


@njit(**_KERNEL)
def sort_views(
    first, last, means2d, conics, colors, depths, opacities, radii, width, height,
    order, records, boxes, slots, counts, tile_counts,
):  # fmt: skip
    """Depth-sort views first..last. Outputs per view: see `_sort_view`; tile_counts starts at 0."""
    for b in range(first, last):
        counts[b] = _sort_view(
            means2d[b], conics[b], colors[b], depths[b], opacities[b], radii[b], width, height,
            order[b], records[b], boxes[b], slots[b], tile_counts[b],
        )  # fmt: skip


@njit(**_KERNEL)
def list_tiles(first, last, counts, boxes, tile_starts, tiles_x, tile_lists):
    """Fill tile_lists (P,) of views first..last with splat ranks, front to back.

    tile_starts (B, tiles + 1) holds the offsets into it.
    """
    cursor = np.empty(tile_starts.shape[1], np.int64)
    for b in range(first, last):
        for tile in range(len(cursor)):
            cursor[tile] = tile_starts[b, tile]
        for rank in range(counts[b]):
            x0, x1, y0, y1 = (
                boxes[b, rank, 0],
                boxes[b, rank, 1],
                boxes[b, rank, 2],
                boxes[b, rank, 3],
            )
            for ty in range(y0 // TILE, (y1 - 1) // TILE + 1):
                for tx in range(x0 // TILE, (x1 - 1) // TILE + 1):
                    tile = ty * tiles_x + tx
                    tile_lists[cursor[tile]] = rank
                    cursor[tile] += 1
