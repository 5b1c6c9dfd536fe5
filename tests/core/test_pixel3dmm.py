"""Conversions of the external tracker's output."""

from __future__ import annotations

import numpy as np
import torch

from cap4d_core.geometry.rotations import so3_exp
from cap4d_core.tracking.pixel3dmm import (
    eye_rotation,
    gaze_from_logits,
    limit_eye_rotation,
    select_references,
    shrink_to,
    smooth_over_time,
    uncrop_intrinsics,
)


def test_eyes_look_along_the_gaze() -> None:
    torch.manual_seed(0)
    yaw_pitch = (torch.rand(30, 2) - 0.5) * 2
    camera, head_rot = so3_exp(torch.randn(30, 3)), torch.randn(30, 3)
    rotation = so3_exp(eye_rotation(yaw_pitch, camera, head_rot))
    # Forward of the rotated eye, carried to the camera, is the gaze direction.
    seen = camera @ so3_exp(head_rot) @ rotation @ torch.tensor([0.0, 0.0, -1.0])[:, None]
    yaw, pitch = yaw_pitch.unbind(-1)
    gaze = torch.stack([yaw.sin() * pitch.cos(), -pitch.sin(), yaw.cos() * pitch.cos()], -1)
    # float32 through four matrix products
    assert torch.allclose(seen[..., 0], gaze, atol=1e-5)


def test_limit_and_smoothing() -> None:
    vectors = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.4, 0.0], [3.0, 4.0, 0.0]])
    limited = limit_eye_rotation(vectors)
    assert torch.equal(limited[:2], vectors[:2])
    assert torch.allclose(limited[2], torch.tensor([0.6, 0.8, 0.0]))
    constant = np.full((40, 3), 0.25)
    assert np.allclose(smooth_over_time(constant), constant)
    noise = np.random.default_rng(0).normal(size=(200, 3))
    assert smooth_over_time(noise).std() < 0.5 * noise.std()
    assert np.allclose(smooth_over_time(noise[::-1]), smooth_over_time(noise)[::-1])


def test_uncropped_camera_sees_the_same_point() -> None:
    k = np.array([[300.0, 0, 128], [0, 310, 120], [0, 0, 1]])
    point = np.array([0.1, -0.2, 1.0])
    track = k @ point
    original = uncrop_intrinsics(k, (256, 512), (100, 50, 356, 306)) @ point
    assert np.allclose(original[:2], track[:2] * [256 / 512, 256 / 256] + [100, 50])


def test_references_are_distinct_sorted_and_reproducible() -> None:
    for count in (1, 7, 100, 250):
        chosen = select_references(count)
        assert len(chosen) == min(count, 100) and (np.diff(chosen) > 0).all()
        assert np.array_equal(chosen, select_references(count))


def test_gaze_of_a_certain_bin_and_reduction() -> None:
    logits = torch.full((2, 90), -50.0)
    logits[0, 45] = logits[1, 50] = 50.0
    gaze = gaze_from_logits(logits, logits.flip(0))
    assert torch.allclose(torch.rad2deg(gaze), torch.tensor([[0.0, 20.0], [20.0, 0.0]]), atol=1e-3)
    image = torch.rand(1, 3, 30, 40)
    assert shrink_to(image, 40) == (image, 1.0)
    small, factor = shrink_to(image, 20)
    assert factor == 0.5 and torch.equal(small, image[..., ::2, ::2])
