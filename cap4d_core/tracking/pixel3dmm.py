"""Conversions from the output of an external tracker (Pixel3DMM) to the released fit format.

Conventions: gaze is (yaw, pitch) in radians in the tracker's camera axes; the eyes of the head
model look along -z of the tracker's head axes at rest. Images are (height, width).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from cap4d_core.geometry.rotations import minimal_rotation, so3_exp, so3_log

# Eyeballs turn no further than this; larger values are tracking errors.
MAX_EYE_ROTATION_RAD = 1.0
_SMOOTHING_FRAMES = 2.0
_MAX_REFERENCES = 100
_REFERENCE_SEED = 123
# Bins of the gaze network: bin i stands for 4 i - 180 degrees.
_BIN_WIDTH_DEG = 4.0
_FIRST_BIN_DEG = -180.0


def eye_rotation(yaw_pitch: Tensor, camera_rotation: Tensor, head_rot: Tensor) -> Tensor:
    """Eyeball rotation that makes the eyes look along a gaze direction.

    Args:
        yaw_pitch: (..., 2) gaze in the camera frame.
        camera_rotation: (..., 3, 3) world-to-camera rotation of the tracker.
        head_rot: (..., 3) head rotation vector.

    Returns:
        (..., 3) rotation vectors in the head frame, not limited.
    """
    yaw, pitch = yaw_pitch.unbind(-1)
    gaze = torch.stack([yaw.sin() * pitch.cos(), -pitch.sin(), yaw.cos() * pitch.cos()], dim=-1)
    world = camera_rotation.transpose(-1, -2) @ gaze.unsqueeze(-1)
    in_head = (so3_exp(head_rot).transpose(-1, -2) @ world).squeeze(-1)
    ahead = torch.zeros_like(in_head)
    ahead[..., 2] = -1.0
    return so3_log(minimal_rotation(ahead, in_head))


def limit_eye_rotation(rotvec: Tensor) -> Tensor:
    """(..., 3) rotation vectors shortened to at most 1 rad."""
    norm = rotvec.norm(dim=-1, keepdim=True)
    return rotvec * (MAX_EYE_ROTATION_RAD / norm.clamp(min=MAX_EYE_ROTATION_RAD))


def smooth_over_time(values: NDArray[Any]) -> NDArray[Any]:
    """Gaussian filter of 2 frames over the first axis, mirrored at both ends (videos only)."""
    smoothed: NDArray[Any] = gaussian_filter1d(
        values, _SMOOTHING_FRAMES, axis=0, mode="reflect", truncate=4.0
    )
    return smoothed


def uncrop_intrinsics(
    intrinsics: NDArray[Any], track_size: tuple[int, int], box: tuple[int, int, int, int]
) -> NDArray[Any]:
    """Camera matrix of the tracker's resampled crop, in pixels of the original picture.

    Args:
        intrinsics: (3, 3) in the tracker's picture.
        track_size: (height, width) of that picture.
        box: (x0, y0, x1, y1) that was cropped from the original.

    Returns:
        (3, 3).
    """
    x0, y0, x1, y1 = box
    height, width = track_size
    result = np.array(intrinsics, copy=True)
    result[0] *= (x1 - x0) / width
    result[1] *= (y1 - y0) / height
    result[0, 2] += x0
    result[1, 2] += y0
    return result


def select_references(num_frames: int) -> NDArray[np.int64]:
    """At most 100 frames of a sequence, drawn with a fixed seed, in ascending order."""
    drawn = np.random.RandomState(_REFERENCE_SEED).permutation(num_frames)[:_MAX_REFERENCES]
    return np.sort(drawn).astype(np.int64)


def gaze_from_logits(yaw_logits: Tensor, pitch_logits: Tensor) -> Tensor:
    """Expected gaze angles of a network that classifies them into bins.

    Args:
        yaw_logits: (..., bins).
        pitch_logits: (..., bins).

    Returns:
        (..., 2) yaw and pitch in radians.
    """
    logits = torch.stack([yaw_logits, pitch_logits], dim=-2)
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    degrees = (logits.softmax(-1) * (bins * _BIN_WIDTH_DEG + _FIRST_BIN_DEG)).sum(-1)
    return torch.deg2rad(degrees)


def shrink_to(images: Tensor, max_side: int) -> tuple[Tensor, float]:
    """Nearest-neighbour reduction of (N, C, H, W) to a longer side of at most `max_side`.

    Returns:
        The images and the factor applied (1 when they are small enough).
    """
    longest = max(images.shape[-2:])
    if longest <= max_side:
        return images, 1.0
    factor = max_side / longest
    size = [int(side * factor) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(images, size=size, mode="nearest"), factor
