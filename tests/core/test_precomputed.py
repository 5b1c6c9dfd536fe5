"""Import of ready fits: what is written, what is refused, the figures."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cap4d_core.errors import InputFileError
from cap4d_core.files.tracking import (
    read_fit,
    read_tracked_subject,
    read_trajectory,
    write_fit,
    write_trajectory,
)
from cap4d_core.geometry.cameras import pivot_camera
from cap4d_core.progress import Progress
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.precomputed import import_driving, import_subject
from cap4d_core.tracking.quality import head_angles
from tests.core.synthetic_head import head_folder, head_source

SETTINGS = TrackingSettings()


def _subject() -> Path:
    return head_source() / "examples/input/subject"


def _driving() -> Path:
    return head_source() / "examples/input/animation/sequence_00"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the subject to spoil."""
    folder = tmp_path / "subject"
    shutil.copytree(_subject(), folder)
    return folder


def test_imported_subject_is_the_same_subject(tmp_path: Path) -> None:
    seen: list[Progress] = []
    import_subject(_subject(), tmp_path / "out", SETTINGS, head_folder(), seen.append)
    source, result = read_tracked_subject(_subject()), read_tracked_subject(tmp_path / "out")
    assert len(result.references) == len(source.references) == seen[-1].total == seen[-1].done
    for name in ("shape", "expr", "rot", "tra", "eye_rot", "extr", "fx", "resolutions"):
        assert np.array_equal(getattr(result.tracking, name), getattr(source.tracking, name))
    for ours, theirs in zip(result.references, source.references, strict=True):
        assert ours.image.read_bytes() == theirs.image.read_bytes()
        assert ours.matte is not None and theirs.matte is not None
        assert ours.matte.read_bytes() == theirs.matte.read_bytes()
    quality = json.loads((tmp_path / "out/quality.json").read_text())["references"]
    # The pictures show this head in these poses, so mesh and matte coincide.
    assert all(entry["mesh_in_matte"] > 0.95 for entry in quality)
    assert [entry["flags"] for entry in quality] == [[]] * 4
    assert Image.open(tmp_path / "out/overlay.png").size[0] > 400
    # A second import replaces the first one's pictures.
    (tmp_path / "out/images/cam0/zzz.png").write_bytes(b"stale")
    import_subject(_subject(), tmp_path / "out", SETTINGS, head_folder())
    assert not (tmp_path / "out/images/cam0/zzz.png").exists()


def test_foreign_basis_keeps_pose_and_blink_only(tmp_path: Path) -> None:
    settings = TrackingSettings(foreign_basis=True)
    import_subject(_subject(), tmp_path, settings, head_folder())
    source, result = read_fit(_subject() / "fit.npz"), read_fit(tmp_path / "fit.npz")
    assert (result.shape == 0).all() and (result.expr[:, :-1] == 0).all()
    assert np.array_equal(result.expr[:, -1], source.expr[:, -1])
    assert np.array_equal(result.rot, source.rot)


def _edit_fit(folder: Path, **changes: np.ndarray) -> None:
    write_fit(folder / "fit.npz", replace(read_fit(folder / "fit.npz"), **changes))


def _image(folder: Path, kind: str = "images") -> Path:
    return sorted((folder / kind / "cam0").iterdir())[1]


def _resize(folder: Path, kind: str) -> None:
    Image.open(_image(folder, kind)).resize((100, 100)).save(_image(folder, kind))


def _truncate(folder: Path) -> None:
    _image(folder).write_bytes(_image(folder).read_bytes()[:300])


def _empty_matte(folder: Path) -> None:
    Image.new("L", (192, 256)).save(_image(folder, "bg"))


def _behind(folder: Path) -> None:
    _edit_fit(folder, tra=-read_fit(folder / "fit.npz").tra)


def _outside(folder: Path) -> None:
    _edit_fit(folder, cx=np.full((1, 1), 5000.0, np.float32))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: _resize(f, "images"), r"100 x 100.*256 x 192.*resolutions"),
        (lambda f: _resize(f, "bg"), "matte of 100 x 100"),
        (_truncate, "no readable image"),
        (_empty_matte, "empty matte"),
        (_behind, "not in front of the camera"),
        (_outside, "outside the picture"),
        (lambda f: (f / "fit.npz").unlink(), r"fit\.npz"),
    ],
)
def test_what_cannot_be_is_refused(
    broken: Path, tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    spoil(broken)
    with pytest.raises(InputFileError, match=expected):
        import_subject(broken, tmp_path / "out", SETTINGS, head_folder())
    assert not (tmp_path / "out/quality.json").exists()


def test_inverted_matte_and_missing_mattes_are_warnings(
    broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (broken / "bg/cam0").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file).convert("L"))).save(file)
    with caplog.at_level(logging.WARNING):
        import_subject(broken, tmp_path / "out", SETTINGS, head_folder())
    assert "inverted" in caplog.text
    shutil.rmtree(broken / "bg")
    with caplog.at_level(logging.WARNING):
        import_subject(broken, tmp_path / "out", SETTINGS, head_folder())
    assert "no mattes" in caplog.text
    assert not (tmp_path / "out/bg").exists()


