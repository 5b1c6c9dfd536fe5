"""Pictures to look at: contact sheets, conditioning maps, the cloud of planned views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cap4d_core.diffusion.view_cloud import camera_directions
from cap4d_core.diffusion.view_plan_file import ViewPlan
from cap4d_core.files.basic import atomic_path
from cap4d_core.files.images import to_uint8

Uint8Array = NDArray[np.uint8]
_MARGIN = 2


def contact_sheet(images: Sequence[Uint8Array], tile: int = 128, columns: int = 0) -> Uint8Array:
    """Images (H, W, 3) side by side in rows, each scaled to tile x tile, on grey.

    Args:
        images: at least one.
        tile: side of a tile in pixels.
        columns: 0 = about twice as wide as high.
    """
    columns = columns or max(1, math.ceil(math.sqrt(2 * len(images))))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step = tile + _MARGIN
    sheet = np.full((rows * step - _MARGIN, columns * step - _MARGIN, 3), 200, np.uint8)
    for i, image in enumerate(images):
        method = Image.Resampling.BOX if image.shape[0] > tile else Image.Resampling.NEAREST
        y, x = divmod(i, columns)
        sheet[y * step : y * step + tile, x * step : x * step + tile] = np.asarray(
            Image.fromarray(np.ascontiguousarray(image)).resize((tile, tile), method)
        )
    return sheet


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` different indices spread over range(count)."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def image_from_network(image: NDArray[Any], truncate: bool = False) -> Uint8Array:
    """(3, H, W) in -1..1 to (H, W, 3) bytes; rounded, or cut off as in the published files."""
    unit = np.clip((np.moveaxis(image, 0, -1) + 1.0) / 2.0, 0.0, 1.0)
    return (unit * 255.0).astype(np.uint8) if truncate else to_uint8(unit)


def bytes_on_device(image: Tensor, truncate: bool = False) -> Tensor:
    """The bytes of `image_from_network`, made where the image is: (3, H, W) to (H, W, 3) uint8."""
    unit = ((image.float().movedim(0, -1) + 1.0) / 2.0).clamp(0.0, 1.0).nan_to_num(0.0)
    scaled = unit * 255.0 if truncate else (unit.double() * 255.0).round()
    return scaled.to(torch.uint8)


def conditioning_sheet(maps: NDArray[Any], positional_channels: int, tile: int = 128) -> Uint8Array:
    """One row per frame: two channels of the positional encoding, displacement, rays, both masks.

    Args:
        maps: (n, h, w, C) conditioning maps.
        positional_channels: number of leading positional channels.
        tile: side of a tile in pixels.
    """

    def grey(channel: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(channel[..., None], 3, axis=-1)

    p = positional_channels
    # 12 and 13: the two highest frequencies of the cosine of x in the released layout.
    first, second = (min(channel, p - 1) for channel in (12, 13))
    pictures = []
    for frame in maps:
        pictures += [
            grey(frame[..., first] / 2 + 0.5),
            grey(frame[..., second] / 2 + 0.5),
            frame[..., p : p + 3] / 4 + 0.5,
            frame[..., p + 3 : p + 6] / 2 + 0.5,
            grey(frame[..., p + 6]),
            grey(frame[..., p + 7]),
        ]
    return contact_sheet([to_uint8(picture) for picture in pictures], tile, columns=6)


def write_view_cloud(path: str | Path, plan: ViewPlan) -> None:
    """Polar picture of where planned views and references stand, as seen from the head.

    The centre is straight in front of the face; the radius is the angle off that direction.
    """
    from matplotlib.figure import Figure

    def polar(directions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        x, y, z = directions.T
        return np.arctan2(y, x), np.degrees(np.arccos(np.clip(z, -1, 1)))

    base = plan.references[plan.base_reference]
    views = camera_directions(base.rot, base.tra, np.stack([v.extr for v in plan.views]))
    references = np.concatenate(
        [camera_directions(r.rot, r.tra, np.asarray(r.extr)[None]) for r in plan.references]
    )
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.scatter(*polar(views), s=8, color="tab:blue", label=f"{len(views)} planned views")
    axes.scatter(
        *polar(references), s=40, marker="x", color="tab:orange",
        label=f"{len(references)} reference{'s' if len(references) != 1 else ''}",
    )  # fmt: skip
    axes.scatter(
        *polar(references[[plan.base_reference]]), s=120, marker="o", facecolors="none",
        edgecolors="tab:red", label="base reference",
    )  # fmt: skip
    axes.set_title(f"{plan.subject}: degrees off the front, as seen from the head", fontsize=9)
    axes.legend(loc="lower right", fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
