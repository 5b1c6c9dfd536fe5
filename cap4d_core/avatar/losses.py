"""Image losses and regularisers of the avatar fit.

Images are (B, 3, H, W), linear 0..1. SSIM: Wang et al. 2004, with zero padding at the borders.
The regularisers are in the units of `cap4d_core.avatar.deformation.OFFSET_UNIT` where said.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cap4d_core.avatar.deformation import OFFSET_UNIT
from cap4d_core.avatar.face_frames import squared_rotation_angle

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2
# Side in pixels up to which blurring by matrix products beats convolutions; on CUDA they are also
# true float32, while convolutions may use TF32, whose 10 bits the variances of SSIM do not survive.
MAX_MATRIX_BLUR = {"cpu": 256, "cuda": 1024}


def l1_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (image - target).abs().mean()


def _window() -> list[float]:
    weights = [
        math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2)) for i in range(SSIM_WINDOW)
    ]
    return [weight / sum(weights) for weight in weights]


# Normalised 1-D Gaussian; its outer product is the SSIM window.
WINDOW = _window()


# Cached, because building it on every call would stop the GPU.
@functools.cache
def gaussian_window(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """WINDOW as a tensor."""
    return torch.tensor(WINDOW, dtype=torch.float64).to(device, dtype)


@functools.cache
def _blur_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) band matrix: the window along one axis, zero beyond the ends."""
    window = gaussian_window(torch.float64)
    half = SSIM_WINDOW // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset in range(-min(half, size - 1), min(half, size - 1) + 1):
        matrix.diagonal(offset).fill_(float(window[half + offset]))
    return matrix.to(device, dtype)


# How to blur: one 2-D convolution as published; one per axis, which is faster and rounds less; sums
# of shifted images, which a compiler fuses with all around them; or by the matrices given.
Blur = Literal["window", "axes", "shifts"] | tuple[Tensor, Tensor]


def fast_blur(image: Tensor) -> Blur:
    """The fastest way for (B, C, H, W) images without a compiler."""
    height, width = image.shape[-2:]
    if max(height, width) > MAX_MATRIX_BLUR.get(image.device.type, 0):
        return "axes"
    # Convolutions of one channel are slow to differentiate; products are not.
    return (
        _blur_matrix(height, image.dtype, image.device),
        _blur_matrix(width, image.dtype, image.device),
    )


def _blur(maps: Tensor, how: Blur) -> Tensor:
    """Gaussian window over (B, C, H, W) with zero padding."""
    batch, channels, height, width = maps.shape
    if not isinstance(how, str):
        return how[0] @ maps @ how[1]
    pad = SSIM_WINDOW // 2
    if how == "shifts":
        rows = F.pad(maps, (0, 0, pad, pad))
        maps = sum_of(w * rows[..., k : k + height, :] for k, w in enumerate(WINDOW))
        columns = F.pad(maps, (pad, pad))
        return sum_of(w * columns[..., k : k + width] for k, w in enumerate(WINDOW))
    window = gaussian_window(maps.dtype, maps.device)
    flat = maps.reshape(batch * channels, 1, height, width)
    if how == "axes":
        flat = F.conv2d(flat, window.view(1, 1, -1, 1), padding=(pad, 0))
        flat = F.conv2d(flat, window.view(1, 1, 1, -1), padding=(0, pad))
    else:
        flat = F.conv2d(flat, torch.outer(window, window)[None, None], padding=pad)
    return flat.view(batch, channels, height, width)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    return functools.reduce(torch.add, terms)


