"""Small pictures for the report: contact sheets, posters, data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cap4d_core.animation.video import probe_video, read_frames
from cap4d_core.errors import InputFileError
from cap4d_core.files.images import read_rgb

MAX_WIDTH = 1400


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], columns: int = 6, width: int = 180, gap: int = 4
) -> NDArray[np.uint8]:
    """Images in a grid, row by row, on white.

    Args:
        images: (H, W, 3) uint8 each, at least one; scaled to fit their place, not distorted.
        columns: at most this many in a row.
        width: pixels of one place; its shape is that of the first image.
        gap: pixels between places.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = max(1, round(width * images[0].shape[0] / images[0].shape[1]))
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(size, 255, np.uint8)
    for number, image in enumerate(images):
        fitted = ImageOps.contain(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        y = row * (height + gap) + (height - fitted.height) // 2
        x = column * (width + gap) + (width - fitted.width) // 2
        sheet[y : y + fitted.height, x : x + fitted.width] = np.asarray(fitted)
    return sheet


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `count`, first and last among them."""
    if wanted <= 1 or count <= 1:
        return list(range(min(count, wanted)))
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()


def folder_sheet(folder: Path, wanted: int = 12, columns: int = 6) -> NDArray[np.uint8] | None:
    """Contact sheet of evenly spaced images of a folder; None when it holds none."""
    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if not files:
        return None
    chosen = [files[i] for i in evenly_spaced(len(files), wanted)]
    return contact_sheet([read_rgb(file) for file in chosen], columns)


def video_sheet(path: Path, wanted: int = 6, columns: int = 6) -> NDArray[np.uint8]:
    """Contact sheet of evenly spaced frames of a video.

    Raises:
        InputFileError: unreadable video, or one without frames.
    """
    count = probe_video(path).num_frames
    chosen = set(evenly_spaced(count, wanted))
    frames = [frame for i, frame in enumerate(read_frames(path)) if i in chosen]
    if not frames:
        raise InputFileError(path, "no frames", "a video with at least one frame")
    return contact_sheet(frames, columns)


def first_frame(path: Path) -> NDArray[np.uint8]:
    """First frame of a video, (H, W, 3).

    Raises:
        InputFileError: unreadable video, or one without frames.
    """
    for frame in read_frames(path):
        return frame
    raise InputFileError(path, "no frames", "a video with at least one frame")


def data_uri(image: NDArray[np.uint8], max_width: int = MAX_WIDTH) -> str:
    """JPEG of an image as a `data:` URI, shrunk to `max_width` if wider."""
    picture = Image.fromarray(image)
    if picture.width > max_width:
        height = max(1, round(picture.height * max_width / picture.width))
        picture = picture.resize((max_width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
