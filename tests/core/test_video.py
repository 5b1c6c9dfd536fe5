"""Video writing and reading, with real encodes of tiny frames."""

from __future__ import annotations

import subprocess
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.animation import video
from cap4d_core.animation.video import (
    AudioTrack,
    VideoWriter,
    exact_frame_rate,
    probe_video,
    read_frames,
)
from cap4d_core.errors import InputFileError, UserError


def _gradient_frames(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Smooth moving colours: what 4:2:0 keeps."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    channels = [60 + 4 * x + 3 * t, 200 - 4 * y, 40 + 2 * (x + y)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def _write(path: Path, frames: np.ndarray, fps: float = 24, **options: object) -> Path:
    with VideoWriter(path, fps, **options) as writer:  # type: ignore[arg-type]
        for frame in frames:
            writer.write(frame)
    return path


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, Fraction(24)),
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (59.94005994, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (Fraction(1001, 33), Fraction(1001, 33)),
        (30.000001, Fraction(30)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_exact_frame_rate(fps: float, expected: Fraction) -> None:
    assert exact_frame_rate(fps) == expected


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_frame_rates_are_refused(fps: float) -> None:
    with pytest.raises(UserError, match="Frame rate"):
        exact_frame_rate(fps)


def test_h264_round_trip(tmp_path: Path) -> None:
    frames = _gradient_frames(7)
    path = _write(tmp_path / "renders.mp4", frames, fps=29.97, crf=10)
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (7, 32, 32)
    assert info.rate == Fraction(30000, 1001)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    assert "Synthetic media" in info.comment
    decoded = np.stack(list(read_frames(path)))
    # crf 10 on gradients, BT.709 both ways: a wrong matrix or range costs more than 8 levels.
    assert np.abs(decoded.astype(int) - frames).mean() < 2.5
    assert [file.name for file in tmp_path.iterdir()] == ["renders.mp4"]


def test_index_comes_first(tmp_path: Path) -> None:
    """Players can start before the whole file is there."""
    data = _write(tmp_path / "a.mp4", _gradient_frames(3)).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = _gradient_frames(9)
    first = _write(tmp_path / "a.mp4", frames).read_bytes()
    assert _write(tmp_path / "b.mp4", frames).read_bytes() == first


def test_odd_sizes_are_padded_with_the_edge(tmp_path: Path) -> None:
    frames = np.full((2, 31, 33, 3), (200, 40, 90), np.uint8)
    path = _write(tmp_path / "a.mp4", frames, crf=5)
    decoded = next(iter(read_frames(path)))
    assert decoded.shape == (32, 34, 3)
    assert np.abs(decoded[-1, -1].astype(int) - (200, 40, 90)).max() <= 4


def test_prores_keeps_alpha_and_straight_colour(tmp_path: Path) -> None:
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[..., :3] = (180, 90, 30)
    frame[:, :16, 3] = 255
    frame[:, 16:, 3] = 64
    path = _write(tmp_path / "a.mov", np.stack([frame] * 3), codec="prores4444")
    info = probe_video(path)
    assert info.codec == "prores" and info.num_frames == 3
    assert info.pixel_format.startswith("yuva444p1")
    decoded = next(iter(read_frames(path, "rgba"))).astype(int)
    assert np.abs(decoded[..., 3] - frame[..., 3]).max() <= 1
    assert np.abs(decoded[..., :3] - frame[..., :3]).max() <= 4


def _tone(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as handle:
        handle.setparams((1, 2, 16000, 0, "NONE", ""))
        t = np.arange(round(16000 * seconds)) / 16000
        handle.writeframes((8000 * np.sin(2 * np.pi * 440 * t)).astype("<i2").tobytes())
    return path


def test_audio_is_added_and_limited_to_the_pictures(tmp_path: Path) -> None:
    import av

    sound = _tone(tmp_path / "tone.wav", 3.0)
    frames = _gradient_frames(24)
    path = _write(tmp_path / "a.mp4", frames, audio=AudioTrack(sound, 0.5, 1.0))
    info = probe_video(path)
    assert info.has_audio and info.num_frames == 24
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        samples = sum(frame.samples for frame in container.decode(stream))
        # AAC works in blocks of 1024 samples and adds one of lead-in.
        assert abs(samples / stream.rate - 1.0) < 3 * 1024 / 16000


def test_audio_of_a_silent_file_is_skipped(tmp_path: Path) -> None:
    silent = _write(tmp_path / "silent.mp4", _gradient_frames(3))
    path = _write(tmp_path / "a.mp4", _gradient_frames(3), audio=AudioTrack(silent))
    assert not probe_video(path).has_audio


def test_aac_audio_is_copied_bit_by_bit(tmp_path: Path) -> None:
    import av

    def packets(path: Path) -> list[bytes]:
        with av.open(str(path)) as container:
            return [bytes(p) for p in container.demux(container.streams.audio[0]) if p.size]

    frames = _gradient_frames(24)
    first = _write(tmp_path / "a.mp4", frames, audio=AudioTrack(_tone(tmp_path / "t.wav", 1.0)))
    second = _write(tmp_path / "b.mp4", frames, audio=AudioTrack(first))
    assert packets(second) == packets(first)


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.mp4", _gradient_frames(2))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="killed"), VideoWriter(path, 24) as writer:
        writer.write(_gradient_frames(1)[0])
        raise RuntimeError("killed")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_dying_encoder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "ffmpeg"
    failing.write_text("#!/bin/sh\necho 'No space left on device' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(failing))
    path = tmp_path / "out" / "a.mp4"
    with pytest.raises(UserError, match=r"a\.mp4: ffmpeg stopped with exit code 3.*No space left"):
        _write(path, _gradient_frames(200, 64, 64))
    assert list(path.parent.iterdir()) == []


def test_a_killed_encoder_is_reported(tmp_path: Path) -> None:
    frame = _gradient_frames(1, 256, 256)[0]
    with (
        pytest.raises(UserError, match="ffmpeg stopped with exit code -9"),
        VideoWriter(tmp_path / "a.mp4", 24) as writer,
    ):
        writer.write(frame)
        process = writer._process
        assert isinstance(process, subprocess.Popen)
        process.kill()
        process.wait()
        for _ in range(3):
            writer.write(frame)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no frames"), VideoWriter(tmp_path / "a.mp4", 24):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8))]
)
def test_wrong_frames_are_refused(tmp_path: Path, frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="h264 takes"), VideoWriter(tmp_path / "a.mp4", 24) as w:
        w.write(frame)


def test_size_may_not_change(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="after frames of"),
        VideoWriter(tmp_path / "a.mp4", 1) as w,
    ):
        w.write(np.zeros((8, 8, 3), np.uint8))
        w.write(np.zeros((8, 10, 3), np.uint8))


def test_unreadable_videos_are_user_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    with pytest.raises(InputFileError, match=r"broken\.mp4"):
        probe_video(broken)
    with pytest.raises(InputFileError, match="nothing there"):
        video.audio_codec_of(tmp_path / "absent.mp4")
    with pytest.raises(InputFileError, match="no video track"):
        probe_video(_tone(tmp_path / "tone.wav", 0.1))