def test_head_angles_follow_the_camera() -> None:
    fit = read_fit(_subject() / "fit.npz")
    facing = replace(fit, rot=np.zeros((4, 3), np.float32), tra=np.tile([[0, 0, -1.0]], (4, 1)))
    assert head_angles(facing, 0, 0) == pytest.approx((0, 0), abs=1e-6)
    # +x is to the right of the picture; a positive turn about y takes the nose there.
    turned = replace(facing, rot=np.tile([[0, 0.5, 0]], (4, 1)))
    assert head_angles(turned, 0, 0) == pytest.approx((np.degrees(0.5), 0), abs=1e-6)
    up = replace(facing, rot=np.tile([[-0.3, 0, 0]], (4, 1)))
    assert head_angles(up, 0, 0) == pytest.approx((0, np.degrees(0.3)), abs=1e-6)
    # Beside the optical axis a face that looks into the camera still counts as frontal.
    aside = replace(facing, tra=np.tile([[0.5, 0, -1.0]], (4, 1)), rot=turned.rot * 0)
    assert head_angles(aside, 0, 0)[0] == pytest.approx(np.degrees(np.arctan(0.5)), abs=1e-6)
    # A camera that moved around the head sees it turned by as much.
    extr = pivot_camera(facing.extr[0], [0, 0, 1.0], 25.0, 0.0)[None]
    assert abs(head_angles(replace(facing, extr=extr), 0, 0)[0]) == pytest.approx(25.0, abs=1e-4)


def test_driving_is_cut_with_its_trajectory(tmp_path: Path) -> None:
    whole = read_fit(_driving() / "fit.npz")
    import_driving(_driving(), _driving() / "orbit.npz", tmp_path, 3, 5, SETTINGS, head_folder())
    fit = read_fit(tmp_path / "fit.npz")
    assert fit.num_frames == 5 and fit.fps == 24.0
    assert np.array_equal(fit.expr, whole.expr[3:8])
    given = read_trajectory(_driving() / "orbit.npz")
    cut = read_trajectory(tmp_path / "trajectory.npz")
    assert np.array_equal(cut.extr, given.extr[3:8]) and cut.resolution == given.resolution
    static, orbit = (read_trajectory(tmp_path / f"cam_{n}.npz") for n in ("static", "orbit"))
    assert np.allclose(static.extr, whole.extr[0]) and len(static.extr) == len(orbit.extr) == 5
    # The orbit starts 55 degrees aside and keeps the head of the first frame in its place.
    pivot = fit.tra[0] * np.array([1, -1, -1])
    seen = orbit.extr[:, :3, :3] @ pivot + orbit.extr[:, :3, 3]
    assert np.allclose(seen, seen[0], atol=1e-5)
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["num_frames"] == 5 and len(quality["yaw_deg"]) == 5
    assert quality["flags"] == []
    assert (tmp_path / "overlay.png").stat().st_size > 1000


def test_driving_without_trajectory_and_to_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        import_driving(_driving() / "fit.npz", None, tmp_path, 10, 100, SETTINGS, head_folder())
    assert "100 frames from frame 10 asked for, 6 are there" in caplog.text
    assert read_fit(tmp_path / "fit.npz").num_frames == 6
    static, given = (read_trajectory(tmp_path / n) for n in ("cam_static.npz", "trajectory.npz"))
    assert np.array_equal(static.extr, given.extr)


def test_short_trajectory_keeps_its_last_camera(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = read_trajectory(_driving() / "orbit.npz")
    short = replace(
        given, **{name: getattr(given, name)[:6] for name in ("extr", "fx", "fy", "cx", "cy")}
    )
    write_trajectory(tmp_path / "short.npz", short)
    with caplog.at_level(logging.WARNING):
        import_driving(
            _driving(), tmp_path / "short.npz", tmp_path / "o", 4, 4, SETTINGS, head_folder()
        )
    cut = read_trajectory(tmp_path / "o/trajectory.npz")
    assert np.array_equal(cut.extr, given.extr[[4, 5, 5, 5]])
    assert "the last camera is kept" in caplog.text


def test_start_beyond_the_end_is_refused_and_jumps_are_flagged(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="16 frames; expected more than 16"):
        import_driving(_driving(), None, tmp_path, 16, None, SETTINGS, head_folder())
    fit = read_fit(_driving() / "fit.npz")
    tra = fit.tra.copy()
    tra[5:] += [0.2, 0, 0]
    write_fit(tmp_path / "jump.npz", replace(fit, tra=tra))
    import_driving(tmp_path / "jump.npz", None, tmp_path / "o", 0, None, SETTINGS, head_folder())
    flags = json.loads((tmp_path / "o/quality.json").read_text())["flags"]
    assert len(flags) == 1 and "after frames 4" in flags[0]


def test_real_subjects(real_data: Path, tmp_path: Path) -> None:
    from cap4d_core.flame.assets import prepare_head_model

    head = prepare_head_model(real_data / "head_model", None, tmp_path / "head")
    import_subject(
        real_data / "felix", tmp_path / "felix", TrackingSettings(foreign_basis=True), head
    )
    quality = json.loads((tmp_path / "felix/quality.json").read_text())["references"]
    assert all(entry["mesh_in_matte"] > 0.9 and not entry["flags"] for entry in quality)
