"""Portrait mattes: which pixels belong to the person.

A small segmentation network gives a coarse matte; a guided filter (He et al. 2013) then moves its
edge to that of the picture. The network sees the whole picture and, when the head fills only a part
of it, an enlarged part around the head as well.

Conventions: pictures (H, W, 3) uint8 RGB; mattes (H, W) float32 in 0..1, or uint8 with 255 =
foreground in files.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.tracking.face_models import load_face_model

Floats = NDArray[np.float32]

# The part around the head that is looked at closely, relative to the face box.
_CLOSE_UP = 3.2
# Guided filter: window relative to the picture, and how faint an edge may be (variance of 0..1).
_WINDOW, _EDGE_VARIANCE = 0.012, 1e-4
# The matte is sharpened between these values after filtering.
_LOW, _HIGH = 0.10, 0.90


class PortraitMatting:
    """Separates a person from the background."""

    def __init__(
        self, device: str | torch.device = "cpu", networks: str | Path | None = None
    ) -> None:
        self.device = torch.device(device)
        self._network = load_face_model("selfie_segmentation", device, networks)

    def matte(
        self, image: NDArray[np.uint8], face: tuple[float, float, float, float] | None = None
    ) -> NDArray[np.uint8]:
        """Matte of one picture.

        Args:
            image: the picture.
            face: box (x0, y0, x1, y1) of the face, to look at its surroundings closely.

        Returns:
            (H, W) with 255 = foreground.
        """
        height, width = image.shape[:2]
        coarse = self._segment(image)
        if face is not None:
            box = _close_up(face, (height, width))
            x0, y0, x1, y1 = box
            if (x1 - x0) * (y1 - y0) < 0.7 * height * width:
                near = self._segment(np.ascontiguousarray(image[y0:y1, x0:x1]))
                blend = _feather((y1 - y0, x1 - x0), box, (height, width))
                inside = coarse[y0:y1, x0:x1]
                coarse[y0:y1, x0:x1] = inside + blend * (near - inside)
        refined = guided_filter(
            image.astype(np.float32) / 255.0,
            coarse,
            max(2, round(_WINDOW * max(height, width))),
            _EDGE_VARIANCE,
        )
        matte = np.clip((refined - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
        return np.rint(matte * 255.0).astype(np.uint8)

    def _segment(self, image: NDArray[np.uint8]) -> Floats:
        height, width = image.shape[:2]
        rows, columns = self._network.input_size
        method = cv2.INTER_AREA if height > rows else cv2.INTER_LINEAR
        small = cv2.resize(image, (columns, rows), interpolation=method)
        batch = torch.from_numpy(np.ascontiguousarray(small)).to(self.device).float()[None] / 255.0
        (output,) = self._network(batch).values()
        probability = _person(output[0]).cpu().numpy()
        large = cv2.resize(probability, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(large, np.float32)


def _person(output: torch.Tensor) -> torch.Tensor:
    """(H, W) probability of a person: the one channel, or what is not the first of several classes.

    Args:
        output: (H, W, classes), probabilities, or logits of several classes.
    """
    if output.shape[-1] == 1:
        return output[..., 0]
    is_probability = bool(((output.sum(-1) - 1.0).abs() < 1e-2).all() and (output >= 0).all())
    classes = output if is_probability else output.softmax(-1)
    return 1.0 - classes[..., 0]


def _close_up(
    face: tuple[float, float, float, float], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Box around head and shoulders, inside the picture."""
    x0, y0, x1, y1 = face
    half = max(x1 - x0, y1 - y0) * _CLOSE_UP / 2
    center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
    height, width = image_size
    return (
        int(np.clip(center_x - half, 0, width - 2)),
        int(np.clip(center_y - half, 0, height - 2)),
        int(np.clip(center_x + half, 2, width)),
        int(np.clip(center_y + half, 2, height)),
    )


def _feather(
    size: tuple[int, int], box: tuple[int, int, int, int], image_size: tuple[int, int]
) -> Floats:
    """Weights of the close-up: 1 inside, falling to 0 at edges that lie inside the picture."""
    rows, columns = (np.arange(n, dtype=np.float32) for n in size)
    x0, y0, x1, y1 = box
    margin = 0.1 * min(size) + 1.0

    def ramp(line: Floats, low_open: bool, high_open: bool) -> Floats:
        low = line / margin if low_open else np.full_like(line, np.inf)
        high = (len(line) - 1 - line) / margin if high_open else np.full_like(line, np.inf)
        return np.clip(np.minimum(low, high), 0.0, 1.0)

    vertical = ramp(rows, y0 > 0, y1 < image_size[0])
    horizontal = ramp(columns, x0 > 0, x1 < image_size[1])
    return np.minimum(vertical[:, None], horizontal[None])


def guided_filter(guide: Floats, values: Floats, radius: int, epsilon: float) -> Floats:
    """Guided filter with a colour guide: locally, the result is linear in the guide's colours.

    Args:
        guide: (H, W, 3) in 0..1.
        values: (H, W) to be filtered.
        radius: of the square window, pixels.
        epsilon: variance of the guide below which a window counts as flat.

    Returns:
        (H, W), clipped to 0..1.
    """
    size = (2 * radius + 1, 2 * radius + 1)

    def mean(array: Floats) -> Floats:
        return np.asarray(cv2.blur(array, size, borderType=cv2.BORDER_REFLECT), np.float32)

    guide_mean, values_mean = mean(guide), mean(values)
    covariance = mean(guide * values[..., None]) - guide_mean * values_mean[..., None]
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    a, b, c, d, e, f = (
        # Grey pictures make the matrix nearly singular: single precision would lose its cofactors.
        mean(guide[..., i] * guide[..., j]).astype(np.float64)
        - guide_mean[..., i].astype(np.float64) * guide_mean[..., j]
        + (epsilon if i == j else 0.0)
        for i, j in pairs
    )
    # Inverse of the symmetric matrix [[a, b, c], [b, d, e], [c, e, f]] by cofactors.
    ca, cb, cc = d * f - e * e, c * e - b * f, b * e - c * d
    cd, ce, cf = a * f - c * c, b * c - a * e, a * d - b * b
    determinant = np.maximum(a * ca + b * cb + c * cc, 1e-30)
    x, y, z = covariance[..., 0], covariance[..., 1], covariance[..., 2]
    slope = np.asarray(
        np.stack([ca * x + cb * y + cc * z, cb * x + cd * y + ce * z, cc * x + ce * y + cf * z], -1)
        / determinant[..., None],
        np.float32,
    )
    offset = values_mean - (slope * guide_mean).sum(-1)
    result = (mean(slope) * guide).sum(-1) + mean(offset)
    return np.asarray(np.clip(result, 0.0, 1.0), np.float32)
