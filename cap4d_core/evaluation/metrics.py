"""Image quality inside a mask."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Bounds PSNR at 100 dB, so that equal images give a number JSON can hold.
SMALLEST_ERROR = 1e-10


def dilated_mask(matte: NDArray[np.uint8], pixels: int = 5) -> NDArray[np.bool_]:
    """Foreground of a matte, grown by `pixels` in every direction (round).

    Args:
        matte: (H, W) uint8, 255 = foreground; every pixel with some foreground counts.
        pixels: radius; 0 leaves the matte as it is.
    """
    foreground = (matte > 0).astype(np.uint8)
    if pixels <= 0:
        return foreground.astype(bool)
    side = 2 * pixels + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return np.asarray(cv2.dilate(foreground, disc) > 0)


def psnr(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the masked pixels, at most 100.

    Args:
        image: (H, W, 3), 0..1.
        truth: (H, W, 3), 0..1.
        mask: (H, W) bool, not empty.
    """
    _check(image, truth, mask)
    error = float((image - truth)[mask].double().square().mean())
    return float(-10 * np.log10(max(error, SMALLEST_ERROR)))


def psnr_of_views(images: Tensor, truths: Tensor, masks: Tensor) -> Tensor:
    """As `psnr`, of many pictures at once, on their device.

    Args:
        images: (N, H, W, 3), 0..1.
        truths: (N, H, W, 3), 0..1.
        masks: (N, H, W) bool, none empty.

    Returns:
        (N,) float64 dB.
    """
    if images.shape != truths.shape or images.shape[:3] != masks.shape:
        raise ValueError("images, truths and masks differ in size")
    weight = masks[..., None].double()
    error = ((images.double() - truths.double()).square() * weight).sum((1, 2, 3))
    error = error / (3 * weight.sum((1, 2, 3)))
    return -10 * torch.log10(error.clamp(min=SMALLEST_ERROR))


def ssim(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean of its map over the masked pixels.

    Gaussian window of 11 pixels, sigma 1.5. What lies outside the mask is made equal in both
    images first: windows at the rim must not judge it.

    Args:
        image: (H, W, 3), 0..1, sides of at least 11 pixels.
        truth: (H, W, 3), 0..1.
        mask: (H, W) bool, not empty.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(image, truth, mask)
    compared = torch.where(mask[..., None], image, truth)
    _, full = structural_similarity_index_measure(
        compared.permute(2, 0, 1)[None].float(),
        truth.permute(2, 0, 1)[None].float(),
        data_range=1.0,
        return_full_image=True,
        reduction="none",
    )
    return float(full[0].mean(0)[mask].mean())


def lpips(distance: Callable[..., Tensor], image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Learned perceptual distance; what lies outside the mask is made equal first.

    Args:
        distance: (1, 3, H, W) twice -> (1,), e.g. `cap4d_core.avatar.lpips.Lpips`, where
            the images are.
        image: (H, W, 3), 0..1.
        truth: (H, W, 3), 0..1.
        mask: (H, W) bool, not empty.
    """
    _check(image, truth, mask)
    compared = torch.where(mask[..., None], image, truth)
    pair = (picture.permute(2, 0, 1)[None] for picture in (compared, truth))
    with torch.no_grad():
        return float(distance(*pair)[0])


def _check(image: Tensor, truth: Tensor, mask: Tensor) -> None:
    if image.shape != truth.shape or image.shape[:2] != mask.shape:
        raise ValueError(
            f"image {tuple(image.shape)}, truth {tuple(truth.shape)} and mask {tuple(mask.shape)} "
            "differ in size"
        )
    if not bool(mask.any()):
        raise ValueError("empty mask: there is nothing to compare")
