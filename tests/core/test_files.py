"""Formats on disk: round trips, atomic writing, one clear message per kind of damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import (
    atomic_path,
    read_json,
    read_npz,
    read_safetensors,
    write_json,
    write_npz,
    write_safetensors,
)
from cap4d_core.files.image_set import (
    ViewParameters,
    read_image_set,
    read_view_parameters,
    write_view_parameters,
)
from cap4d_core.files.images import read_grey, read_rgb, to_uint8, write_image
from cap4d_core.files.tracking import (
    Tracking,
    Trajectory,
    read_fit,
    read_tracked_subject,
    read_trajectory,
    write_fit,
    write_reference_list,
    write_trajectory,
)


def make_fit(frames: int = 3, cameras: int = 1) -> Tracking:
    rng = np.random.default_rng(0)
    return Tracking(
        shape=rng.normal(size=150).astype(np.float32),
        expr=rng.normal(size=(frames, 65)).astype(np.float32),
        rot=rng.normal(size=(frames, 3)).astype(np.float32),
        tra=rng.normal(size=(frames, 3)).astype(np.float32),
        eye_rot=rng.normal(size=(frames, 3)).astype(np.float32),
        neck_rot=np.zeros((frames, 3), np.float32),
        fx=np.full((cameras, 1), 500, np.float32),
        fy=np.full((cameras, 1), 500, np.float32),
        cx=np.full((cameras, 1), 32, np.float32),
        cy=np.full((cameras, 1), 40, np.float32),
        extr=np.tile(np.eye(4, dtype=np.float32), (cameras, 1, 1)),
        resolutions=np.tile(np.array([80, 64]), (cameras, 1)),
        camera_order=tuple(f"cam{i}" for i in range(cameras)),
        fps=24.0,
    )


def make_subject(folder: Path, frames: int = 3) -> Path:
    write_fit(folder / "fit.npz", make_fit(frames))
    for t in range(frames):
        write_image(folder / f"images/cam0/{t:08d}.png", np.full((80, 64, 3), t, np.uint8))
        write_image(folder / f"bg/cam0/{t:04d}.png", np.full((80, 64), 255, np.uint8))
    write_reference_list(folder / "reference_images.json", [("cam0", 0), ("cam0", 2)])
    return folder


def test_fit_round_trip(tmp_path: Path) -> None:
    fit = make_fit(cameras=2)
    write_fit(tmp_path / "fit.npz", fit)
    back = read_fit(tmp_path / "fit.npz")
    for name in ("shape", "expr", "rot", "tra", "eye_rot", "fx", "extr", "resolutions"):
        np.testing.assert_array_equal(getattr(back, name), getattr(fit, name))
    assert back.camera_order == ("cam0", "cam1")
    assert back.fps == 24.0
    assert back.frames(1, 2).num_frames == 1


def test_foreign_basis_keeps_blink_pose_and_gaze() -> None:
    fit = make_fit()
    kept = fit.without_coefficients()
    assert not kept.shape.any() and not kept.expr[:, :-1].any()
    np.testing.assert_array_equal(kept.expr[:, -1], fit.expr[:, -1])
    np.testing.assert_array_equal(kept.rot, fit.rot)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expr", None, "no field 'expr'"),
        ("expr", np.zeros((3, 50)), r"'expr' of shape \(3, 50\).*\(any, 65\)"),
        ("rot", np.full((3, 3), np.nan), "'rot' with NaN"),
        ("rot", np.zeros((2, 3)), r"'rot' of shape \(2, 3\)"),
        ("fx", np.zeros((1, 1)), "'fx' <= 0"),
        ("extr", np.zeros((1, 4, 4)), "'extr' that is no rotation"),
        ("camera_order", np.array(["a", "b"]), "2 names"),
        ("resolutions", np.array([[0, 5]]), "'resolutions'"),
    ],
)
def test_wrong_fit_field_is_named(
    tmp_path: Path, field: str, value: np.ndarray | None, message: str
) -> None:
    path = tmp_path / "fit.npz"
    write_fit(path, make_fit())
    arrays = read_npz(path)
    if value is None:
        del arrays[field]
    else:
        arrays[field] = value
    write_npz(path, arrays)
    with pytest.raises(InputFileError, match=message):
        read_fit(path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "fit.npz", expr=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputFileError, match="unreadable archive"):
        read_fit(tmp_path / "fit.npz")


def test_truncated_npz(tmp_path: Path) -> None:
    path = tmp_path / "fit.npz"
    write_fit(path, make_fit())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputFileError, match="unreadable archive"):
        read_fit(path)


def test_tracked_subject(tmp_path: Path) -> None:
    subject = read_tracked_subject(make_subject(tmp_path / "ana"))
    assert [r.timestep for r in subject.references] == [0, 2]
    assert subject.references[1].image.name == "00000002.png"
    assert subject.references[1].matte is not None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([["cam1", 0]], "camera 'cam1'.*one of cam0"),
        ([["cam0", 3]], "timestep 3.*0 to 2"),
        ([["cam0"]], "entry 0"),
        ([], "empty"),
    ],
)
def test_wrong_reference_list(tmp_path: Path, entries: list[object], message: str) -> None:
    folder = make_subject(tmp_path / "ana")
    write_json(folder / "reference_images.json", entries)
    with pytest.raises(InputFileError, match=message):
        read_tracked_subject(folder)


def test_missing_image_says_how_many(tmp_path: Path) -> None:
    folder = make_subject(tmp_path / "ana")
    (folder / "images/cam0/00000002.png").unlink()
    with pytest.raises(InputFileError, match=r"2 images.*at least 3"):
        read_tracked_subject(folder)


def test_trajectory_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "orbit.npz"
    extr = np.tile(np.eye(4, dtype=np.float32), (4, 1, 1))
    ones = np.ones(4, np.float32)
    write_trajectory(path, Trajectory(extr, ones, ones, ones, ones, (512, 256), 30.0))
    back = read_trajectory(path)
    assert back.resolution == (512, 256) and back.fps == 30.0 and back.fx.shape == (4,)


def test_image_set_round_trip(tmp_path: Path) -> None:
    view = ViewParameters(
        shape=np.ones(150, np.float32),
        expr=np.ones(65, np.float32),
        rot=np.ones(3, np.float32),
        tra=np.ones(3, np.float32),
        eye_rot=np.ones(3, np.float32),
        fx=10.0,
        fy=11.0,
        cx=1.0,
        cy=2.0,
        extr=np.eye(4),
        resolution=(80, 64),
        crop_box=(-3, 0, 61, 64),
        timestep_id=7,
    )
    write_view_parameters(tmp_path / "flame/00000.npz", view)
    write_image(tmp_path / "images/00000.png", np.zeros((64, 64, 3), np.uint8))
    (item,) = read_image_set(tmp_path)
    assert item.parameters.crop_box == view.crop_box
    assert item.parameters.timestep_id == 7
    assert item.parameters.resolution == (80, 64)
    assert item.matte is None
    (tmp_path / "images/00001.png").write_bytes(b"x")
    with pytest.raises(InputFileError, match="2 images and 1 parameter"):
        read_image_set(tmp_path)
    write_npz(tmp_path / "flame/00000.npz", {"extr": np.eye(4)[None]})
    with pytest.raises(InputFileError, match="no field 'crop_box'"):
        read_view_parameters(tmp_path / "flame/00000.npz")


def test_images(tmp_path: Path) -> None:
    rgba = np.zeros((4, 5, 4), np.uint8)
    rgba[:, :2, 3] = 255
    write_image(tmp_path / "a.png", rgba)
    image = read_rgb(tmp_path / "a.png")
    assert image[0, 0].tolist() == [0, 0, 0] and image[0, 4].tolist() == [255, 255, 255]
    assert read_grey(tmp_path / "a.png").shape == (4, 5)
    assert to_uint8(np.array([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").shape == (8, 4, 3)


@pytest.mark.parametrize("content", [b"no image at all", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_corrupt_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputFileError, match="no readable image"):
        read_rgb(tmp_path / "a.png")


def test_atomic_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_invalid_json_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1,}')
    with pytest.raises(InputFileError, match="line 1"):
        read_json(tmp_path / "a.json")


def test_tensors_of_all_types_survive(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    small = (torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(6).reshape(2, 3).t().to(kind) for kind in kinds + small}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    again, _ = read_safetensors(tmp_path / "a.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_equal_tensors_have_equal_bytes(tmp_path: Path) -> None:
    tensors = {"latents": torch.arange(6.0).reshape(2, 3), "ids": torch.arange(2)}
    metadata = {"step": "3", "größe": 'a "b"\n', "fingerprint": "ff", "a": "", "z": "{}"}
    contents = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        given = reversed(tensors.items()) if number % 2 else tensors.items()
        write_safetensors(path, dict(given), dict(reversed(metadata.items())))
        contents.add(path.read_bytes())
        again, read = read_safetensors(path)
        assert read == metadata and torch.equal(again["latents"], tensors["latents"])
    assert len(contents) == 1
