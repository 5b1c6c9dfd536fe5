"""Built-in Gaussian renderer for CPU tensors: compiled loops inside autograd functions.

Same mathematics as gsplat 1.5.3's classic mode; conventions, constants and kernels are in
`renderer_cpu_projection`, `renderer_cpu_tiles` and `renderer_cpu_blending`. The first call compiles
for some seconds; the machine code is cached on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.avatar import renderer_cpu_blending as blending
from cap4d_core.avatar import renderer_cpu_projection as projection
from cap4d_core.avatar import renderer_cpu_tiles as tiles

Arrays = tuple[np.ndarray, ...]

# Some more pieces of work than threads, so that none waits long for the slowest.
_PIECES_PER_THREAD = 4


@lru_cache(maxsize=4)
def _thread_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Workers of one process (threads do not survive a fork)."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"renderer-{process}")


def _run(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call kernel(first, last, *arguments) for pieces of range(count), on torch's thread count.

    Kernels release the GIL. This does what numba's own parallel loops do, in half the compilation
    time, and without OpenMP, whose threads abort the process when used after a fork.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        kernel(0, count, *arguments)
        return
    pieces = min(count, threads * _PIECES_PER_THREAD)
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    pool = _thread_pool(threads, os.getpid())
    futures = [pool.submit(kernel, first, last, *arguments) for first, last in pairwise(ends)]
    for future in futures:
        future.result()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class _Project(torch.autograd.Function):
    """Splats to image-plane ellipses and colours."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        sh: Tensor,
        opacities: Tensor,
        camera: tuple[Tensor, Tensor, int, int, float, float],
        degree: int,
    ) -> tuple[Tensor, ...]:
        world_to_camera, intrinsics, width, height, near, far = camera
        dtype = means.dtype
        batch, count = means.shape[:2]
        cameras = world_to_camera.detach().double()
        centres = torch.linalg.inv(cameras)[:, :3, 3]
        inputs = tuple(map(_array, (means, quats, scales, sh)))
        view = (_array(cameras), _array(intrinsics.double()), _array(centres))
        means2d = torch.zeros(batch, count, 2, dtype=dtype)
        conics = torch.zeros(batch, count, 3, dtype=dtype)
        colors = torch.zeros(batch, count, 3, dtype=dtype)
        depths = torch.zeros(batch, count, dtype=dtype)
        radii = torch.zeros(batch, count, 2, dtype=torch.int32)
        outputs = (means2d, conics, colors, depths, radii)
        _run(
            projection.project, count,
            *inputs[:3], _array(opacities), inputs[3], degree, *view, width, height, near, far,
            *(tensor.numpy() for tensor in outputs),
        )  # fmt: skip
        ctx.save_for_backward(means, quats, scales, sh)
        ctx.degree, ctx.view, ctx.size = degree, view, (width, height)
        ctx.conics, ctx.radii = conics.numpy(), radii.numpy()
        ctx.mark_non_differentiable(radii)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v_means2d, v_conics, v_colors, v_depths, _ = gradients
        inputs = ctx.saved_tensors
        results = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        _run(
            projection.project_backward, v_means2d.shape[1],
            *map(_array, inputs), ctx.degree, *ctx.view, *ctx.size, ctx.conics, ctx.radii,
            _array(v_means2d), _array(v_conics), _array(v_colors), _array(v_depths),
            *(tensor.numpy() for tensor in results),
        )  # fmt: skip
        return (*results, None, None, None)


