"""Still images as arrays: 8-bit RGB and grey, EXIF orientation respected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import atomic_path, require_file

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# Of 9. The usual 6 takes three times as long for portraits of 512 px that are 6 % smaller.
_PNG_LEVEL = 3


def _load(path: str | Path) -> Image.Image:
    path = require_file(path, "an image")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InputFileError(
            path, f"a file that is no readable image ({error})", "a PNG, JPEG, WebP or TIFF image"
        ) from None


def read_rgb(path: str | Path) -> NDArray[np.uint8]:
    """Reads an image as (H, W, 3) uint8 RGB; transparency is composited over white.

    Raises:
        InputFileError: missing, corrupt or not an image.
    """
    image = _load(path)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
        alpha = rgba[..., 3:] / 255.0
        blended = rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)
        return np.rint(blended).astype(np.uint8)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey
        grey = np.asarray(image, dtype=np.float64)
        peak = 65535.0 if grey.max() > 255 else 255.0
        grey = np.clip(grey / peak * 255.0, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def read_grey(path: str | Path) -> NDArray[np.uint8]:
    """Reads an image as (H, W) uint8, e.g. a matte with 255 = foreground."""
    return np.asarray(_load(path).convert("L"))


def write_image(path: str | Path, image: NDArray[Any]) -> None:
    """Writes (H, W), (H, W, 3) or (H, W, 4) uint8 atomically; format by suffix."""
    if image.dtype != np.uint8:
        raise TypeError(f"write_image takes uint8, got {image.dtype}; use to_uint8")
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, compress_level=_PNG_LEVEL)


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Floats in 0..1 to bytes, rounded and clipped."""
    return np.rint(np.clip(np.asarray(image, dtype=np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)
