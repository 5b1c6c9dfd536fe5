"""Image losses and regularisers of the avatar fit.

Images are (B, 3, H, W), linear 0..1. SSIM: Wang et al. 2004, with zero padding at the borders.
The regularisers are in the units of `cap4d_core.avatar.deformation.OFFSET_UNIT` where said.
"""

from __future__ import annotations

import functools

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


# Cached, because building it on every call would stop the GPU.
@functools.cache
def gaussian_window(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Normalised 1-D Gaussian (11,); its outer product is the SSIM window."""
    x = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-(x**2) / (2 * SSIM_SIGMA**2))
    return (weights / weights.sum()).to(device, dtype)


@functools.cache
def _blur_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size) band matrix: the window along one axis, zero beyond the ends."""
    window = gaussian_window(torch.float64)
    half = SSIM_WINDOW // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset in range(-min(half, size - 1), min(half, size - 1) + 1):
        matrix.diagonal(offset).fill_(float(window[half + offset]))
    return matrix.to(device, dtype)


Blur = tuple[Tensor, Tensor]


def blur_matrices(image: Tensor) -> Blur | None:
    """Window along rows and columns of (B, C, H, W) images as matrices; None where too large."""
    height, width = image.shape[-2:]
    if max(height, width) > MAX_MATRIX_BLUR.get(image.device.type, 0):
        return None
    # Convolutions of one channel are slow to differentiate; products are not.
    return (
        _blur_matrix(height, image.dtype, image.device),
        _blur_matrix(width, image.dtype, image.device),
    )


def _blur(maps: Tensor, separable: bool, matrices: Blur | None) -> Tensor:
    """Gaussian window over (B, C, H, W) with zero padding."""
    batch, channels, height, width = maps.shape
    if separable and matrices is not None:
        return matrices[0] @ maps @ matrices[1]
    window = gaussian_window(maps.dtype, maps.device)
    flat = maps.reshape(batch * channels, 1, height, width)
    pad = SSIM_WINDOW // 2
    if separable:
        flat = F.conv2d(flat, window.view(1, 1, -1, 1), padding=(pad, 0))
        flat = F.conv2d(flat, window.view(1, 1, 1, -1), padding=(0, pad))
    else:
        flat = F.conv2d(flat, torch.outer(window, window)[None, None], padding=pad)
    return flat.view(batch, channels, height, width)


def ssim_map(
    image: Tensor, target: Tensor, separable: bool = True, matrices: Blur | None = None
) -> Tensor:
    """SSIM per pixel and channel, (B, C, H, W).

    Args:
        image: (B, C, H, W) in 0..1.
        target: likewise; gradients flow to `image` only.
        separable: apply the window per axis, which is faster and rounds less; False = one 2-D
            convolution as published.
        matrices: `blur_matrices` of the images, where they are to be used.
    """
    channels = image.shape[1]
    target = target.detach()
    of_target = _blur(torch.cat([target, target * target], dim=1), separable, matrices)
    of_image = _blur(torch.cat([image, image * image, image * target], dim=1), separable, matrices)
    mu_y, yy = of_target.split(channels, dim=1)
    mu_x, xx, xy = of_image.split(channels, dim=1)
    mu_xx, mu_yy, mu_xy = mu_x * mu_x, mu_y * mu_y, mu_x * mu_y
    luminance = (2 * mu_xy + SSIM_C1) / (mu_xx + mu_yy + SSIM_C1)
    contrast = (2 * (xy - mu_xy) + SSIM_C2) / ((xx - mu_xx) + (yy - mu_yy) + SSIM_C2)
    return luminance * contrast


def ssim(image: Tensor, target: Tensor, separable: bool = True) -> Tensor:
    """Mean SSIM over all pixels, channels and images."""
    return ssim_map(image, target, separable, blur_matrices(image)).mean()


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
    relative = rotation_neutral.transpose(-1, -2) @ rotation
    return squared_rotation_angle(relative).mean()


def neck_loss(neck_offsets: Tensor) -> Tensor:
    """Mean length of the learned neck rotations (B, 3); zero gradient at zero."""
    return _safe_norm(neck_offsets).mean()
