"""Frames that are set aside: which ones, and that nothing of them is left in what remains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.diffusion.references import crop_references
from cap4d_core.errors import InputFileError
from cap4d_core.evaluation.protocol import (
    Split,
    choose_split,
    hold_out,
    read_split,
    usable_frames,
)
from cap4d_core.files.basic import write_json
from cap4d_core.files.image_set import read_image_index, read_image_set
from cap4d_core.files.images import read_grey, read_rgb, write_image
from cap4d_core.files.tracking import (
    Tracking,
    read_tracked_subject,
    write_fit,
    write_reference_list,
)
from cap4d_core.settings import SamplingSettings
from tests.core.sampling_fixtures import world

SIDE = 60


def _color(camera: int, timestep: int) -> tuple[int, int, int]:
    """Every frame has a colour of its own."""
    return 40 + 60 * camera, 2 * timestep, 200


def _tracked(
    folder: Path,
    frames: int,
    references: list[tuple[str, int]],
    *,
    cameras: int = 1,
    fps: float | None = None,
    used: list[tuple[str, int]] | None = None,
) -> Path:
    """A tracked subject whose frames are plain colours on a head that stands still."""
    zeros = np.zeros((frames, 3), np.float32)
    extr = np.repeat(np.eye(4, dtype=np.float32)[None], cameras, 0)
    extr[:, 0, 3] = 0.02 * np.arange(cameras)
    column = np.ones((cameras, 1), np.float32)
    names = tuple(f"c{i}" for i in range(cameras))
    fit = Tracking(
        shape=np.zeros(150, np.float32), expr=np.zeros((frames, 65), np.float32), rot=zeros,
        tra=zeros + np.float32([0, 0, -1.1]), eye_rot=zeros, neck_rot=zeros,
        fx=150 * column, fy=150 * column, cx=SIDE / 2 * column, cy=SIDE / 2 * column, extr=extr,
        resolutions=np.full((cameras, 2), SIDE), camera_order=names,
        fps=fps,
    )  # fmt: skip
    write_fit(folder / "fit.npz", fit)
    write_reference_list(folder / "reference_images.json", references)
    for camera in range(cameras):
        for t in range(frames):
            picture = np.full((SIDE, SIDE, 3), _color(camera, t), np.uint8)
            write_image(folder / "images" / f"c{camera}" / f"{t:05d}.png", picture)
            matte = np.full((SIDE, SIDE), 255, np.uint8)
            write_image(folder / "bg" / f"c{camera}" / f"{t:05d}.png", matte)
    if used is not None:
        entries = [
            {"camera": f"c{c}", "timestep": t, "used": (f"c{c}", t) in used}
            for c in range(cameras)
            for t in range(frames)
        ]
        write_json(folder / "quality.json", {"frames": entries})
    return folder


def _split(folder: Path, subject: str = "ana", **changes: object) -> Split:
    options = {"protocol": "held_out_frames", "fraction": 0.25, "seed": 0, **changes}
    tracked = read_tracked_subject(folder)
    return choose_split(tracked, usable_frames(tracked), subject, **options)  # type: ignore[arg-type]


def _hold_out(folder: Path, output: Path, protocol: str, fraction: float) -> Split:
    return hold_out(
        folder, world().head_model, output, "ana", protocol=protocol, fraction=fraction, seed=0,
        resolution=32,
    )  # fmt: skip


def _shown(images: list[Path]) -> set[tuple[int, int]]:
    """(camera, timestep) of pictures, by the colour of their middle."""
    found = set()
    for image in images:
        red, green, blue = (int(v) for v in read_rgb(image)[16, 16])
        assert blue == 200
        found.add(((red - 40) // 60, green // 2))
    return found


def test_a_video_loses_one_block_and_what_is_near_it(tmp_path: Path) -> None:
    references = [("c0", t) for t in range(0, 40, 2)]
    folder = _tracked(tmp_path / "tracking", 40, references, fps=10.0)
    output = tmp_path / "hold_out"
    split = _hold_out(folder, output, "held_out_frames", 0.25)
    block = [t for _, t in split.held_out]
    assert len(block) == 10 and block == list(range(block[0], block[0] + 10))
    # Half a second is 5 frames here.
    near = range(block[0] - 5, block[-1] + 6)
    assert split.kept == tuple(pair for pair in references if pair[1] not in near)

    # What views and avatar are made from shows none of them, in pictures too.
    crop_references(output, world().head_model, tmp_path / "crops", SamplingSettings(resolution=32))
    items = read_image_index(tmp_path / "crops" / "index.json")
    assert _shown([item.image for item in items]) == {(0, t) for _, t in split.kept}
    held_out = read_image_set(output / "held_out")
    assert _shown([item.image for item in held_out]) == {(0, t) for t in block}
    assert [item.parameters.timestep_id for item in held_out] == block
    assert all(item.matte is not None and read_grey(item.matte)[16, 16] == 255 for item in held_out)
    content = json.loads((output / "split.json").read_text("utf-8"))
    assert content["num_held_out"] == 10 and content["fps"] == 10
    summary = read_split(output / "split.json")
    assert summary is not None and "held_out" not in summary and summary["seed"] == 0

    # Again, with other numbers: nothing is left of the first time.
    again = _hold_out(folder, output, "held_out_frames", 0.1)
    assert len(again.held_out) == 4 == len(read_image_set(output / "held_out"))


def test_the_draw_depends_on_seed_and_subject_only(tmp_path: Path) -> None:
    folder = _tracked(tmp_path, 40, [("c0", t) for t in range(0, 40, 2)], fps=10.0)
    splits = {_split(folder, name, seed=s) for name in ("ana", "ben", "cy") for s in range(3)}
    assert len(splits) > 4
    assert _split(folder, "ana", seed=2) == _split(folder, "ana", seed=2)


def test_photos_are_drawn_one_by_one_with_all_their_cameras(tmp_path: Path) -> None:
    references = [(f"c{c}", t) for t in range(8) for c in range(2)]
    folder = _tracked(tmp_path, 9, references, cameras=2)
    split = _split(folder)
    moments = {t for _, t in split.held_out}
    assert len(moments) == 2 and len(split.held_out) == 4
    assert set(split.held_out) | set(split.kept) == set(references)
    assert not moments & {t for _, t in split.kept}


def test_cameras_are_set_aside_whole(tmp_path: Path) -> None:
    references = [(f"c{c}", t) for t in (0, 3, 5) for c in range(4)]
    folder = _tracked(tmp_path / "tracking", 6, references, cameras=4, fps=10.0)
    output = tmp_path / "hold_out"
    split = _hold_out(folder, output, "held_out_cameras", 0.5)
    apart = {camera for camera, _ in split.held_out}
    assert len(apart) == 2 and len(split.held_out) == 12  # all frames, not references alone
    assert {camera for camera, _ in split.kept} == {f"c{c}" for c in range(4)} - apart
    shown = _shown([item.image for item in read_image_set(output / "held_out")])
    assert shown == {(int(camera[1]), t) for camera in apart for t in range(6)}


def test_pictures_that_fill_gaps_are_not_measured_on(tmp_path: Path) -> None:
    used = [("c0", t) for t in range(12)] + [("c1", t) for t in range(0, 12, 2)]
    references = [("c0", 0), ("c0", 6), ("c1", 4), ("c1", 10)]
    folder = _tracked(tmp_path, 12, references, cameras=2, fps=1.0, used=used)
    assert set(usable_frames(read_tracked_subject(folder))) == set(used)
    split = _split(folder, protocol="held_out_cameras", fraction=0.5)
    assert set(split.held_out) in ({p for p in used if p[0] == c} for c in ("c0", "c1"))


def test_too_little_to_set_aside_is_said(tmp_path: Path) -> None:
    one = _tracked(tmp_path / "one", 1, [("c0", 0)])
    with pytest.raises(InputFileError, match=r"found 1 photo\(s\); expected at least 2"):
        _split(one)
    with pytest.raises(InputFileError, match=r"found 1 camera\(s\); expected at least 2 cameras"):
        _split(one, protocol="held_out_cameras")
    short = _tracked(tmp_path / "short", 8, [("c0", 4)], fps=30.0)
    with pytest.raises(InputFileError, match=r"no reference further than 0\.5 s"):
        _split(short)
    apart = _tracked(
        tmp_path / "apart", 4, [("c0", 0), ("c1", 3)], cameras=2,
        used=[("c0", 0), ("c0", 1), ("c1", 2), ("c1", 3)],
    )  # fmt: skip
    with pytest.raises(InputFileError, match="without a common moment"):
        _split(apart, protocol="held_out_cameras")
