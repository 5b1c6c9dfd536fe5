"""The tracker from end to end on rendered faces, and what it says about bad inputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from cap4d_core.demo.capture import head_poses, make_fit
from cap4d_core.demo.family import views_of
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import make_subject
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import write_json
from cap4d_core.files.images import read_grey, read_rgb, to_uint8
from cap4d_core.files.tracking import read_fit, read_tracked_subject, read_trajectory
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import Progress
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking import fit_frames
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.detector import FaceDetector
from cap4d_core.tracking.landmarks import LandmarkNetwork
from cap4d_core.tracking.observe import FaceObserver, Observed
from cap4d_core.tracking.quality import head_angles
from cap4d_core.tracking.registration import compute_correspondence
from cap4d_core.tracking.track import track_driving, track_subject
from cap4d_core.tracking.video_input import open_recording, sample_times
from tests.core.tracker_pictures import (
    correspondence_file,
    demo_head_folder,
    demo_subject,
    frontal_picture,
    save,
)

Picture = NDArray[np.uint8]
SETTINGS = TrackingSettings()


def _track(source: Path, output: Path, settings: TrackingSettings = SETTINGS) -> dict:
    load_or_compute(demo_head_folder(), correspondence_file())
    track_subject(
        source, output, demo_head_folder(), settings, correspondence=correspondence_file()
    )
    return json.loads((output / "quality.json").read_text())


def _write_video(
    path: Path, pictures: list[Picture], times_ms: list[int] | None = None, fps: int = 20
) -> Path:
    times = times_ms or [round(1000 * i / fps) for i in range(len(pictures))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _moving(count: int) -> list[Picture]:
    picture = frontal_picture()
    height, width = picture.shape[:2]
    moved = []
    for i in range(count):
        shift = np.array([[1, 0, 2.0 * i], [0, 1, 1.0 * i]])
        moved.append(cv2.warpAffine(picture, shift, (width, height), borderValue=(255, 255, 255)))
    return moved


# --- from end to end


@pytest.mark.slow
def test_photos_become_a_tracked_subject(tmp_path: Path) -> None:
    seen: list[Progress] = []
    track_subject(
        demo_subject() / "images/cam0",
        tmp_path / "out",
        demo_head_folder(),
        SETTINGS,
        seen.append,
        correspondence=correspondence_file(),
    )
    subject = read_tracked_subject(tmp_path / "out")
    truth = read_fit(demo_subject() / "fit.npz")
    assert len(subject.references) == 4 and subject.tracking.fps is None
    assert subject.references[0].timestep == 0  # the frontal one
    for t in range(4):
        ours, theirs = head_angles(subject.tracking, t, 0), head_angles(truth, t, 0)
        # Measured on demo subjects: about 3 degrees of yaw, and up to 8 of pitch looking up.
        assert abs(ours[0] - theirs[0]) < 6 and abs(ours[1] - theirs[1]) < 10
    originals = sorted((demo_subject() / "images/cam0").iterdir())
    for reference in subject.references:
        assert reference.matte is not None
        assert np.array_equal(read_rgb(reference.image), read_rgb(originals[reference.timestep]))
        assert 0.1 < (read_grey(reference.matte) > 127).mean() < 0.9
    quality = json.loads((tmp_path / "out/quality.json").read_text())
    assert quality["num_used"] == 4 and quality["median_landmark_residual"] < 0.02
    assert all(f["mesh_in_matte"] > 0.9 for f in quality["frames"])
    assert (tmp_path / "out/overlay.png").is_file()
    assert seen[-1].done == seen[-1].total == 4


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = _moving(12)
    pictures[5] = np.full_like(pictures[0], 255)  # nobody there for a moment
    return _write_video(tmp_path_factory.mktemp("video") / "moving.mp4", pictures)


@pytest.mark.slow
def test_video_becomes_a_driving_sequence_without_gaps(video: Path, tmp_path: Path) -> None:
    track_driving(
        video, tmp_path, demo_head_folder(), SETTINGS, correspondence=correspondence_file()
    )
    fit = read_fit(tmp_path / "fit.npz")
    assert fit.num_frames == 12 and fit.fps == pytest.approx(20)
    # The head moves sideways at constant speed, through the gap too.
    steps = np.diff(fit.tra[:, 0] / -fit.tra[:, 2]) * fit.fx[0, 0]
    assert np.allclose(steps, 2.0, atol=0.8)
    for name in ("cam_static", "cam_orbit", "trajectory"):
        assert len(read_trajectory(tmp_path / f"{name}.npz").extr) == 12
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert [f["used"] for f in quality["frames"]].count(False) == 1
    assert quality["frames"][5]["left_out"] == "no face found"
    assert quality["start_s"] == 0 and quality["video_file"] == "moving.mp4"
    assert quality["median_rotation_acceleration_deg"] < 0.3
    assert quality["median_translation_acceleration_mm"] < 1.0


def test_video_becomes_a_subject_without_the_empty_frame(video: Path, tmp_path: Path) -> None:
    quality = _track(video, tmp_path / "out", TrackingSettings(max_references=3))
    subject = read_tracked_subject(tmp_path / "out")
    assert subject.tracking.num_frames == 11 and quality["num_used"] == 11
    assert 1 <= len(subject.references) <= 3
    assert len(list((tmp_path / "out/images/cam0").iterdir())) == 11
    # Row 5 of the fit is frame 6 of the video.
    assert sorted((tmp_path / "out/images/cam0").iterdir())[5].stem == "00006"


def test_photos_of_two_sizes_become_two_cameras(tmp_path: Path) -> None:
    picture = frontal_picture()
    save(tmp_path / "in/a.png", picture)
    save(tmp_path / "in/b.png", np.ascontiguousarray(picture[:300, 10:290]))
    _track(tmp_path / "in", tmp_path / "out")
    subject = read_tracked_subject(tmp_path / "out")
    fit = subject.tracking
    assert fit.camera_order == ("cam0", "cam1")
    assert fit.resolutions.tolist() == [[320, 320], [300, 280]]
    for reference in subject.references:
        size = fit.resolutions[reference.camera_index].tolist()
        assert list(read_rgb(reference.image).shape[:2]) == size


def test_exif_orientation_and_focal_length_are_used(tmp_path: Path) -> None:
    picture = frontal_picture()[:, :300]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to see it upright
    exif.get_ifd(0x8769)[0xA405] = 50
    save(tmp_path / "in/a.jpg", np.rot90(picture).copy(), exif=exif, quality=95)
    recording = open_recording(tmp_path / "in", SETTINGS)
    assert recording.cameras[0].size == picture.shape[:2]
    # 50 mm on the 43.27 mm diagonal of a small picture.
    diagonal = np.hypot(*picture.shape[:2])
    assert recording.cameras[0].focal_px == pytest.approx(50 / 43.2666 * diagonal, rel=1e-3)
    _, _, upright = next(iter(recording.cameras[0].frames()))
    assert np.abs(upright.astype(int) - picture).mean() < 5  # JPEG


def test_rotation_stored_in_a_video_is_applied(tmp_path: Path) -> None:
    pictures = [np.ascontiguousarray(p[:, :256]) for p in _moving(3)]
    lying = _write_video(tmp_path / "lying.mp4", [np.rot90(p).copy() for p in pictures])
    turned = tmp_path / "turned.mp4"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-y", "-v", "error", "-display_rotation", "-90", "-i", str(lying)]
    subprocess.run([*command, "-c", "copy", str(turned)], check=True)
    recording = open_recording(turned, SETTINGS)
    assert recording.cameras[0].size == (320, 256)
    _, _, first = next(iter(recording.cameras[0].frames()))
    assert np.abs(first.astype(int) - pictures[0]).mean() < 6  # compression


def test_variable_frame_rate_is_evened_out(tmp_path: Path) -> None:
    indices, fps = sample_times(np.array([0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0]))
    assert fps == pytest.approx(7)
    assert indices.tolist() == [0, 1, 2, 3, 3, 4, 5, 7]
    even, rate = sample_times(np.arange(5) / 24)
    assert even.tolist() == [0, 1, 2, 3, 4] and rate == pytest.approx(24)
    path = _write_video(tmp_path / "v.mp4", _moving(6), [0, 50, 100, 150, 600, 650])
    recording = open_recording(path, SETTINGS)
    assert recording.fps == pytest.approx(1 / 0.13)
    assert len(set(recording.cameras[0].indices)) < 6  # some frames stay on screen


def test_range_step_and_limit_choose_frames(tmp_path: Path) -> None:
    path = _write_video(tmp_path / "v.mp4", _moving(20))

    def frames(limit: int | None = None, **settings: float) -> list[int]:
        recording = open_recording(path, TrackingSettings(**settings), limit)
        return list(recording.cameras[0].indices)

    assert frames(start_s=0.25, end_s=0.5) == [5, 6, 7, 8, 9]
    assert frames(frame_step=6) == [0, 6, 12, 18]
    assert frames(max_frames=3) == [0, 1, 2]
    assert frames(limit=10) == list(range(0, 20, 2))
    assert frames(limit=10, frame_step=1) == list(range(20))
    later = open_recording(path, TrackingSettings(start_s=0.25))
    assert later.cameras[0].start_s == pytest.approx(0.25)


def test_known_cameras_are_kept(tmp_path: Path) -> None:
    for camera in ("cam0", "cam1"):
        save(tmp_path / f"in/{camera}/0.png", frontal_picture())
    extr = np.eye(4)
    extr[0, 3] = 0.01
    entry = {"fx": 800.0, "fy": 802.0, "cx": 160.0, "cy": 158.0}
    content = {"cam0": entry, "cam1": {**entry, "extr": extr.tolist()}}
    write_json(tmp_path / "in/calibration.json", content)
    _track(tmp_path / "in", tmp_path / "out")
    fit = read_fit(tmp_path / "out/fit.npz")
    assert fit.num_frames == 1 and fit.camera_order == ("cam0", "cam1")
    assert np.allclose(fit.fx, 800) and np.allclose(fit.fy, 802) and np.allclose(fit.cy, 158)
    assert np.allclose(fit.extr, [np.eye(4), extr], atol=1e-6)


@pytest.mark.parametrize(("rule", "place"), [("left", 0), ("right", 1), ("largest", 0)])
def test_one_of_two_faces_is_chosen(rule: str, place: int) -> None:
    picture = frontal_picture()
    small = cv2.resize(picture, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    both = np.full((picture.shape[0], 560, 3), 255, np.uint8)
    both[:, :320] = picture
    both[20 : 20 + len(small), 560 - small.shape[1] :] = small
    seen = _look(both, TrackingSettings(face=rule))  # type: ignore[arg-type]
    assert seen.face_box is not None and seen.problem is None
    assert int(seen.face_box[0] > 300) == place
    assert any("2 faces" in flag for flag in seen.flags)


# --- bad inputs


def _look(picture: Picture, settings: TrackingSettings = SETTINGS) -> Observed:
    """What the observer says about a single photo."""

    class _One:
        def frames(self):
            yield 0, "photo.png", np.ascontiguousarray(picture)

    ((seen, _),) = FaceObserver(settings).observe(_One(), 0, False)  # type: ignore[arg-type]
    return seen


def _blurred() -> Picture:
    return cv2.GaussianBlur(frontal_picture(), (0, 0), 9)


def _tiny() -> Picture:
    canvas = np.full((400, 400, 3), 255, np.uint8)
    small = cv2.resize(frontal_picture(), (72, 72), interpolation=cv2.INTER_AREA)
    canvas[150:222, 150:222] = small
    return canvas


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.full((300, 300, 3), 200, np.uint8), "no face found"),
        (lambda: np.zeros((300, 300, 3), np.uint8), "no face found"),
        (
            lambda: np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8),
            "no face found|too small",  # speckles that look like a face of a few pixels
        ),
        (_blurred, "blurred|no face found|uncertain"),
        (_tiny, "too small|no face found"),
        (lambda: np.rot90(frontal_picture()), "lies on its side"),
        (lambda: np.rot90(frontal_picture(), 2), "upside down|lies on its side|no face"),
    ],
    ids=["empty", "black", "noise", "blurred", "tiny", "sideways", "upside-down"],
)
def test_unusable_pictures_say_why(make, message: str) -> None:
    seen = _look(make())
    assert seen.problem is not None and re.search(message, seen.problem), seen


def test_profiles_and_backs_of_the_head_are_refused() -> None:
    yaw = np.array([80.0, 90.0, 120.0])
    rot, tra = head_poses(yaw, np.zeros(3), np.zeros(3), np.zeros((3, 3)))
    still = np.zeros((3, 65)), np.zeros((3, 3))
    fit = make_fit(make_subject(5).shape, *still, rot, tra, 320, None)
    renderer = SubjectRenderer(make_subject(5), "cpu")
    for picture in renderer.render(views_of(fit), (320, 320), supersample=1).rgb.numpy():
        seen = _look(to_uint8(picture))
        assert seen.problem is not None and re.search("no clear face|no face found", seen.problem)


def test_hidden_faces_are_left_out_and_partly_hidden_ones_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = frontal_picture()
    box = _look(picture).face_box
    assert box is not None
    x0, y0, x1, y1 = (int(side) for side in box)
    mask, scarf = picture.copy(), picture.copy()
    mask[y0 + int(0.3 * (y1 - y0)) : y1 + 20, x0 - 20 : x1 + 20] = 90
    scarf[y0 + int(0.4 * (y1 - y0)) : y1 + 20, x0 - 20 : x1 + 20] = 90
    for name, image in (("0_whole", picture), ("1_mask", mask), ("2_scarf", scarf)):
        save(tmp_path / f"in/{name}.png", image)
    monkeypatch.setattr(fit_frames, "_HIDDEN", 4.0)
    whole, hidden, partly = _track(tmp_path / "in", tmp_path / "out")["frames"]
    assert whole["used"] and not any("hidden" in flag for flag in whole["flags"])
    assert "landmarks uncertain: face hidden" in hidden["left_out"]
    assert partly["used"] and "part of the face may be hidden" in partly["flags"]
    monkeypatch.setattr(fit_frames, "_HIDDEN", 1.0)
    whole, _, partly = _track(tmp_path / "in", tmp_path / "again")["frames"]
    assert whole["used"] and "part of the face is hidden (mirror" in partly["left_out"]


def test_closed_eyes_and_small_faces_are_flagged_but_used() -> None:
    small = cv2.resize(frontal_picture(), (170, 170), interpolation=cv2.INTER_AREA)
    seen = _look(small)
    assert seen.problem is None and any("small face" in flag for flag in seen.flags)
    seen.openness = 0.01
    assert seen.eyes_closed


def _bad_source(kind: str, folder: Path) -> Path:
    """Builds an unusable source below a folder."""
    good = folder / "good.png"
    if kind == "missing":
        return folder / "nowhere"
    if kind == "empty folder":
        return folder
    if kind == "text":
        (folder / "a.txt").write_text("hello")
        return folder / "a.txt"
    if kind == "folder of text":
        (folder / "a.txt").write_text("hello")
        return folder
    if kind == "broken photo":
        good.write_bytes(b"\x89PNG not really")
        return folder
    if kind == "empty photo":
        good.write_bytes(b"")
        return folder
    if kind == "minute photo":
        return save(good, np.zeros((20, 20, 3), np.uint8))
    if kind == "broken video":
        (folder / "a.mp4").write_bytes(b"no video" * 100)
        return folder / "a.mp4"
    if kind == "empty video":
        (folder / "a.mp4").write_bytes(b"")
        return folder / "a.mp4"
    if kind == "truncated video":
        whole = _write_video(folder / "a.mp4", _moving(12))
        content = whole.read_bytes()
        whole.write_bytes(content[: len(content) // 3])
        return whole
    if kind == "two videos":
        _write_video(folder / "a.mp4", _moving(1))
        shutil.copyfile(folder / "a.mp4", folder / "b.mp4")
        return folder
    if kind == "photo and video":
        _write_video(folder / "a.mp4", _moving(1))
        save(good, frontal_picture())
        return folder
    if kind == "nobody":
        save(good, np.full((200, 200, 3), 128, np.uint8))
        return folder
    for camera in ("cam0", "cam1"):
        save(folder / camera / "0.png", frontal_picture())
    if kind == "unlike cameras":
        save(folder / "cam1/1.png", frontal_picture())
    elif kind == "sizes in a camera":
        save(folder / "cam1/1.png", frontal_picture()[:200])
        save(folder / "cam0/1.png", frontal_picture())
    elif kind == "empty camera":
        (folder / "cam1/0.png").unlink()
    else:
        entry = {"fx": 500, "fy": 500, "cx": 160, "cy": 160}
        content: object = {
            "calibration list": [],
            "calibration without fx": {"cam0": entry, "cam1": {"fy": 1}},
            "calibration mirrored": {
                "cam0": entry, "cam1": {**entry, "extr": np.diag([-1.0, 1, 1, 1]).tolist()}
            },
        }[kind]  # fmt: skip
        write_json(folder / "calibration.json", content)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "nothing there.*a photo, a folder of photos, a video"),
        ("empty folder", "an empty folder"),
        ("text", "a file of type '.txt'.*Photos:.*videos:"),
        ("folder of text", r"no photo or video \(only .txt\)"),
        ("broken photo", "good.png.*no readable image"),
        ("empty photo", "good.png.*an empty file"),
        ("minute photo", "20 x 20 pixels.*at least 64"),
        ("broken video", "a.mp4.*cannot be decoded.*ffmpeg"),
        ("empty video", "a.mp4.*an empty file"),
        ("truncated video", "a.mp4.*(cannot be decoded|readable)"),
        ("two videos", "2 videos.*one video"),
        ("photo and video", "1 photos and 1 videos.*either photos or one video"),
        ("nobody", r"no usable frame among 1 \(no face found\).*at least one sharp picture"),
        ("unlike cameras", "cam0: 1, cam1: 2.*the same moments"),
        ("sizes in a camera", "cam1.*photos of sizes.*one size"),
        ("empty camera", "cam1.*0 photos and 0 videos"),
        ("calibration list", "calibration.json.*no object"),
        ("calibration without fx", "an unusable entry for 'cam1'"),
        ("calibration mirrored", "'cam1' that is no camera"),
    ],
)
def test_bad_sources_are_explained(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = _bad_source(kind, tmp_path / "in")
    with pytest.raises(InputFileError, match=f"(?s){message}"):
        _track(source, tmp_path / "out")
    assert not (tmp_path / "out/fit.npz").exists()


def test_time_range_outside_the_video_is_refused(tmp_path: Path) -> None:
    path = _write_video(tmp_path / "v.mp4", _moving(4))
    with pytest.raises(InputFileError, match=r"0\.20 s of video.*start_s 9"):
        open_recording(path, TrackingSettings(start_s=9))


def test_driving_source_with_two_cameras_is_refused(tmp_path: Path) -> None:
    for camera in ("cam0", "cam1"):
        save(tmp_path / f"in/{camera}/0.png", frontal_picture())
    with pytest.raises(InputFileError, match=r"2 cameras.*one driving video"):
        track_driving(tmp_path / "in", tmp_path / "out", demo_head_folder(), SETTINGS)


@pytest.mark.parametrize(
    "values", [{"frame_step": 0}, {"face": "tallest"}, {"focal_px": -1}, {"smoothness": -1}]
)
def test_impossible_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        TrackingSettings(**values)


def test_unusable_frames_are_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    save(tmp_path / "in/0.png", np.full((320, 320, 3), 255, np.uint8))
    save(tmp_path / "in/1.png", frontal_picture())
    quality = _track(tmp_path / "in", tmp_path / "out")
    assert quality["num_frames"] == 2 and quality["num_used"] == 1
    assert quality["frames"][0]["left_out"] == "no face found"
    subject = read_tracked_subject(tmp_path / "out")
    assert [r.timestep for r in subject.references] == [0]
    assert np.array_equal(read_rgb(subject.references[0].image), frontal_picture())


def test_head_model_that_is_no_head_is_refused() -> None:
    model = HeadModel.load(demo_head_folder(), mouth=False)
    model.template.copy_(model.template.flip(0))  # z, y, x: looks sideways, eyes in the wrong place
    model.template[:] *= 0.1
    with pytest.raises(UserError, match=r"a face is recognised in .* of 15 renderings"):
        compute_correspondence(model, FaceDetector(), LandmarkNetwork(), "my_head")


def test_missing_head_model_is_named(tmp_path: Path) -> None:
    save(tmp_path / "in/0.png", frontal_picture())
    with pytest.raises(InputFileError, match=r"flame\.npz.*prepare_head_model"):
        track_subject(tmp_path / "in", tmp_path / "out", tmp_path / "no-head", SETTINGS)
