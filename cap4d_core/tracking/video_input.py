"""Photos and videos as sequences of upright pictures, whatever way they were recorded.

A recording is one of:
    a photo, or a folder of photos: independent frames; a video file (or a folder with nothing but
    one): consecutive frames; a folder with sub-folders cam0, cam1, ... of either kind, all of the
    same moments: several cameras, with an optional `calibration.json` ({"cam0": {"fx": ..., "fy":
    ..., "cx": ..., "cy": ..., "extr": 4x4 world-to-camera in OpenCV axes}, ...}).

EXIF orientation and the rotation stored in videos are applied. Videos whose frames come at uneven
times are resampled to their mean rate. Photos of different sizes or focal lengths become separate
cameras, because a fit has one set of intrinsics per camera.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, require_file
from cap4d_core.files.images import IMAGE_SUFFIXES, read_rgb
from cap4d_core.settings import TrackingSettings

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mts", ".mpg", ".gif"}
)
MIN_SIDE = 64
# Intervals that differ more than this from their median make a variable frame rate.
_UNEVEN = 0.25
_EXIF_IFD, _FOCAL_35MM = 0x8769, 0xA405
_DIAGONAL_35MM = math.hypot(36.0, 24.0)
_WHAT = "a photo, a folder of photos, a video, or folders cam0, cam1, ..."


@dataclass(frozen=True)
class Calibration:
    """Known camera: intrinsics in pixels, world-to-camera (4, 4) or None."""

    fx: float
    fy: float
    cx: float
    cy: float
    extr: NDArray[np.float64] | None


@dataclass(frozen=True)
class RecordedCamera:
    """Frames of one camera.

    name; size (height, width); first_timestep: of its first frame; photos: one file per frame, or
    empty for a video; video with the indices of its frames to take; focal_px: from EXIF, else None;
    start_s: time of the first frame in the video.
    """

    name: str
    size: tuple[int, int]
    first_timestep: int
    photos: tuple[Path, ...]
    video: Path | None
    indices: tuple[int, ...]
    focal_px: float | None
    calibration: Calibration | None = None
    start_s: float = 0.0

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.photos) or len(self.indices)

    def frames(self) -> Iterator[tuple[int, str, NDArray[np.uint8]]]:
        """Timestep, name and picture (H, W, 3) of every frame, in order."""
        if self.video is None:
            for number, path in enumerate(self.photos):
                yield self.first_timestep + number, path.name, read_rgb(path)
            return
        wanted = self.indices
        position = 0
        for index, image in enumerate(_decode(self.video)):
            # Resampling may take a frame twice.
            while position < len(wanted) and wanted[position] == index:
                yield self.first_timestep + position, f"frame {index}", image
                position += 1
            if position == len(wanted):
                return
        if position < len(wanted):
            raise InputFileError(
                self.video,
                f"only {position} of {len(wanted)} frames readable",
                "an undamaged video",
                "Convert it again, e.g. with ffmpeg.",
            )


@dataclass(frozen=True)
class Recording:
    """All cameras of a source; fps is None for photos."""

    source: Path
    cameras: tuple[RecordedCamera, ...]
    num_timesteps: int
    fps: float | None

    @property
    def continuous(self) -> bool:
        """Whether the frames follow each other in time."""
        return self.fps is not None


def open_recording(
    source: str | Path, settings: TrackingSettings, frame_limit: int | None = None
) -> Recording:
    """Looks at a source without decoding all of it.

    Args:
        source: see the module.
        settings: frame_step, max_frames, start_s, end_s.
        frame_limit: take every n-th frame of longer videos (unless frame_step says which).

    Raises:
        InputFileError: nothing usable there; says what was found.
    """
    source = Path(source)
    if not source.exists():
        raise InputFileError(source, "nothing there", _WHAT)
    if source.is_file():
        return _open_file(source, settings, frame_limit)
    folder = source / "images" if (source / "images" / "cam0").is_dir() else source
    cameras = sorted(p for p in folder.iterdir() if p.is_dir() and _is_camera_name(p.name))
    if cameras:
        return _open_cameras(source, cameras, settings, frame_limit)
    return _open_folder(source, settings, frame_limit)


def _is_camera_name(name: str) -> bool:
    return name.startswith("cam") and name[3:].isdigit()


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Photos and videos of a folder, sorted; hidden files are left alone."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    photos = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return photos, [p for p in files if p.suffix.lower() in VIDEO_SUFFIXES]


def _open_file(source: Path, settings: TrackingSettings, limit: int | None) -> Recording:
    if source.suffix.lower() in IMAGE_SUFFIXES:
        return _open_photos(source, [source], settings)
    if source.suffix.lower() in VIDEO_SUFFIXES:
        camera, fps = _open_video("cam0", source, settings, limit)
        return Recording(source, (camera,), camera.num_frames, fps)
    raise InputFileError(
        source,
        f"a file of type '{source.suffix}'",
        _WHAT,
        f"Photos: {', '.join(sorted(IMAGE_SUFFIXES))}; "
        f"videos: {', '.join(sorted(VIDEO_SUFFIXES))}.",
    )


def _open_folder(source: Path, settings: TrackingSettings, limit: int | None) -> Recording:
    photos, videos = _files(source)
    if photos and videos:
        raise InputFileError(
            source,
            f"{len(photos)} photos and {len(videos)} videos ({videos[0].name}, ...)",
            "either photos or one video",
            "Give the file itself, or move the others away.",
        )
    if len(videos) > 1:
        raise InputFileError(
            source,
            f"{len(videos)} videos",
            "one video",
            "Give one file; several cameras belong into folders cam0, cam1, ...",
        )
    if videos:
        camera, fps = _open_video("cam0", videos[0], settings, limit)
        return Recording(source, (camera,), camera.num_frames, fps)
    if not photos:
        others = sorted({p.suffix.lower() or p.name for p in source.iterdir()})
        found = f"no photo or video (only {', '.join(others[:6])})" if others else "an empty folder"
        raise InputFileError(source, found, _WHAT)
    return _open_photos(source, photos, settings)


def _open_photos(source: Path, photos: list[Path], settings: TrackingSettings) -> Recording:
    photos = photos[:: settings.frame_step or 1][: settings.max_frames]
    groups: dict[tuple[tuple[int, int], float | None], list[Path]] = {}
    for photo in photos:
        groups.setdefault(_photo_header(photo), []).append(photo)
    cameras, first = [], 0
    for number, ((size, focal), members) in enumerate(groups.items()):
        name = f"cam{number}"
        cameras.append(RecordedCamera(name, size, first, tuple(members), None, (), focal))
        first += len(members)
    return Recording(source, tuple(cameras), first, None)


def _photo_header(path: Path) -> tuple[tuple[int, int], float | None]:
    """Upright size (height, width) and focal length in pixels from EXIF, without decoding."""
    path = require_file(path, "an image")
    try:
        with Image.open(path) as image:
            width, height = image.size
            exif = image.getexif()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InputFileError(
            path, f"a file that is no readable image ({error})", "a PNG, JPEG, WebP or TIFF image"
        ) from None
    if exif.get(0x0112, 1) in (5, 6, 7, 8):
        width, height = height, width
    if min(width, height) < MIN_SIDE:
        raise InputFileError(
            path, f"a picture of {width} x {height} pixels", f"at least {MIN_SIDE} pixels a side"
        )
    try:
        equivalent = float(exif.get_ifd(_EXIF_IFD).get(_FOCAL_35MM, 0) or 0)
    except (TypeError, ValueError):
        equivalent = 0.0
    # The 35 mm equivalent compares diagonals. Cropped pictures keep the tag, so it must be sane.
    focal = equivalent / _DIAGONAL_35MM * math.hypot(width, height)
    return (height, width), round(focal, 1) if 8.0 <= equivalent <= 400.0 else None


def _open_cameras(
    source: Path, folders: list[Path], settings: TrackingSettings, limit: int | None
) -> Recording:
    calibrations = _read_calibration(source / "calibration.json", [f.name for f in folders])
    cameras, rates = [], []
    for folder in folders:
        photos, videos = _files(folder)
        if bool(photos) == bool(videos) or len(videos) > 1:
            raise InputFileError(
                folder, f"{len(photos)} photos and {len(videos)} videos", "photos or one video"
            )
        calibration = calibrations.get(folder.name)
        if videos:
            camera, fps = _open_video(folder.name, videos[0], settings, limit, calibration)
            cameras.append(camera)
            rates.append(fps)
            continue
        photos = photos[:: settings.frame_step or 1][: settings.max_frames]
        headers = {_photo_header(photo)[0] for photo in photos}
        if len(headers) > 1:
            sizes = ", ".join(f"{w} x {h}" for h, w in sorted(headers))
            raise InputFileError(folder, f"photos of sizes {sizes}", "one size per camera folder")
        size, focal = _photo_header(photos[0])
        cameras.append(
            RecordedCamera(folder.name, size, 0, tuple(photos), None, (), focal, calibration)
        )
    counts = {camera.name: camera.num_frames for camera in cameras}
    if len(set(counts.values())) > 1 or (rates and len(rates) != len(cameras)):
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputFileError(
            source, f"cameras with unlike frames ({listed})", "the same moments from every camera"
        )
    return Recording(source, tuple(cameras), cameras[0].num_frames, rates[0] if rates else None)


def _read_calibration(path: Path, names: list[str]) -> dict[str, Calibration]:
    if not path.exists():
        return {}
    content = read_json(path, "camera calibrations")
    result = {}
    if not isinstance(content, dict):
        raise InputFileError(path, "no object", '{"cam0": {"fx": ...}, ...}')
    for name in names:
        entry: Any = content.get(name)
        try:
            values = {key: float(entry[key]) for key in ("fx", "fy", "cx", "cy")}
            extr = np.array(entry["extr"], np.float64) if "extr" in entry else None
        except (TypeError, KeyError, ValueError) as error:
            raise InputFileError(
                path, f"an unusable entry for '{name}' ({error!r})", "fx, fy, cx, cy and extr"
            ) from None
        rigid = extr is None or (
            extr.shape == (4, 4)
            and np.abs(extr[:3, :3] @ extr[:3, :3].T - np.eye(3)).max() < 1e-2
            and np.linalg.det(extr[:3, :3]) > 0
        )
        if not rigid or values["fx"] <= 0 or values["fy"] <= 0:
            raise InputFileError(
                path, f"'{name}' that is no camera", "positive fx, fy and a rigid 4x4 'extr'"
            )
        result[name] = Calibration(**values, extr=extr)
    return result


def _open_video(
    name: str,
    path: Path,
    settings: TrackingSettings,
    limit: int | None,
    calibration: Calibration | None = None,
) -> tuple[RecordedCamera, float]:
    path = require_file(path, "a video")
    times, size = _scan(path)
    indices, fps = sample_times(np.array(times))
    start, stop = settings.start_s or 0.0, settings.end_s
    seconds = np.arange(len(indices)) / fps
    inside = (seconds >= start - 1e-6) & (seconds < (math.inf if stop is None else stop) - 1e-6)
    if not inside.any():
        raise InputFileError(
            path,
            f"{len(indices) / fps:.2f} s of video",
            f"frames between start_s {start:g} and end_s {'the end' if stop is None else stop}",
        )
    chosen = indices[inside]
    step = settings.frame_step
    if step is None:
        step = 1 if limit is None else max(1, math.ceil(len(chosen) / limit))
        if step > 1:
            logger.warning(
                "%s: %d frames; every %d. is used (tracking.frame_step)", path, len(chosen), step
            )
    chosen = chosen[::step][: settings.max_frames]
    if min(size) < MIN_SIDE:
        raise InputFileError(
            path, f"a video of {size[1]} x {size[0]} pixels", f"at least {MIN_SIDE} pixels a side"
        )
    start_s = times[0] + float(seconds[inside][0])
    camera = RecordedCamera(
        name, size, 0, (), path, tuple(int(i) for i in chosen), None, calibration, start_s
    )
    return camera, fps / step


def sample_times(times: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
    """Which frames to take so that they come at a constant rate.

    Args:
        times: (N,) presentation times in seconds, ascending.

    Returns:
        Frame indices (with repeats or gaps where the rate varies) and the rate.
    """
    if len(times) < 2:
        return np.arange(len(times)), 30.0
    intervals = np.diff(times)
    typical = float(np.median(intervals))
    mean = float(times[-1] - times[0]) / (len(times) - 1)
    if typical > 0 and (np.abs(intervals - typical) <= _UNEVEN * typical).all():
        return np.arange(len(times)), 1.0 / mean
    # Variable rate: the frame that is on screen at every tick of a steady clock.
    count = max(1, round(float(times[-1] - times[0]) / mean) + 1)
    ticks = times[0] + np.arange(count) * mean
    on_screen = np.searchsorted(times, ticks + 1e-4 * mean, side="right") - 1
    return np.clip(on_screen, 0, len(times) - 1), 1.0 / mean


def _scan(path: Path) -> tuple[list[float], tuple[int, int]]:
    """Presentation times of all frames (from packets, without decoding) and upright size.

    Times count from the beginning of the file, which may be that of the sound.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputFileError(path, "a file without video stream", "a video")
            stream = container.streams.video[0]
            base = float(stream.time_base or 0)
            begin = (container.start_time or 0) / av.time_base
            times = sorted(
                float(packet.pts) * base - begin
                for packet in container.demux(stream)
                if packet.pts is not None and packet.size
            )
        first = next(_decode(path), None)
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from None
    if first is None or not times:
        raise InputFileError(path, "no readable frame", "a video", "Convert it again.")
    return times, (first.shape[0], first.shape[1])


def _decode(path: Path) -> Iterator[NDArray[np.uint8]]:
    """All frames, upright, (H, W, 3) RGB."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                image = frame.to_ndarray(format="rgb24")
                # The stored angle is counter-clockwise, as numpy's quarter turns.
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                yield np.ascontiguousarray(np.rot90(image, turns))
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputFileError:
    return InputFileError(
        path,
        f"a file that cannot be decoded ({error})",
        "a video that ffmpeg can read",
        "Convert it again, e.g. ffmpeg -i in.mov -c:v libx264 out.mp4.",
    )
