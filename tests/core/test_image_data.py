"""Training images: cameras, masks, splits, sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.avatar.image_data import (
    ImageData,
    composite_truncated,
    load_image_data,
    split_views,
)
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.image_set import ImageSetItem, ViewParameters, read_image_set
from cap4d_core.files.images import write_image
from cap4d_core.geometry.rotations import rodrigues

DATASET = Path(__file__).parents[1] / "goldens" / "avatar" / "E_dataset"


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_image_data([DATASET / "reference_images", DATASET / "generated_images"])


def _item(folder: Path, size: int = 16, **changes: object) -> ImageSetItem:
    image = folder / f"{size}_{len(list(folder.glob('*.png')))}.png"
    write_image(image, np.full((size, size, 3), 200, np.uint8))
    extr = np.eye(4)
    extr[2, 3] = 1.0
    view = ViewParameters(
        shape=np.zeros(150, np.float32), expr=np.zeros(65, np.float32),
        rot=np.zeros(3, np.float32), tra=np.zeros(3, np.float32),
        eye_rot=np.zeros(3, np.float32), fx=100.0, fy=100.0, cx=50.0, cy=50.0, extr=extr,
        resolution=(100, 100), crop_box=(20, 20, 80, 80),
    )  # fmt: skip
    return ImageSetItem(image, replace(view, **changes))  # type: ignore[arg-type]


def test_sets_are_joined_in_order(data: ImageData) -> None:
    counts = [len(read_image_set(DATASET / n)) for n in ("reference_images", "generated_images")]
    assert len(data) == sum(counts)
    second = load_image_data([DATASET / "generated_images"])
    assert torch.equal(data.images[counts[0] :], second.images)
    assert torch.equal(data.expr[counts[0] :], second.expr)


def test_moving_the_camera_equals_moving_the_head(data: ImageData) -> None:
    """A head-fixed point projects to the same pixel as the posed point in the original photo."""
    item = read_image_set(DATASET / "reference_images")[1]
    p = item.parameters
    flip = np.array([1.0, -1.0, -1.0])
    point = np.array([0.03, -0.02, 0.08])
    rotation = rodrigues(torch.tensor(p.rot, dtype=torch.float64)).numpy()
    posed = rotation @ point + p.tra
    camera = p.extr[:3, :3] @ (flip * posed) + p.extr[:3, 3]
    photo = np.array([camera[0] / camera[2] * p.fx + p.cx, camera[1] / camera[2] * p.fy + p.cy])
    scale = data.size[1] / (p.crop_box[2] - p.crop_box[0])
    expected = (photo - np.array(p.crop_box[:2])) * scale

    ours = data.world_to_camera[1].double().numpy()
    moved = ours[:3, :3] @ (flip * point) + ours[:3, 3]
    projected = data.intrinsics[1].double().numpy() @ moved
    # Float32 cameras: 1e-7 relative of about 100 px.
    assert np.allclose(projected[:2] / projected[2], expected, atol=1e-3)


def test_mask_is_the_part_inside_the_photo(tmp_path: Path) -> None:
    item = _item(tmp_path, size=60, crop_box=(-30, 50, 30, 110))
    mask = load_image_data([[item]]).mask(torch.tensor([0]))[0]
    expected = torch.zeros(60, 60, dtype=torch.bool)
    expected[:50, 30:] = True
    assert torch.equal(mask, expected)


def test_batches_are_floats_of_the_bytes(data: ImageData) -> None:
    rows = torch.tensor([3, 0, 3])
    batch = data.batch(rows)
    assert batch.image.shape == (3, 3, *data.size)
    assert torch.equal((batch.image * 255).round().byte(), data.images[rows].permute(0, 3, 1, 2))
    assert torch.equal(batch.mask[:, 0], data.mask(rows))
    assert torch.equal(batch.world_to_camera[1], data.world_to_camera[0])


def test_mixed_sizes_are_resampled_to_the_most_frequent(tmp_path: Path) -> None:
    items = [_item(tmp_path, 16), _item(tmp_path, 32), _item(tmp_path, 16)]
    data = load_image_data([items])
    assert data.size == (16, 16)
    # The focal length belongs to the resampled crop, whatever the file's own size.
    assert torch.allclose(data.intrinsics[1], data.intrinsics[0])
    assert (data.images == 200).all()


def test_fingerprint_sees_every_change(data: ImageData) -> None:
    copy = replace(data, images=data.images.clone())
    assert copy.fingerprint() == data.fingerprint()
    copy.images[0, 0, 0, 0] ^= 1
    assert copy.fingerprint() != data.fingerprint()
    turned = replace(data, eye_rot=data.eye_rot + 1e-3)
    assert turned.fingerprint() != data.fingerprint()


def test_split() -> None:
    assert split_views(9).held_out == [] and len(split_views(9).train) == 9
    assert split_views(64).held_out == list(range(58, 64))
    assert len(split_views(844).held_out) == 10
    # As published: one is always held out.
    assert split_views(9, parity=True).held_out == [8]
    assert split_views(9, parity=True).validation == [0]
    for n in (1, 5, 30, 200):
        split = split_views(n)
        assert sorted(split.train + split.held_out) == list(range(n))


def test_parity_compositing_truncates() -> None:
    rgba = np.array([[[100, 200, 50, 128], [7, 8, 9, 255]]], np.uint8)
    result = composite_truncated(rgba)
    expected = np.floor(rgba[0, 0, :3] * (128 / 255) + 255 * (1 - 128 / 255) + 1e-9)
    assert result[0, 0].tolist() == expected.tolist()
    assert result[0, 1].tolist() == [7, 8, 9]


def test_unusable_images_are_explained(tmp_path: Path) -> None:
    item = _item(tmp_path)
    write_image(tmp_path / "wide.png", np.zeros((8, 12, 3), np.uint8))
    with pytest.raises(InputFileError, match="square"):
        load_image_data([[replace(item, image=tmp_path / "wide.png")]])
    with pytest.raises(UserError, match="at least one"):
        load_image_data([[]])