def _sort(
    means2d: Tensor, conics: Tensor, colors: Tensor, depths: Tensor, opacities: Tensor,
    radii: Tensor, width: int, height: int,
) -> tuple[tuple[int, int, int], Arrays, Arrays]:  # fmt: skip
    """Depth order and tile lists of every view.

    Returns:
        (stride, tiles_x, tiles_y); (tile_starts, tile_lists, records, boxes);
        (counts, order, slots, slot_starts).
    """
    batch, count = depths.shape
    tiles_x, tiles_y = -(-width // tiles.TILE), -(-height // tiles.TILE)
    dtype = means2d.detach().numpy().dtype
    order = np.empty((batch, count), np.int32)
    records = np.empty((batch, count, tiles.RECORD), dtype)
    boxes = np.empty((batch, count, 4), np.int32)
    slots = np.empty((batch, count + 1), np.int64)
    counts = np.zeros(batch, np.int64)
    tile_counts = np.zeros((batch, tiles_x * tiles_y), np.int64)
    _run(
        tiles.sort_views, batch,
        *map(_array, (means2d, conics, colors, depths, opacities, radii)), width, height,
        order, records, boxes, slots, counts, tile_counts,
    )  # fmt: skip
    ends = np.cumsum(tile_counts).reshape(batch, -1)
    slot_starts = np.concatenate([[0], ends[:-1, -1]])
    tile_starts = np.concatenate([slot_starts[:, None], ends], axis=1)
    tile_lists = np.empty(int(ends[-1, -1]), np.int32)
    _run(tiles.list_tiles, batch, counts, boxes, tile_starts, tiles_x, tile_lists)
    # Any prime that does not divide the number of tiles visits each of them once.
    total = batch * tiles_x * tiles_y
    stride = next(prime for prime in (7919, 7907, 7901, 7883, 7879) if total % prime)
    return (
        (stride, tiles_x, tiles_y),
        (tile_starts, tile_lists, records, boxes),
        (counts, order, slots, slot_starts),
    )


class _Blend(torch.autograd.Function):
    """Ellipses to image, alpha and summed depth."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        colors: Tensor,
        depths: Tensor,
        opacities: Tensor,
        radii: Tensor,
        background: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        width, height = size
        batch, dtype = means2d.shape[0], means2d.dtype
        image = torch.empty(batch, height, width, 3, dtype=dtype)
        depth = torch.empty(batch, height, width, dtype=dtype)
        transmittance = torch.empty(batch, height, width, dtype=dtype)
        last_index = np.empty((batch, height, width), np.int32)
        grid, lists, slots = _sort(means2d, conics, colors, depths, opacities, radii, width, height)
        behind = _array(background)
        _run(
            blending.blend,
            batch * grid[1] * grid[2],
            *grid,
            *lists,
            behind,
            image.numpy(),
            depth.numpy(),
            transmittance.numpy(),
            last_index,
        )
        ctx.grid, ctx.lists, ctx.slots, ctx.background = grid, lists, slots, behind
        ctx.pixels = (transmittance.numpy(), last_index)
        return image, (1.0 - transmittance)[..., None], depth[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v_image, v_alpha, v_depth = gradients
        counts, order, slots, slot_starts = ctx.slots
        tile_starts, tile_lists, records, boxes = ctx.lists
        batch, count = order.shape
        slot_gradients = np.zeros((len(tile_lists), tiles.RECORD), records.dtype)
        v_means2d = v_image.new_zeros(batch, count, 2)
        v_conics, v_colors = v_image.new_zeros(batch, count, 3), v_image.new_zeros(batch, count, 3)
        v_opacities, v_depths = v_image.new_zeros(batch, count), v_image.new_zeros(batch, count)
        _run(
            blending.blend_backward, batch * ctx.grid[1] * ctx.grid[2],
            *ctx.grid, tile_starts, tile_lists, records, boxes, slots, slot_starts,
            ctx.background, *ctx.pixels,
            _array(v_image), _array(v_alpha[..., 0]), _array(v_depth[..., 0]), slot_gradients,
        )  # fmt: skip
        results = (v_means2d, v_conics, v_opacities, v_colors, v_depths)
        _run(
            blending.sum_slots, count,
            counts, order, slots, slot_starts, slot_gradients,
            *(tensor.numpy() for tensor in results),
        )  # fmt: skip
        return v_means2d, v_conics, v_colors, v_depths, v_opacities, None, None, None


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, sh: Tensor,
    world_to_camera: Tensor, intrinsics: Tensor, width: int, height: int, *,
    sh_degree: int, background: Tensor, near: float, far: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Render with the compiled kernels.

    Args:
        means: (B, N, 3) float32 or float64 on the CPU, like all tensors here.
        quats: (B, N, 4) wxyz.
        scales: (B, N, 3).
        opacities: (B, N).
        sh: (1, N, K, 3) shared by the views, or (B, N, K, 3).
        world_to_camera: (B, 4, 4), constant.
        intrinsics: (B, 3, 3), constant.
        width: Image width, pixels.
        height: Image height, pixels.
        sh_degree: 0 to 3.
        background: (B, 3), constant.
        near: Near plane, metres.
        far: Far plane, metres.

    Returns:
        image (B, H, W, 3), alpha (B, H, W, 1), sum of weight times depth (B, H, W, 1),
        means2d (B, N, 2), radii (B, N, 2).
    """
    camera = (world_to_camera, intrinsics, width, height, near, far)
    means2d, conics, colors, depths, radii = _Project.apply(
        means, quats, scales, sh, opacities, camera, sh_degree
    )
    image, alpha, depth = _Blend.apply(
        means2d, conics, colors, depths, opacities, radii, background, (width, height)
    )
    return image, alpha, depth, means2d, radii