def ssim_map(image: Tensor, target: Tensor, blur: Blur = "axes") -> Tensor:
    """SSIM per pixel and channel, (B, C, H, W).

    Args:
        image: (B, C, H, W) in 0..1.
        target: likewise; gradients flow to `image` only.
        blur: how the window is applied.
    """
    channels = image.shape[1]
    target = target.detach()
    of_target = _blur(torch.cat([target, target * target], dim=1), blur)
    of_image = _blur(torch.cat([image, image * image, image * target], dim=1), blur)
    mu_y, yy = of_target.split(channels, dim=1)
    mu_x, xx, xy = of_image.split(channels, dim=1)
    mu_xx, mu_yy, mu_xy = mu_x * mu_x, mu_y * mu_y, mu_x * mu_y
    luminance = (2 * mu_xy + SSIM_C1) / (mu_xx + mu_yy + SSIM_C1)
    contrast = (2 * (xy - mu_xy) + SSIM_C2) / ((xx - mu_xx) + (yy - mu_yy) + SSIM_C2)
    return luminance * contrast


def ssim(image: Tensor, target: Tensor, blur: Blur | None = None) -> Tensor:
    """Mean SSIM over all pixels, channels and images."""
    return ssim_map(image, target, fast_blur(image) if blur is None else blur).mean()


def _safe_norm(vectors: Tensor) -> Tensor:
    """Euclidean norm over the last axis with zero gradient at zero."""
    # Faster than torch.linalg.vector_norm on short axes; 1e-24 keeps the root differentiable.
    return (vectors.square().sum(-1) + 1e-24).sqrt()


def _visible_mean(values: Tensor, visible: Tensor) -> Tensor:
    """Mean over the visible entries; 0 when there is none. No boolean indexing: that would sync."""
    weights = visible.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def position_loss(xyz: Tensor, visible: Tensor, threshold: float) -> Tensor:
    """Visible splats far from their face: mean relu(|local xyz| - threshold).

    Args:
        xyz: (N, 3) in units of the face.
        visible: (B, N).
        threshold: allowed distance.
    """
    excess = torch.relu(_safe_norm(xyz) - threshold)
    return _visible_mean(excess.expand(visible.shape), visible)


def metric_position_loss(xyz: Tensor, face_scale: Tensor, visible: Tensor, limit: float) -> Tensor:
    """As `position_loss`, per axis and in metres; face_scale (B, N, 1)."""
    excess = _safe_norm(torch.relu(xyz * face_scale - limit))
    return _visible_mean(excess, visible)


def scale_loss(scales: Tensor, visible: Tensor, threshold: float) -> Tensor:
    """Visible splats that are too large: mean norm of relu(scale - threshold).

    `scales` is (N, 3), relative to the face, or (B, N, 3) in metres.
    """
    excess = _safe_norm(torch.relu(scales - threshold))
    return _visible_mean(excess.expand(visible.shape), visible)


def laplacian_loss(deformation: Tensor) -> Tensor:
    """Smoothness of a deformation map (B, R, R, 3) in metres: squared 5-point Laplacian."""
    d = deformation / OFFSET_UNIT
    neighbours = d[:, :-2, 1:-1] + d[:, 2:, 1:-1] + d[:, 1:-1, :-2] + d[:, 1:-1, 2:]
    laplacian = 4.0 * d[:, 1:-1, 1:-1] - neighbours
    return laplacian.square().sum(-1).mean()


def relative_deformation_loss(means: Tensor, means_neutral: Tensor) -> Tensor:
    """How far expressions move splats beyond the head model: mean squared distance (units)."""
    return ((means_neutral - means) / OFFSET_UNIT).square().sum(-1).mean()


def relative_rotation_loss(rotation: Tensor, rotation_neutral: Tensor) -> Tensor:
    """How much expressions turn faces beyond the head model: mean squared angle.

    Args:
        rotation: (B, F, 3, 3) face frames.
        rotation_neutral: the same without expression offsets.
    """
    # R_neutral^T R as a sum: products of many small matrices are slow on GPUs, and do not fuse.
    relative = (rotation_neutral[..., :, :, None] * rotation[..., :, None, :]).sum(-3)
    return squared_rotation_angle(relative).mean()


def neck_loss(neck_offsets: Tensor) -> Tensor:
    """Mean length of the learned neck rotations (B, 3); zero gradient at zero."""
    return _safe_norm(neck_offsets).mean()
