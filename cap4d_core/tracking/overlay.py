"""Pictures that show a fit: the head mesh drawn over photos, or as a film strip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.geometry.crops import Box, resize
from cap4d_core.geometry.mesh_rasterizer import rasterize, screen_to_ndc
from cap4d_core.tracking.quality import ProjectedHead

_MESH_COLOUR = np.array([0.36, 0.62, 0.95])
_BOX_COLOUR = np.array([0.95, 0.75, 0.1])
_OPACITY = 0.6


def fit_scale(image_size: tuple[int, int], max_side: int) -> float:
    """Factor that brings the longer side to at most `max_side`."""
    return min(1.0, max_side / max(image_size))


def draw_head(
    picture: NDArray[np.floating],
    head: ProjectedHead,
    faces: NDArray[np.int64],
    scale: float,
    opacity: float = _OPACITY,
) -> NDArray[np.floating]:
    """Blends the shaded mesh over a picture.

    Args:
        picture: (h, w, 3) in 0..1, already reduced by `scale`.
        head: projection into the full-size picture.
        faces: triangles.
        scale: size of `picture` relative to the full picture.
        opacity: 0 leaves the picture, 1 hides it behind the mesh.
    """
    height, width = picture.shape[:2]
    points = head.pixels * np.array([scale, scale, scale], np.float32)
    vertices = screen_to_ndc(torch.from_numpy(points), (height, width))[None]
    fragments = rasterize(vertices, torch.from_numpy(faces), (height, width))
    corners = points[faces].astype(np.float64)
    # The depth is in pixels too, so these are normals of the mesh as the camera sees it.
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    shade = 0.35 + 0.65 * np.abs(normals @ np.array([0.3, 0.4, 0.87]))
    index = fragments.face_index[0].numpy()
    covered = index >= 0
    result = picture.copy()
    colour = shade[index[covered]][:, None] * _MESH_COLOUR
    result[covered] = (1 - opacity) * result[covered] + opacity * colour
    return result


def draw_box(picture: NDArray[np.floating], box: Box, scale: float) -> NDArray[np.floating]:
    """Draws the part of a crop box that lies inside the picture."""
    result = picture.copy()
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = (round(edge * scale) for edge in box)
    left, right = max(x0, 0), min(x1, width)
    top, bottom = max(y0, 0), min(y1, height)
    for row in (y0, y1 - 1):
        if 0 <= row < height and left < right:
            result[row, left:right] = _BOX_COLOUR
    for column in (x0, x1 - 1):
        if 0 <= column < width and top < bottom:
            result[top:bottom, column] = _BOX_COLOUR
    return result


def shrink(image: NDArray[np.uint8], scale: float) -> NDArray[np.float64]:
    """(H, W, 3) bytes to a reduced picture in 0..1."""
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return resize(image, (height, width)).astype(np.float64) / 255.0


def contact_sheet(
    tiles: Sequence[NDArray[np.floating]], columns: int, gap: int = 4
) -> NDArray[np.uint8]:
    """Tiles in rows on white, each centred in a cell of the largest tile's size.

    Returns:
        (H, W, 3) bytes.
    """
    cell_height = max(tile.shape[0] for tile in tiles) + gap
    cell_width = max(tile.shape[1] for tile in tiles) + gap
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.ones((rows * cell_height + gap, columns * cell_width + gap, 3))
    for number, tile in enumerate(tiles):
        top = gap + number // columns * cell_height + (cell_height - gap - tile.shape[0]) // 2
        left = gap + number % columns * cell_width + (cell_width - gap - tile.shape[1]) // 2
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return np.rint(np.clip(sheet, 0.0, 1.0) * 255.0).astype(np.uint8)
