"""Crops, masks, rays and projected meshes of single frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.diffusion.frames import (
    composite_over_white,
    crop_and_normalise,
    crop_mask,
    head_in_crops,
    head_in_pixels,
    ray_maps,
    read_reference_image,
    reference_views,
)
from cap4d_core.errors import InputFileError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import read_tracked_subject
from cap4d_core.geometry.cameras import pivot_camera
from tests.core.sampling_fixtures import head, template, world

SUBJECT_SIZE = (256, 192)


@pytest.fixture(scope="module")
def views() -> list[ViewParameters]:
    return reference_views(
        read_tracked_subject(world().tracking), head(), template().head_vertex_ids
    )


def test_compositing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    np.testing.assert_array_equal(composite_over_white(image, None), image)
    np.testing.assert_array_equal(composite_over_white(image, np.full((5, 6), 255)), image)
    assert (composite_over_white(image, np.zeros((5, 6))) == 255).all()
    half = composite_over_white(image, np.full((5, 6), 51))
    np.testing.assert_allclose(half, 0.2 * image + 0.8 * 255)


def test_crop_is_white_outside_and_normalised() -> None:
    image = np.zeros((20, 20, 3))
    picture = crop_and_normalise(image, (-10, 0, 10, 20), 10)
    assert picture.shape == (10, 10, 3) and picture.dtype == np.float32
    assert (picture[:, :5] == 1).all() and (picture[:, 5:] == -1).all()


def test_crop_mask_is_rounded() -> None:
    # Half of the box leaves the image; the border falls into a mask pixel.
    mask = crop_mask((100, 100), (-30, 0, 70, 100), 8)
    assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    # Left of pixel 30 of 100: 2.4 mask pixels; the third one is 0.6 covered, so it counts.
    assert mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert crop_mask((100, 100), (10, 10, 60, 60), 8).all()


def test_rays_point_from_the_camera_to_the_projected_points(views: list[ViewParameters]) -> None:
    """A vertex seen at ray position (u, v) lies along that ray."""
    view, base = views[1], views[0]
    size = 64
    rays = ray_maps([view], size, np.asarray(base.extr))[0].numpy()
    np.testing.assert_allclose(np.linalg.norm(rays, axis=0), 1, atol=1e-7)
    pixels = head_in_pixels(head(), [view])[0][0].numpy()
    shape = torch.from_numpy(np.asarray(view.shape, np.float32))
    vertices = head()(
        shape, *(torch.from_numpy(np.asarray(v, np.float32)[None]) for v in
                 (view.expr, view.rot, view.tra)),
        eye_rot=torch.from_numpy(np.asarray(view.eye_rot, np.float32)[None]),
    ).vertices[0].numpy()  # fmt: skip
    x0, y0, x1, _ = view.crop_box
    scale = size / (x1 - x0)
    u, v = ((pixels[:, :2] - [x0, y0]) * scale).T
    extr, base_extr = np.asarray(view.extr, np.float64), np.asarray(base.extr, np.float64)
    camera = (vertices * [1, -1, -1]) @ extr[:3, :3].T + extr[:3, 3]
    direction = camera @ (base_extr[:3, :3] @ extr[:3, :3].T).T
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    picked = np.random.default_rng(0).choice(len(u), 300, replace=False)
    inside = [i for i in picked if 0 <= u[i] < size - 1 and 0 <= v[i] < size - 1]
    assert len(inside) > 200
    for i in inside:
        j, k = int(u[i]), int(v[i])
        fu, fv = u[i] - j, v[i] - k
        near = (
            rays[:, k, j] * (1 - fu) * (1 - fv) + rays[:, k, j + 1] * fu * (1 - fv)
            + rays[:, k + 1, j] * (1 - fu) * fv + rays[:, k + 1, j + 1] * fu * fv
        )  # fmt: skip
        # Bilinear interpolation of nearly linear rays.
        np.testing.assert_allclose(near, direction[i], atol=1e-4)


def test_crop_coordinates_span_the_box(views: list[ViewParameters]) -> None:
    pixels, _ = head_in_pixels(head(), views[:1])
    crops, offsets = head_in_crops(head(), views[:1])
    x0, y0, x1, y1 = views[0].crop_box
    np.testing.assert_allclose(
        crops[0, :, 0], 1 - 2 * (pixels[0, :, 0] - x0) / (x1 - x0), atol=1e-5
    )
    np.testing.assert_allclose(
        crops[0, :, 1], 1 - 2 * (pixels[0, :, 1] - y0) / (y1 - y0), atol=1e-5
    )
    assert not offsets[0, -200:].any()


def test_each_view_has_its_own_camera_and_pose(views: list[ViewParameters]) -> None:
    together, _ = head_in_pixels(head(), views)
    for i, view in enumerate(views):
        alone, _ = head_in_pixels(head(), [view])
        # Batched products sum in another order; pixels are in the hundreds.
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-3)


def test_reading_a_reference(views: list[ViewParameters], tmp_path: Path) -> None:
    reference = read_tracked_subject(world().tracking).references[0]
    image = read_reference_image(reference, views[0].crop_box, 32)
    assert image.shape == (32, 32, 3)
    # Area averages of white may round up.
    assert image.min() >= -1 and image.max() <= 1 + 1e-6
    small = tmp_path / "matte.png"
    write_image(small, np.zeros((4, 4), np.uint8))
    with pytest.raises(InputFileError, match="matte of 4 x 4 pixels"):
        read_reference_image(replace(reference, matte=small), views[0].crop_box, 32)


def test_missing_matte_is_said(
    views: list[ViewParameters], caplog: pytest.LogCaptureFixture
) -> None:
    reference = read_tracked_subject(world().tracking).references[0]
    read_reference_image(replace(reference, matte=None), views[0].crop_box, 16)
    assert "background must be white" in caplog.text


def test_head_out_of_sight_is_refused(tmp_path: Path) -> None:
    subject = read_tracked_subject(world().tracking)
    far = replace(subject.tracking, fx=subject.tracking.fx * 1e-4, fy=subject.tracking.fy * 1e-4)
    with pytest.raises(InputFileError, match="does not project"):
        reference_views(replace(subject, tracking=far), head(), template().head_vertex_ids)


def test_rays_turn_with_the_camera(views: list[ViewParameters]) -> None:
    """The middle of the picture follows the camera's axis."""
    view = views[0]
    turned = replace(view, extr=pivot_camera(view.extr, np.zeros(3), 30.0, 0.0))
    rays = ray_maps([view, turned], 16, np.asarray(view.extr)).numpy()
    cosine = (rays[0] * rays[1]).sum(0)
    assert np.degrees(np.arccos(cosine)).max() == pytest.approx(30, abs=0.5)
