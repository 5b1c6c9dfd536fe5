"""Rendering a driven avatar into files."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cap4d_core.animation.driver import animate
from cap4d_core.animation.pixels import (
    depth_to_millimetres,
    over_background,
    straight_rgba,
    to_bytes,
)
from cap4d_core.animation.ply import iterate_ply, read_animation_ply
from cap4d_core.animation.video import AudioTrack, probe_video, read_frames
from cap4d_core.errors import DivergedError
from cap4d_core.files.images import read_rgb
from cap4d_core.progress import Progress
from cap4d_core.settings import AnimationSettings
from tests.core.test_video import _tone
from tests.core.toy_avatar import RESOLUTION, ToyAvatar, toy_driving

HEAD = torch.nn.Module()  # the toy poses without one


def _animate(folder: Path, frames: int = 5, avatar: Any = None, **settings: Any) -> dict[str, Any]:
    return animate(
        avatar or ToyAvatar(),
        HEAD,  # type: ignore[arg-type]
        (toy_driving(frames), None),
        AnimationSettings(**{"frame_batch": 2, **settings}),
        folder,
    )


def test_all_outputs_of_one_run_agree(tmp_path: Path) -> None:
    seen: list[Progress] = []
    avatar = ToyAvatar()
    result = animate(
        avatar,  # type: ignore[arg-type]
        HEAD,  # type: ignore[arg-type]
        (toy_driving(), None),
        AnimationSettings(
            png_frames=True, depth=True, transparent=True, frame_batch=2, crf=0,
            background=(0.2, 0.4, 0.6),
        ),
        tmp_path,
        seen.append,
    )  # fmt: skip
    assert [(p.done, p.total) for p in seen] == [(2, 5), (4, 5), (5, 5)]
    assert sorted(result["files"]) == sorted(
        file.name for file in tmp_path.iterdir() if file.name != "animation.json"
    )
    info = probe_video(tmp_path / "renders.mp4")
    assert (info.num_frames, info.width, info.height, info.rate) == (5, 40, 48, 25)
    assert "Synthetic media" in info.comment

    pictures = [read_rgb(tmp_path / "frames" / f"{i:05d}.png") for i in range(5)]
    for frame, picture in zip(read_frames(tmp_path / "renders.mp4"), pictures, strict=True):
        # Lossless luma; halved chroma resolution blurs colour at splat edges.
        assert np.abs(frame.astype(int) - picture).mean() < 4
    assert np.abs(pictures[0].astype(int) - pictures[4]).max() > 50  # it moves
    assert (pictures[0][0, 0] == [51, 102, 153]).all()  # corner = background

    for frame, picture in zip(read_frames(tmp_path / "renders.mov", "rgba"), pictures, strict=True):
        colour, alpha = frame[..., :3] / 255.0, frame[..., 3:] / 255.0
        again = colour * alpha + (1 - alpha) * [0.2, 0.4, 0.6]
        # Straight alpha composited over the background gives the opaque picture back; ProRes
        # rings where colours jump at the outline.
        assert np.abs(again * 255 - picture).mean() < 2

    depth = np.asarray(Image.open(tmp_path / "depth" / "00000.png"))
    assert depth.dtype == np.uint16
    assert depth[0, 0] == 0
    assert abs(int(depth[24, 20]) - 480) <= 4  # 50 cm away, bulging by 2 cm


def test_exported_animation_holds_the_posed_vertices(tmp_path: Path) -> None:
    avatar, driving = ToyAvatar(), toy_driving()
    _animate(tmp_path, avatar=avatar)
    animation = read_animation_ply(tmp_path / "exported_animation.ply")
    posed = avatar.pose(torch.from_numpy(driving.expr), torch.from_numpy(driving.eye_rot))
    used = avatar.grid_faces.unique()
    np.testing.assert_allclose(
        animation.vertices[:, used], posed.vertices[:, used].numpy(), atol=1e-8
    )
    assert animation.vertices.shape == (5, RESOLUTION**2, 3)
    np.testing.assert_array_equal(animation.faces, avatar.grid_faces.numpy())
    np.testing.assert_array_equal(
        animation.splats.features_rest, avatar.splats.f_rest.detach().numpy()
    )
    np.testing.assert_array_equal(animation.splats.binding, avatar.binding.numpy())


def test_splats_of_the_first_frame_are_in_the_world(tmp_path: Path) -> None:
    avatar, driving = ToyAvatar(), toy_driving()
    _animate(tmp_path, avatar=avatar)
    rows = dict(iterate_ply(tmp_path / "avatar_frame0.ply"))["vertex"]
    posed = avatar.pose(torch.from_numpy(driving.expr[:1]), torch.zeros(1, 3))
    np.testing.assert_allclose(rows["y"], posed.means[0, :, 1].detach(), atol=1e-7)
    np.testing.assert_allclose(np.exp(rows["scale_0"]), posed.scales[0, :, 0].detach(), rtol=1e-6)


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_runs_are_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _animate(tmp_path / name, png_frames=True, transparent=True)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_a_shorter_run_leaves_no_frames_of_a_longer_one(tmp_path: Path) -> None:
    _animate(tmp_path, 5, png_frames=True, depth=True, transparent=True)
    _animate(tmp_path, 3, png_frames=True)
    assert len(list((tmp_path / "frames").iterdir())) == 3
    assert not (tmp_path / "depth").exists()
    assert not (tmp_path / "renders.mov").exists()
    assert probe_video(tmp_path / "renders.mp4").num_frames == 3


def test_only_the_video_when_nothing_else_is_wanted(tmp_path: Path) -> None:
    _animate(tmp_path, export_ply=False, export_splats=False)
    assert {f.name for f in tmp_path.iterdir()} == {"renders.mp4", "animation.json"}


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    for batch in (1, 5):
        _animate(tmp_path / str(batch), png_frames=True, export_ply=False, frame_batch=batch)
    for i in range(5):
        name = f"frames/{i:05d}.png"
        ones, fives = (read_rgb(tmp_path / b / name).astype(int) for b in ("1", "5"))
        assert np.abs(ones - fives).max() <= 1


def test_sound_needs_the_rate_of_its_video(tmp_path: Path) -> None:
    sound = AudioTrack(_tone(tmp_path / "tone.wav", 1.0))
    driving = (toy_driving(), None)
    for fps, expected in ((None, True), (50.0, False)):
        folder = tmp_path / str(fps)
        settings = AnimationSettings(fps=fps, export_ply=False)
        animate(ToyAvatar(), HEAD, driving, settings, folder, audio=sound)  # type: ignore[arg-type]
        assert probe_video(folder / "renders.mp4").has_audio == expected


def test_nan_is_reported_and_leaves_no_video(tmp_path: Path) -> None:
    driving = toy_driving()
    avatar = ToyAvatar()
    with torch.no_grad():
        avatar.splats.f_dc[3] = float("nan")
    with pytest.raises(DivergedError, match="NaN between frames 0 and 1"):
        animate(
            avatar,  # type: ignore[arg-type]
            HEAD,  # type: ignore[arg-type]
            (replace(driving), None),
            AnimationSettings(frame_batch=2),
            tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


def test_bytes_round_half_up_and_clip() -> None:
    values = torch.tensor([-0.3, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.7])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_depth_is_rounded_and_clipped() -> None:
    depth = torch.tensor([0.0, 1.6226, 1.6224, 70.0, -1.0])
    assert depth_to_millimetres(depth).tolist() == [0, 1623, 1622, 65535, 0]
    assert depth_to_millimetres(depth[1:2], parity=True).tolist() == [1622]


def test_straight_colour_does_not_know_the_background() -> None:
    alpha = torch.tensor([[1.0], [0.5], [0.0]])
    colour = torch.tensor([0.8, 0.4, 0.2])
    rgba = straight_rgba(colour * alpha, alpha)
    assert rgba[0].tolist() == [204, 102, 51, 255]
    assert rgba[1].tolist() == [204, 102, 51, 128]
    assert rgba[2].tolist() == [0, 0, 0, 0]
    over = over_background(colour * alpha, alpha, torch.ones(3))
    torch.testing.assert_close(over[1], colour / 2 + 0.5)
