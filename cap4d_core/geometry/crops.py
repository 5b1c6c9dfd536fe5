"""Square head crops: where they lie, cutting them out, resampling them, their cameras.

Conventions:
    Boxes are (x0, y0, x1, y1) in whole pixels; x1, y1 are exclusive; boxes may leave the image.
    Pixel (column j, row i) covers [j, j+1) x [i, i+1). Images are (H, W) or (H, W, C) arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]
Number = TypeVar("Number", float, NDArray[Any], Tensor)

# Half side of the crop relative to half the bounding box of the head.
CROP_SCALE = 1.2


def crop_box_from_points(points: NDArray[Any]) -> Box:
    """Square box around projected points, a fifth larger than their bounding box.

    The bounding box is truncated towards zero, also for negative coordinates.

    Args:
        points: (N, 2) or (N, 3) pixel coordinates, e.g. of the vertices in head_vertices.txt.

    Returns:
        (x0, y0, x1, y1) with an even side.

    Raises:
        ValueError: a coordinate is not finite.
    """
    xy = np.asarray(points)[:, :2]
    if not np.isfinite(xy).all():
        raise ValueError("crop_box_from_points: points with NaN or infinite coordinates")
    x0, y0 = (int(v) for v in xy.min(axis=0))
    x1, y1 = (int(v) for v in xy.max(axis=0))
    center_x, center_y = (x0 + x1) // 2, (y0 + y1) // 2
    half = int(max(x1 - x0, y1 - y0) // 2 * CROP_SCALE)
    return center_x - half, center_y - half, center_x + half, center_y + half


def crop(image: NDArray[Any], box: Box, fill: float) -> NDArray[Any]:
    """Cuts out a box; what lies outside the image gets the value `fill`. Keeps the dtype."""
    x0, y0, x1, y1 = box
    height, width = image.shape[:2]
    result = np.full((y1 - y0, x1 - x0, *image.shape[2:]), fill, dtype=image.dtype)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left < right and top < bottom:
        result[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return result


def resize(image: NDArray[Any], size: int | tuple[int, int]) -> NDArray[Any]:
    """Resamples to `size` (side, or (height, width)) with OpenCV's kernels.

    Shrinking in height averages areas, with fractional weights at box edges; otherwise bilinear
    with half-pixel centres. A trailing channel axis of length 1 is dropped, as OpenCV does.
    """
    import cv2  # not above: sampling jobs, which resample nothing, start faster without it

    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image[..., 0].copy() if image.ndim == 3 and image.shape[2] == 1 else image.copy()
    method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
    # Releases of OpenCV differ in whether they drop the channel axis.
    return resized[..., 0] if resized.ndim == 3 and resized.shape[2] == 1 else resized


def crop_intrinsics(
    fx: Number, fy: Number, cx: Number, cy: Number, box: Box, size: int
) -> tuple[Number, Number, Number, Number]:
    """Intrinsics of a box resampled to size x size pixels.

    One factor from the width serves both axes; pixel edges are whole numbers.

    Returns:
        (fx, fy, cx, cy) in pixels of the resampled crop.
    """
    x0, y0, x1, _ = box
    factor = size / (x1 - x0)
    return fx * factor, fy * factor, (cx - x0) * factor, (cy - y0) * factor


def crop_mask(image_size: tuple[int, int], box: Box, size: int) -> NDArray[np.bool_]:
    """(size, size) True where a resampled crop shows at least a part of the image."""
    inside = crop(np.ones(image_size, np.float32), box, 0.0)
    return np.asarray(resize(inside, size) > 0)


def pixels_to_ndc(points: Tensor, box: Box | Sequence[Tensor]) -> Tensor:
    """Pixel coordinates to the rasterizer's normalised coordinates of a square box.

    x and y run from +1 (left or upper edge of the box) to -1; further components are kept.

    Args:
        points: (..., 2 or more) pixels.
        box: square box whose edges become +-1; four tensors of a shape that fits (...): a box each.
    """
    x0, y0, x1, y1 = box
    result = points.clone()
    result[..., 0] = -((points[..., 0] - x0) / (x1 - x0) * 2 - 1)
    result[..., 1] = -((points[..., 1] - y0) / (y1 - y0) * 2 - 1)
    return result


def box_inside_share(box: Box, image_size: tuple[int, int]) -> float:
    """Share of a box's area that lies inside an image of (height, width)."""
    x0, y0, x1, y1 = box
    height, width = image_size
    inside = max(0, min(x1, width) - max(x0, 0)) * max(0, min(y1, height) - max(y0, 0))
    area = (x1 - x0) * (y1 - y0)
    return inside / area if area > 0 else math.nan
