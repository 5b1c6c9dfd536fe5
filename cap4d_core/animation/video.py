"""Video files: frames streamed to an encoder, and read back.

ffmpeg (the binary that comes with imageio-ffmpeg) encodes what arrives through a pipe, so a long
sequence is never held in memory or as pictures on disk. Encoder options are fixed, thread count
included: the same frames give the same file on every machine with the same ffmpeg.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import atomic_path, require_file

VideoCodec = Literal["h264", "prores4444"]

# The last part is the IPTC term for content made by a trained model.
SYNTHETIC_NOTICE = (
    "Synthetic media: rendered from an AI-generated head avatar, not a recording of a person "
    "(digital source type: trainedAlgorithmicMedia)."
)

# x264 gives other bits for other thread counts; four is a good speed on most machines.
ENCODER_THREADS = 4
# Audio codecs that an MP4 or MOV may hold as they are; everything else is encoded to AAC.
COPIED_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "alac"})

_BT709 = ["-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709"]
_CODEC_OPTIONS: dict[VideoCodec, list[str]] = {
    "h264": ["-c:v", "libx264", "-preset", "medium", "-pix_fmt", "yuv420p"],
    "prores4444": [
        "-c:v", "prores_ks", "-profile:v", "4444", "-vendor", "apl0", "-alpha_bits", "16",
        "-pix_fmt", "yuva444p10le",
    ],
}  # fmt: skip


def exact_frame_rate(fps: float | Fraction) -> Fraction:
    """Frame rate as the fraction it stands for: 29.97 is 30000/1001, 25 is 25/1.

    Raises:
        UserError: not a positive finite number.
    """
    if not math.isfinite(fps) or fps <= 0:
        raise UserError(f"Frame rate {fps}: expected a positive number of frames per second.")
    if isinstance(fps, Fraction):
        return fps
    # Rates are stored rounded to two or three decimals, hence the tolerance.
    if abs(fps - round(fps)) > 1e-4:
        ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
        if ntsc > 0 and abs(float(ntsc) - fps) < 6e-3:
            return ntsc
    return Fraction(fps).limit_denominator(1001)


@dataclass(frozen=True)
class AudioTrack:
    """Audio to go with the frames: first audio track of `path`, from `start_s` for `duration_s`."""

    path: Path
    start_s: float = 0.0
    duration_s: float | None = None


class VideoWriter:
    """Streams 8-bit frames into one video file; a context manager.

    The file appears under its name only when complete; after an exception nothing is left.

        with VideoWriter("renders.mp4", fps=30) as writer:
            writer.write(frame)  # (H, W, 3) uint8 RGB, or (H, W, 4) straight alpha for ProRes

    Odd sizes, which 4:2:0 colour cannot hold, are padded by repeating the last column or row.

    Args:
        path: file to write: `.mp4` for h264, `.mov` for prores4444.
        fps: frames per second, stored exactly (see `exact_frame_rate`).
        codec: h264 (yuv420p) or prores4444 (yuva444p10le with alpha).
        crf: H.264 quality, 0 to 51, lower is better.
        audio: track to add; skipped when its file has none.
        comment: container metadata; says that the content is synthetic.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | Fraction,
        *,
        codec: VideoCodec = "h264",
        crf: int = 18,
        audio: AudioTrack | None = None,
        comment: str = SYNTHETIC_NOTICE,
    ) -> None:
        self.path = Path(path)
        self.rate = exact_frame_rate(fps)
        self.codec: VideoCodec = codec
        self.crf = crf
        self.audio = audio
        self.comment = comment
        self.num_frames = 0
        self._channels = 4 if codec == "prores4444" else 3
        self._shape: tuple[int, ...] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> VideoWriter:
        self._temporary = self._resources.enter_context(atomic_path(self.path))
        self._messages = self._resources.enter_context(tempfile.TemporaryFile())
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Adds one frame; all frames have the size of the first.

        Raises:
            UserError: the encoder stopped, e.g. because the disk is full.
            ValueError: wrong type, shape or number of channels.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != self._channels:
            raise ValueError(
                f"{self.codec} takes (H, W, {self._channels}) uint8 frames, "
                f"got {frame.shape} {frame.dtype}"
            )
        if self._shape is None:
            self._shape = frame.shape
            self._start(frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2)
        elif frame.shape != self._shape:
            raise ValueError(f"frame of shape {frame.shape} after frames of {self._shape}")
        if frame.shape[0] % 2 or frame.shape[1] % 2:
            rows, columns = frame.shape[0] % 2, frame.shape[1] % 2
            frame = np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError:
            raise self._failure() from None
        self.num_frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
            elif self._process is not None:
                self._process.kill()
                self._process.communicate()
        except BaseException as failure:
            # atomic_path must see the failure, or it would rename a broken file.
            self._resources.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._resources.__exit__(kind, error, trace)

    def _start(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        pixels = "rgba" if self._channels == 4 else "rgb24"
        command = [
            get_ffmpeg_exe(), "-y", "-nostdin", "-hide_banner", "-loglevel", "error",
            "-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}",
            "-framerate", str(self.rate), "-i", "pipe:0",
        ]  # fmt: skip
        audio_codec = audio_codec_of(self.audio.path) if self.audio else None
        if self.audio and audio_codec:
            command += ["-ss", f"{self.audio.start_s:.6f}"] if self.audio.start_s else []
            duration = self.audio.duration_s
            command += ["-t", f"{duration:.6f}"] if duration is not None else []
            # A playlist posing as a video could otherwise make ffmpeg fetch from the network.
            command += ["-protocol_whitelist", "file", "-i", str(self.audio.path.resolve())]
            command += ["-map", "0:v:0", "-map", "1:a:0"]
            codec = "copy" if audio_codec in COPIED_AUDIO else "aac"
            command += ["-c:a", codec, *(["-b:a", "192k"] if codec == "aac" else [])]
        command += [*_CODEC_OPTIONS[self.codec], "-threads", str(ENCODER_THREADS)]
        command += ["-crf", str(self.crf)] if self.codec == "h264" else []
        # Without these swscale converts with BT.601 and players guess the matrix from the size.
        scaling = "out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bitexact"
        command += ["-vf", f"scale={scaling}", *_BT709]
        command += [
            "-map_metadata", "-1", "-metadata", f"comment={self.comment}",
            "-fflags", "+bitexact", "-flags:v", "+bitexact",  # no dates, no library versions
            "-movflags", "+faststart", str(self._temporary),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._messages
        )

    def _finish(self) -> None:
        if self._process is None:
            raise UserError(f"{self.path}: no frames to write; expected at least one.")
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            raise self._failure() from None
        if self._process.wait() != 0 or not self._temporary.exists():
            raise self._failure()

    def _failure(self) -> UserError:
        assert self._process is not None and self._messages is not None
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._messages.seek(0)
        said = self._messages.read().decode("utf-8", "replace").strip().splitlines()[-3:]
        free = shutil.disk_usage(self.path.parent).free / 1e6
        hint = "The disk is full." if free < 10 else "Check the messages above."
        return UserError(
            f"{self.path}: ffmpeg stopped with exit code {code} after {self.num_frames} frames "
            f"({'; '.join(said) or 'no message'}; {free:.0f} MB free on the disk). {hint}"
        )


def audio_codec_of(path: str | Path) -> str | None:
    """Codec of the first audio track of a media file; None when it has none.

    Raises:
        InputFileError: missing or not a media file.
    """
    with _open(path) as container:
        return container.streams.audio[0].codec_context.name if container.streams.audio else None


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds; `num_frames` counts decoded frames."""

    num_frames: int
    rate: Fraction
    width: int
    height: int
    codec: str
    pixel_format: str
    has_audio: bool
    comment: str


def probe_video(path: str | Path) -> VideoInfo:
    """Decodes a video once and reports its properties.

    Raises:
        InputFileError: missing, unreadable or without a video track.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        frames = sum(1 for _ in container.decode(stream))
        return VideoInfo(
            num_frames=frames,
            rate=Fraction(stream.average_rate or 0),
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            codec=stream.codec_context.name,
            pixel_format=stream.codec_context.pix_fmt or "",
            has_audio=bool(container.streams.audio),
            comment=container.metadata.get("comment", ""),
        )


def read_frames(path: str | Path, pixel_format: str = "rgb24") -> Iterator[NDArray[np.uint8]]:
    """Yields frames as (H, W, 3) uint8 RGB, or (H, W, 4) with `pixel_format="rgba"`.

    Raises:
        InputFileError: missing, unreadable or without a video track.
    """
    import av

    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            for frame in container.decode(stream):
                yield frame.to_ndarray(format=pixel_format)
        except av.error.FFmpegError as error:
            raise InputFileError(path, f"damaged frames ({error})", "a readable video") from None


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    import av

    path = require_file(path, "a video")
    try:
        container = av.open(str(path.resolve()))
    except (av.error.FFmpegError, OSError) as error:
        raise InputFileError(path, f"no readable media ({error})", "an MP4 or MOV video") from None
    with container:
        yield container


def _video_stream(container: Any, path: str | Path) -> Any:
    if not container.streams.video:
        raise InputFileError(path, "no video track", "a file with a video track")
    return container.streams.video[0]
