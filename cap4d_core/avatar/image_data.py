"""Training images, cameras and head parameters of a fit, held as tensors on the device.

Cameras see a head at the origin (rot = tra = 0): the camera moves instead of the head, so that
view-dependent colours act as light fixed to the head. Images are bytes and become floats per batch.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.image_set import ImageSetItem, read_image_set
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.geometry.cameras import head_to_origin, intrinsics_matrix
from cap4d_core.geometry.crops import crop_intrinsics, crop_mask, resize

logger = logging.getLogger(__name__)

MAX_HELD_OUT = 10


@dataclass(frozen=True)
class Split:
    """View indices. `held_out` is not trained on; `validation` is part of the training views."""

    train: list[int]
    held_out: list[int]
    validation: list[int]


@dataclass
class ViewBatch:
    """B views.

    image (B, 3, H, W) in 0..1; mask (B, 1, H, W) bool; world_to_camera (B, 4, 4); intrinsics
    (B, 3, 3); rows (B,) of the tables per view.
    """

    image: Tensor
    mask: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    rows: Tensor


@dataclass
class ImageData:
    """N views of equal size.

    images (N, H, W, 3) uint8; mask_rows (N, H) and mask_columns (N, W) bool, whose product is the
    part of the crop that shows the photo; mattes (N, H, W) uint8 or None; world_to_camera
    (N, 4, 4); intrinsics (N, 3, 3) pixels; expr (N, 65); eye_rot (N, 3); shape (150,) of the first
    view; names of the image files.
    """

    images: Tensor
    mask_rows: Tensor
    mask_columns: Tensor
    mattes: Tensor | None
    world_to_camera: Tensor
    intrinsics: Tensor
    expr: Tensor
    eye_rot: Tensor
    shape: Tensor
    names: list[str]

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of all views."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def to(self, device: torch.device | str) -> ImageData:
        """All tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def mask(self, rows: Tensor) -> Tensor:
        """(B, H, W) bool."""
        return self.mask_rows[rows][:, :, None] & self.mask_columns[rows][:, None, :]

    def batch(self, rows: Tensor) -> ViewBatch:
        """Some views; `rows` is an index tensor on the same device."""
        image = self.images[rows].permute(0, 3, 1, 2).float() / 255.0
        return ViewBatch(
            image=image,
            mask=self.mask(rows)[:, None],
            world_to_camera=self.world_to_camera[rows],
            intrinsics=self.intrinsics[rows],
            rows=rows,
        )

    def fingerprint(self) -> str:
        """Hash of everything that training sees."""
        digest = hashlib.blake2b(digest_size=16)
        for value in vars(self).values():
            if isinstance(value, Tensor):
                digest.update(str(tuple(value.shape)).encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def split_views(num_views: int, parity: bool = False) -> Split:
    """Which views are held out.

    A tenth of the views, at most 10, taken from the end; none when there are fewer than 10 views,
    as every photo counts then. Parity: at least one always, which leaves nothing to train on when
    there is a single view; the fit then trains on all.
    """
    held_out = min(MAX_HELD_OUT, num_views // 10)
    if parity:
        held_out = max(1, held_out)
    everything = list(range(num_views))
    return Split(
        train=everything[: num_views - held_out],
        held_out=everything[num_views - held_out :],
        validation=everything[:held_out],
    )


def load_image_data(
    image_sets: Sequence[str | Path | list[ImageSetItem]], parity: bool = False
) -> ImageData:
    """Reads image sets, in the order given (references first), onto the CPU.

    Views of differing size are resampled to the most frequent one.

    Args:
        image_sets: folders, or lists of items.
        parity: decode images as published.

    Raises:
        InputFileError: unreadable file, or an image that is not square.
        UserError: no image at all.
    """
    items: list[ImageSetItem] = []
    for source in image_sets:
        items += source if isinstance(source, list) else read_image_set(source)
    if not items:
        raise UserError("fit_avatar: the image sets hold no image; at least one is needed.")

    decoded = [decode_parity(item.image) if parity else read_rgb(item.image) for item in items]
    for item, image in zip(items, decoded, strict=True):
        if image.shape[0] != image.shape[1]:
            found = f"an image of {image.shape[1]} x {image.shape[0]} pixels"
            raise InputFileError(item.image, found, "a square head crop")
    sizes = Counter(image.shape[0] for image in decoded)
    size = max(sizes, key=lambda s: (sizes[s], s))
    if len(sizes) > 1:
        detail = ", ".join(f"{count} of {s} px" for s, count in sorted(sizes.items()))
        logger.info("images of several sizes (%s): resampled to %d px", detail, size)
    decoded = [image if image.shape[0] == size else resize(image, size) for image in decoded]

    masks = [
        crop_mask(item.parameters.resolution, item.parameters.crop_box, size) for item in items
    ]
    cameras = [_camera(item, size) for item in items]
    parameters = [item.parameters for item in items]
    return ImageData(
        images=torch.from_numpy(np.stack(decoded)),
        mask_rows=torch.from_numpy(np.stack([mask.any(axis=1) for mask in masks])),
        mask_columns=torch.from_numpy(np.stack([mask.any(axis=0) for mask in masks])),
        mattes=_mattes(items, size),
        world_to_camera=torch.stack([extr for extr, _ in cameras]),
        intrinsics=torch.stack([intrinsics for _, intrinsics in cameras]),
        expr=torch.from_numpy(np.stack([p.expr for p in parameters])).float(),
        eye_rot=torch.from_numpy(np.stack([p.eye_rot for p in parameters])).float(),
        shape=torch.from_numpy(np.asarray(parameters[0].shape)).float(),
        names=[item.image.name for item in items],
    )


def _camera(item: ImageSetItem, size: int) -> tuple[Tensor, Tensor]:
    """(4, 4) world-to-camera and (3, 3) intrinsics of a view's crop, computed in float64."""
    p = item.parameters
    extr, rot, tra = (torch.from_numpy(np.array(a, np.float64)) for a in (p.extr, p.rot, p.tra))
    fx, fy, cx, cy = crop_intrinsics(p.fx, p.fy, p.cx, p.cy, p.crop_box, size)
    matrix = intrinsics_matrix(*torch.tensor([fx, fy, cx, cy], dtype=torch.float64).unbind())
    return head_to_origin(extr, rot, tra).float(), matrix.float()


def _mattes(items: Sequence[ImageSetItem], size: int) -> Tensor | None:
    if any(item.matte is None for item in items):
        return None
    mattes = [read_grey(item.matte) for item in items if item.matte is not None]
    return torch.from_numpy(
        np.stack([m if m.shape == (size, size) else resize(m, size) for m in mattes])
    )


def decode_parity(path: str | Path) -> NDArray[np.uint8]:
    """Image bytes as the published loader obtains them: over white, truncated."""
    with Image.open(path) as image:
        return composite_truncated(np.asarray(image.convert("RGBA")))


def composite_truncated(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4) bytes over white, truncated to bytes instead of rounded (published)."""
    scaled = rgba / 255.0
    alpha = scaled[..., 3:]
    blended = scaled[..., :3] * alpha + (1 - alpha)
    truncated: NDArray[np.uint8] = (blended * 255.0).astype(np.uint8)
    return truncated
