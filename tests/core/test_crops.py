"""Crop boxes, cutting, resampling, crop cameras."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from cap4d_core.geometry.crops import (
    box_inside_share,
    crop,
    crop_box_from_points,
    crop_intrinsics,
    crop_mask,
    pixels_to_ndc,
    resize,
)


def test_box_truncates_towards_zero_and_grows_by_a_fifth() -> None:
    box = crop_box_from_points(np.array([[-3.9, 10.2, 7.0], [97.9, 30.0, 7.0]]))
    # Truncated: x -3..97, y 10..30; centre (47, 20), half = int(50 * 1.2) = 60.
    assert box == (-13, -40, 107, 80)
    with pytest.raises(ValueError, match="NaN"):
        crop_box_from_points(np.array([[np.nan, 0.0]]))


@pytest.mark.parametrize("box", [(2, 3, 7, 8), (-4, -5, 6, 5), (5, 4, 25, 24), (30, 30, 34, 34)])
def test_crop_agrees_with_padding(box: tuple[int, int, int, int]) -> None:
    image = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)
    padded = np.pad(image, ((50, 50), (50, 50), (0, 0)), constant_values=7)
    x0, y0, x1, y1 = (edge + 50 for edge in box)
    result = crop(image, box, 7)
    assert result.dtype == np.uint8
    assert np.array_equal(result, padded[y0:y1, x0:x1])


def test_resize_uses_areas_when_shrinking_else_linear() -> None:
    image = np.random.default_rng(0).random((30, 30, 3)).astype(np.float32)
    assert np.array_equal(
        resize(image, 12), cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA)
    )
    assert np.array_equal(
        resize(image, 45), cv2.resize(image, (45, 45), interpolation=cv2.INTER_LINEAR)
    )
    assert np.array_equal(resize(image, 30), image)
    # A whole-number ratio is the plain block mean.
    blocks = image.reshape(10, 3, 10, 3, 3).mean(axis=(1, 3))
    assert np.allclose(resize(image, 10), blocks, atol=1e-6)
    for size in (10, 30, 60):
        assert resize(image[..., :1], size).shape == (size, size)


def test_crop_camera_projects_to_the_resampled_crop() -> None:
    fx, fy, cx, cy = crop_intrinsics(800.0, 810.0, 300.0, 200.0, (100, 50, 300, 250), 512)
    x, y = 0.1, -0.05
    u, v = 800 * x + 300, 810 * y + 200
    assert fx * x + cx == pytest.approx((u - 100) * 2.56)
    assert fy * y + cy == pytest.approx((v - 50) * 2.56)


def test_mask_covers_what_lies_inside_the_image() -> None:
    mask = crop_mask((100, 100), (-50, 0, 50, 100), 20)
    assert not mask[:, :10].any() and mask[:, 10:].all()
    assert box_inside_share((-50, 0, 50, 100), (100, 100)) == 0.5
    # A pixel that is covered in part counts as inside.
    assert crop_mask((100, 100), (-5, 0, 95, 100), 10)[:, 0].all()


def test_ndc_of_box_edges() -> None:
    corners = torch.tensor([[10.0, 20.0, 5.0], [50.0, 60.0, 6.0]])
    assert pixels_to_ndc(corners, (10, 20, 50, 60)).tolist() == [[1, 1, 5], [-1, -1, 6]]
