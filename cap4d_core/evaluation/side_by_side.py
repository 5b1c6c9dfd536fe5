"""Pictures beside one another, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cap4d_core.files.basic import atomic_path
from cap4d_core.files.images import to_uint8

GAP, CAPTION_HEIGHT, FONT_SIZE = 6, 22, 14


@dataclass(frozen=True)
class Comparison:
    """One row: images (H, W, 3) in 0..1, all of one size, and captions under them from the left.

    A caption may be wider than its image where none follows.
    """

    captions: tuple[str, ...]
    images: tuple[Tensor, ...]


def write_side_by_side(
    path: str | Path, titles: Sequence[str], rows: Sequence[Comparison], side: int = 320
) -> None:
    """Writes rows of equally wide images with titles over columns and captions under images.

    Args:
        path: picture to write.
        titles: one per column.
        rows: at least one.
        side: width of the images in the picture; smaller ones are enlarged without smoothing.
    """
    font = ImageFont.load_default(FONT_SIZE)
    columns = len(titles)
    width = columns * side + (columns + 1) * GAP
    pitch = side + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (width, CAPTION_HEIGHT + GAP + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (side + GAP), GAP // 2), title, "black", font)
    for number, row in enumerate(rows):
        top = CAPTION_HEIGHT + GAP + number * pitch
        for column, image in enumerate(row.images):
            picture = Image.fromarray(to_uint8(image.cpu().numpy()))
            enlarging = picture.width < side
            method = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
            height = round(side * picture.height / picture.width)
            picture = picture.resize((side, height), method)
            sheet.paste(picture, (GAP + column * (side + GAP), top))
        for column, caption in enumerate(row.captions):
            draw.text((GAP + column * (side + GAP), top + side + 2), caption, "black", font)
    with atomic_path(path) as temporary:
        sheet.save(temporary)
