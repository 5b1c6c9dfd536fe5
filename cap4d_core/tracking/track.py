"""The built-in tracker: photos or video to a fit of the head model.

Stages: look at every frame (observe), place the landmarks on the head model (correspondence), fit
(landmark_fit, gaze), sort out what did not fit, choose references (selection), write the tracking
folder with mattes, overlays and figures.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import write_json
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import (
    Tracking,
    Trajectory,
    write_fit,
    write_reference_list,
    write_trajectory,
)
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.geometry.cameras import orbit_extrinsics, static_extrinsics
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.fit_overlay import OverlayWriter
from cap4d_core.tracking.gaze import estimate_gaze
from cap4d_core.tracking.landmark_fit import (
    Camera,
    LandmarkFit,
    LandmarkFitter,
    Observation,
    with_eyes,
)
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.matting import PortraitMatting
from cap4d_core.tracking.observe import FaceObserver, Observed
from cap4d_core.tracking.pixel3dmm_run import (
    Installation,
    find_installation,
    fit_with_pixel3dmm,
)
from cap4d_core.tracking.quality import frame_figures, head_angles, motion_flags, project_head
from cap4d_core.tracking.selection import MIN_DIFFERENCE, Candidate, select_references
from cap4d_core.tracking.video_input import RecordedCamera, Recording, open_recording

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

CORRESPONDENCE_FILE = "correspondence.npz"
PIXEL3DMM_FOLDER = "pixel3dmm"
# Reference videos longer than this are thinned out.
REFERENCE_FRAME_LIMIT = 300
# EXIF gives the focal length, but cropped pictures keep the tag.
_EXIF_UNCERTAINTY = 0.3
# A fit whose landmarks are off by more than this share of the face is no fit.
MAX_RESIDUAL = 0.04
MAX_YAW_DEG = 80.0
# Mirror disagreement that speaks for something in front of the face: at 0 and per degree of yaw.
_OCCLUDED, _OCCLUDED_PER_DEGREE = 0.010, 0.0002
# Influence of frames without landmarks inside a driving video: the smoothness fills them.
_UNSEEN = 1e-4
_DEFAULT_FPS = 30.0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: the networks are so small that more mostly wait for each other.

    On a busy machine two threads took six times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def track_subject(
    source: str | Path,
    output_dir: str | Path,
    head_model_dir: str | Path,
    settings: TrackingSettings,
    callback: ProgressCallback | None = None,
    *,
    device: str | torch.device = "cpu",
    correspondence: str | Path | None = None,
) -> None:
    """Tracks the photos or the video of a subject.

    Writes `fit.npz`, `reference_images.json`, `images/{camera}/*.png` (upright),
    `bg/{camera}/*.png` (mattes), `overlay.png`, for videos also `overlay.mp4`, `cam_static.npz` and
    `cam_orbit.npz`, `correspondence.npz` and `.png`, and `quality.json` (last).

    Args:
        source: photo, folder of photos, video, or folder with cam0, cam1, ... (see video_input).
        output_dir: the subject's tracking folder.
        head_model_dir: folder written by `prepare_head_model`.
        settings: what to use of the source and how to fit.
        callback: called after every frame and every stage.
        device: where the networks run.
        correspondence: cache of the landmarks on the head model; default: in `output_dir`.

    Raises:
        InputFileError: nothing readable there, or no usable frame; names the reasons.
    """
    output_dir = Path(output_dir)
    installation = _check_backend(source, settings)
    recording = open_recording(source, settings, REFERENCE_FRAME_LIMIT)
    setup = _Setup.load(head_model_dir, output_dir, correspondence, settings, device)
    for name in ("images", "bg"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    pictures = _PictureWriter(output_dir, device, recording)
    begin = time.monotonic()
    observed = _observe(recording, setup, callback, pictures.take)
    if installation is None:
        result = _fit_usable(recording, setup, observed, keep_gaps=False)
    else:
        work = output_dir / PIXEL3DMM_FOLDER
        result = _fit_external(recording, setup, observed, installation, work, callback)
    pictures.settle(result)
    chosen = _choose_references(recording, result, settings)
    references = [(result.tracking.camera_order[o.camera], result.row[o.timestep]) for o in chosen]

    write_fit(output_dir / "fit.npz", result.tracking)
    write_reference_list(output_dir / "reference_images.json", references)
    if recording.continuous:
        _write_camera_paths(output_dir, result.tracking)
    figures = _overlay(output_dir, recording, setup, result, chosen, pictures, callback)
    _write_quality(output_dir, recording, setup, result, figures, time.monotonic() - begin)


@_one_thread()
def track_driving(
    source: str | Path,
    output_dir: str | Path,
    head_model_dir: str | Path,
    settings: TrackingSettings,
    callback: ProgressCallback | None = None,
    *,
    device: str | torch.device = "cpu",
    correspondence: str | Path | None = None,
) -> None:
    """Tracks a driving video: head pose, expression and gaze of every frame.

    Writes `fit.npz`, `cam_static.npz`, `cam_orbit.npz`, `trajectory.npz` (the static one),
    `overlay.mp4`, `overlay.png` and `quality.json` (last). Frames without a usable face between
    others are filled smoothly, so that the timing stays; those at both ends are cut off.

    Args: as `track_subject`; the source is one video or a folder of consecutive pictures.

    Raises:
        InputFileError: nothing readable there, several cameras, or no usable frame.
    """
    output_dir = Path(output_dir)
    installation = _check_backend(source, settings)
    recording = open_recording(source, settings)
    if len(recording.cameras) > 1:
        raise InputFileError(
            source, f"{len(recording.cameras)} cameras or picture sizes", "one driving video"
        )
    if not recording.continuous:
        # Pictures of one size that drive an avatar are the frames of a film.
        recording = replace(recording, fps=_DEFAULT_FPS)
    setup = _Setup.load(head_model_dir, output_dir, correspondence, settings, device)
    begin = time.monotonic()
    observed = _observe(recording, setup, callback, None)
    if installation is None:
        result = _fit_usable(recording, setup, observed, keep_gaps=True)
    else:
        work = output_dir / PIXEL3DMM_FOLDER
        result = _fit_external(recording, setup, observed, installation, work, callback, True)
    write_fit(output_dir / "fit.npz", result.tracking)
    static = _write_camera_paths(output_dir, result.tracking)
    write_trajectory(output_dir / "trajectory.npz", static)
    figures = _overlay(output_dir, recording, setup, result, [], None, callback)
    _write_quality(output_dir, recording, setup, result, figures, time.monotonic() - begin)


def _check_backend(source: str | Path, settings: TrackingSettings) -> Installation | None:
    """The external tracker if that is asked for, None for the built-in one."""
    if settings.backend == "precomputed":
        raise UserError(
            f"{source}: tracking.backend is 'precomputed', so a ready fit is expected. Give one, "
            "or use tracking.backend: landmarks."
        )
    if settings.backend == "pixel3dmm":
        return find_installation(settings.pixel3dmm_path)
    return None


@dataclass(frozen=True)
class _Setup:
    """What does not depend on the recording."""

    settings: TrackingSettings
    head_model_dir: Path
    model: LandmarkModel
    observer: FaceObserver

    @classmethod
    def load(
        cls,
        head_model_dir: str | Path,
        output_dir: Path,
        correspondence: str | Path | None,
        settings: TrackingSettings,
        device: str | torch.device,
    ) -> _Setup:
        cache = Path(correspondence or output_dir / CORRESPONDENCE_FILE)
        placed = load_or_compute(head_model_dir, cache, device)
        model = LandmarkModel(HeadModel.load(head_model_dir, mouth=False), placed)
        return cls(settings, Path(head_model_dir), model, FaceObserver(settings, device))


@dataclass
class TrackedFrames:
    """Result of the fit.

    tracking: the frames that are kept; row: recording timestep -> row of the fit; observed: all
    observations, left-out ones with their problem; residual per (camera, timestep).
    """

    tracking: Tracking
    row: dict[int, int]
    observed: list[Observed]
    residual: dict[tuple[int, int], float]
    seconds: float

    @property
    def used(self) -> list[Observed]:
        """Observations that the fit contains and that are good."""
        return [o for o in self.observed if o.problem is None and o.timestep in self.row]


def _observe(
    recording: Recording,
    setup: _Setup,
    callback: ProgressCallback | None,
    take: Any,
) -> list[Observed]:
    total = sum(camera.num_frames for camera in recording.cameras)
    observed: list[Observed] = []
    for index, camera in enumerate(recording.cameras):
        for seen, image in setup.observer.observe(camera, index, recording.continuous):
            observed.append(seen)
            if take is not None:
                take(seen, image)
            if callback is not None:
                callback(Progress(len(observed), total, "frame"))
    return observed


def _camera_of(camera: RecordedCamera, settings: TrackingSettings) -> Camera:
    known = camera.calibration
    if known is not None:
        return Camera(camera.size, (known.fx + known.fy) / 2, 0.0, known.extr, (known.cx, known.cy))
    if settings.focal_px is not None:
        return Camera(camera.size, settings.focal_px)
    return Camera(camera.size, camera.focal_px, _EXIF_UNCERTAINTY)


def _fit_usable(
    recording: Recording, setup: _Setup, observed: list[Observed], keep_gaps: bool
) -> TrackedFrames:
    """Fits, leaves out what does not fit, and fits again if that changed anything."""
    begin = time.monotonic()
    for _ in range(3):
        usable = [o for o in observed if o.problem is None]
        if not usable:
            raise _no_usable_frame(recording, observed)
        result = _fit_once(recording, setup, observed, keep_gaps)
        worse = _mark_misfits(result, usable)
        if not worse:
            break
    else:
        if not any(o.problem is None for o in observed):
            raise _no_usable_frame(recording, observed)
        result = _fit_once(recording, setup, observed, keep_gaps)
    for o in observed:
        if o.problem is not None:
            logger.warning(
                "%s, %s: left out: %s", recording.cameras[o.camera].name, o.name, o.problem
            )
    result.seconds = time.monotonic() - begin
    return result


def _fit_external(
    recording: Recording,
    setup: _Setup,
    observed: list[Observed],
    installation: Installation,
    work_dir: Path,
    callback: ProgressCallback | None,
    keep_all: bool = False,
) -> TrackedFrames:
    """Head from the external tracker, gaze and judgement of the frames from the landmarks."""
    begin = time.monotonic()
    usable = [o for o in observed if o.problem is None]
    if not usable:
        raise _no_usable_frame(recording, observed)
    tracking = fit_with_pixel3dmm(recording, installation, setup.head_model_dir, work_dir, callback)
    steps = sorted(o.timestep for o in usable)
    kept = tracking.frames(0, None) if keep_all else _rows(tracking, steps)
    number = {t: (t if keep_all else i) for i, t in enumerate(steps)}
    fit = LandmarkFit(
        shape=np.asarray(tracking.shape, np.float64),
        expr=np.asarray(tracking.expr[steps], np.float64),
        rotation=Rotation.from_rotvec(tracking.rot[steps]).as_matrix(),
        tra=np.asarray(tracking.tra[steps], np.float64),
        focal=np.asarray(tracking.fx[:, 0], np.float64),
        extr=np.asarray(tracking.extr, np.float64),
        eye_rot=np.zeros((len(steps), 3)),
    )
    center = (float(tracking.cx[0, 0]), float(tracking.cy[0, 0]))
    camera = Camera(recording.cameras[0].size, float(tracking.fx[0, 0]), 0.0, fit.extr[0], center)
    observations = [
        Observation(i, 0, o.landmarks.points)
        for i, o in enumerate(usable)
        if o.landmarks is not None
    ]
    fitter = LandmarkFitter(setup.model, [camera], observations, len(steps), recording.fps)
    gaze = estimate_gaze(fitter, fit, recording.continuous, recording.fps)
    rows = [number[t] for t in steps]
    kept.eye_rot[rows] = gaze.eye_rot
    figures = fitter.residual_figures(fit)
    residual = {(o.camera, o.timestep): float(r) for o, r in zip(usable, figures, strict=True)}
    return TrackedFrames(kept, number, observed, residual, time.monotonic() - begin)


def _rows(tracking: Tracking, rows: Sequence[int]) -> Tracking:
    """The fit restricted to some frames."""
    names = ("expr", "rot", "tra", "eye_rot", "neck_rot")
    return replace(tracking, **{name: getattr(tracking, name)[list(rows)] for name in names})


def _no_usable_frame(recording: Recording, observed: Sequence[Observed]) -> InputFileError:
    reasons: dict[str, int] = {}
    for o in observed:
        reason = o.problem or "unknown"
        reasons[reason] = reasons.get(reason, 0) + 1
    common = sorted(reasons.items(), key=lambda item: -item[1])[:4]
    listed = "; ".join(f"{reason} ({count} x)" if count > 1 else reason for reason, count in common)
    return InputFileError(
        recording.source,
        f"no usable frame among {len(observed)} ({listed})",
        "at least one sharp picture of a face, turned by less than 80 degrees, upright",
    )


def _mark_misfits(result: TrackedFrames, usable: list[Observed]) -> bool:
    """Gives frames that the model cannot explain a problem; True if there were any."""
    found = False
    for o in usable:
        if o.timestep not in result.row:
            continue
        residual = result.residual[o.camera, o.timestep]
        yaw, _ = head_angles(result.tracking, result.row[o.timestep], o.camera)
        if residual > MAX_RESIDUAL:
            o.problem = (
                f"the head model does not fit the landmarks ({100 * residual:.1f} % of the face; "
                f"up to {100 * MAX_RESIDUAL:.0f} % is usual): hidden or no real face"
            )
        elif abs(yaw) > MAX_YAW_DEG:
            o.problem = f"face turned away too far ({yaw:.0f} degrees)"
        else:
            continue
        found = True
    return found


def _fit_once(
    recording: Recording, setup: _Setup, observed: list[Observed], keep_gaps: bool
) -> TrackedFrames:
    usable = [o for o in observed if o.problem is None]
    steps = sorted({o.timestep for o in usable})
    if recording.continuous:
        # Gaps stay in the fit, so that neighbours in it are neighbours in time.
        steps = list(range(steps[0], steps[-1] + 1))
    number = {t: i for i, t in enumerate(steps)}
    # Photo groups of different size are one camera after the other; those without frames stay out.
    observations = []
    for o in usable:
        assert o.landmarks is not None  # by construction of `problem`
        observations.append(Observation(number[o.timestep], o.camera, o.landmarks.points))
    observations += _fill_gaps(usable, number)
    settings = setup.settings
    cameras = [_camera_of(camera, settings) for camera in recording.cameras]
    if not recording.continuous and len({o.timestep for o in usable}) == len(usable):
        # Independent photos: the pose of a camera means nothing, every head has its own.
        cameras = [c if c.extr is not None else replace(c, extr=np.eye(4)) for c in cameras]
    fitter = LandmarkFitter(
        setup.model,
        cameras,
        observations,
        len(steps),
        recording.fps,
        settings.smoothness if recording.continuous else 0.0,
    )
    fit = fitter.fit()
    gaze = estimate_gaze(fitter, fit, recording.continuous, recording.fps)
    fit = with_eyes(fit, gaze.eye_rot)
    fit = fitter.refine(fit, setup.model.eye_offset(fit.shape, fit.expr, fit.eye_rot))

    residual = {
        (o.camera, o.timestep): float(r)
        for o, r in zip(usable, fit.residuals[: len(usable)], strict=True)
    }
    tracking = _to_tracking(recording, cameras, fit)
    if recording.continuous and not keep_gaps:
        tracking = _rows(tracking, [number[t] for t in sorted({o.timestep for o in usable})])
        number = {t: i for i, t in enumerate(sorted({o.timestep for o in usable}))}
    return TrackedFrames(tracking, number, observed, residual, 0.0)


def _fill_gaps(usable: list[Observed], number: dict[int, int]) -> list[Observation]:
    """Interpolated landmarks of almost no weight for frames that nothing shows."""
    shown = {o.timestep for o in usable}
    missing = [t for t in number if t not in shown]
    if not missing:
        return []
    first = [o for o in usable if o.camera == usable[0].camera]
    times = np.array([o.timestep for o in first])
    points = np.stack([o.landmarks.points for o in first if o.landmarks is not None])
    filled = []
    for t in missing:
        after = int(np.searchsorted(times, t))
        low, high = max(after - 1, 0), min(after, len(times) - 1)
        share = (t - times[low]) / max(times[high] - times[low], 1)
        between = (1 - share) * points[low] + share * points[high]
        filled.append(Observation(number[t], first[0].camera, between, _UNSEEN))
    return filled


def _to_tracking(recording: Recording, cameras: list[Camera], fit: LandmarkFit) -> Tracking:
    count = len(cameras)
    center = np.array([c.center or (c.size[1] / 2, c.size[0] / 2) for c in cameras])
    ratio = np.ones(count)
    for i, camera in enumerate(recording.cameras):
        if camera.calibration is not None:
            ratio[i] = camera.calibration.fx / ((camera.calibration.fx + camera.calibration.fy) / 2)
    return Tracking(
        shape=fit.shape.astype(np.float32),
        expr=fit.expr.astype(np.float32),
        rot=fit.rot.astype(np.float32),
        tra=fit.tra.astype(np.float32),
        eye_rot=fit.eye_rot.astype(np.float32),
        neck_rot=np.zeros((len(fit.expr), 3), np.float32),
        fx=(fit.focal * ratio)[:, None].astype(np.float32),
        fy=(fit.focal * (2.0 - ratio))[:, None].astype(np.float32),
        cx=center[:, :1].astype(np.float32),
        cy=center[:, 1:].astype(np.float32),
        extr=fit.extr.astype(np.float32),
        resolutions=np.array([c.size for c in cameras], np.int64),
        camera_order=tuple(camera.name for camera in recording.cameras),
        fps=recording.fps,
    )


def _choose_references(
    recording: Recording, result: TrackedFrames, settings: TrackingSettings
) -> list[Observed]:
    used = result.used
    candidates = []
    for o in used:
        yaw, pitch = head_angles(result.tracking, result.row[o.timestep], o.camera)
        assert o.landmarks is not None  # used frames have landmarks
        if o.landmarks.asymmetry > _OCCLUDED + _OCCLUDED_PER_DEGREE * abs(yaw):
            o.flags.append("part of the face may be hidden")
        expr = result.tracking.expr[result.row[o.timestep]].astype(np.float64)
        candidates.append(
            Candidate(o.camera, o.timestep, yaw, pitch, expr, o.sharpness, o.eyes_closed)
        )
    if recording.continuous and any(not c.eyes_closed for c in candidates):
        keep = [i for i, c in enumerate(candidates) if not c.eyes_closed]
    else:
        keep = list(range(len(candidates)))
    chosen = select_references(
        [candidates[i] for i in keep],
        settings.max_references,
        MIN_DIFFERENCE if recording.continuous else 0.0,
    )
    return [used[keep[i]] for i in chosen]


class _PictureWriter:
    """Writes pictures and mattes while frames are decoded, and removes those left out later.

    A frame of a fit is found by its position in the folder of its camera, so names start with the
    timestep, and a camera that misses moments gets the pictures of the others as placeholders.
    """

    def __init__(self, output_dir: Path, device: str | torch.device, recording: Recording) -> None:
        self._output_dir, self._recording = output_dir, recording
        self._matting = PortraitMatting(device)
        self._coverage: dict[tuple[int, int], float] = {}

    def path(self, kind: str, camera: int, timestep: int) -> Path:
        """File of a frame."""
        name = self._recording.cameras[camera].name
        return self._output_dir / kind / name / f"{timestep:05d}.png"

    def take(self, seen: Observed, image: NDArray[np.uint8]) -> None:
        """Writes a usable frame."""
        if seen.problem is not None:
            return
        matte = self._matting.matte(image, seen.face_box)
        write_image(self.path("images", seen.camera, seen.timestep), image)
        write_image(self.path("bg", seen.camera, seen.timestep), matte)

    def settle(self, result: TrackedFrames) -> None:
        """Makes the t-th picture of every camera that of row t of the fit."""
        good = {(o.camera, o.timestep) for o in result.used}
        for kind in ("images", "bg"):
            for o in result.observed:
                if (o.camera, o.timestep) not in good:
                    self.path(kind, o.camera, o.timestep).unlink(missing_ok=True)
            for camera in {o.camera for o in result.used}:
                for timestep in result.row:
                    if (camera, timestep) not in good:
                        other = next(c for c, t in good if t == timestep)
                        shutil.copyfile(
                            self.path(kind, other, timestep), self.path(kind, camera, timestep)
                        )


def _write_camera_paths(output_dir: Path, fit: Tracking) -> Trajectory:
    fps = fit.fps or _DEFAULT_FPS
    height, width = (int(side) for side in fit.resolutions[0])
    fx, fy, cx, cy = (
        np.repeat(getattr(fit, name)[0], fit.num_frames) for name in ("fx", "fy", "cx", "cy")
    )
    static = Trajectory(
        static_extrinsics(fit.extr[0], fit.num_frames), fx, fy, cx, cy, (height, width), fps
    )
    orbit = replace(static, extr=orbit_extrinsics(fit.extr[0], fit.tra[0], fit.num_frames, fps))
    write_trajectory(output_dir / "cam_static.npz", static)
    write_trajectory(output_dir / "cam_orbit.npz", orbit)
    return static


def _overlay(
    output_dir: Path,
    recording: Recording,
    setup: _Setup,
    result: TrackedFrames,
    references: list[Observed],
    pictures: _PictureWriter | None,
    callback: ProgressCallback | None,
) -> dict[tuple[int, int], dict[str, Any]]:
    """Draws mesh and landmarks over the frames; figures of every frame in the fit."""
    from cap4d_core.files.images import read_grey

    head_model = HeadModel.load(setup.head_model_dir)
    template = load_flame_template(setup.head_model_dir)
    by_frame = {(o.camera, o.timestep): o for o in result.observed}
    places = {(o.camera, o.timestep): i for i, o in enumerate(references)}
    figures: dict[tuple[int, int], dict[str, Any]] = {}
    total = sum(camera.num_frames for camera in recording.cameras)
    done = 0
    with OverlayWriter(output_dir, recording.fps, template.faces, places or None) as writer:
        for index, camera in enumerate(recording.cameras):
            for timestep, _, image in camera.frames():
                done += 1
                if callback is not None:
                    callback(Progress(done, total, "overlay"))
                key = (index, timestep)
                if timestep not in result.row:
                    writer.add(key, image, None, None)
                    continue
                row = result.row[timestep]
                head = project_head(head_model, template, result.tracking, row, index)
                seen = by_frame[key]
                landmarks = None if seen.landmarks is None else seen.landmarks.points
                writer.add(key, image, head, landmarks)
                if seen.problem is not None:
                    continue
                matte = None
                if pictures is not None and key in places:
                    matte = read_grey(pictures.path("bg", index, timestep))
                figures[key] = frame_figures(
                    result.tracking, head, template.faces, row, index, matte
                )
    return figures


def _write_quality(
    output_dir: Path,
    recording: Recording,
    setup: _Setup,
    result: TrackedFrames,
    figures: dict[tuple[int, int], dict[str, Any]],
    seconds: float,
) -> None:
    frames = []
    for o in result.observed:
        entry: dict[str, Any] = {
            "camera": recording.cameras[o.camera].name,
            "name": o.name,
            "timestep": result.row.get(o.timestep) if o.problem is None else None,
            "used": o.problem is None,
        }
        if o.landmarks is not None:
            entry["confidence"] = round(o.landmarks.score, 3)
            entry["mirror_disagreement"] = round(o.landmarks.asymmetry, 4)
            entry["sharpness"] = round(o.sharpness, 4)
            entry["eye_openness"] = round(o.openness, 3)
        if (o.camera, o.timestep) in result.residual:
            entry["landmark_residual"] = round(result.residual[o.camera, o.timestep], 5)
        measured = figures.get((o.camera, o.timestep), {})
        known = ("camera", "timestep", "flags")
        entry.update({key: value for key, value in measured.items() if key not in known})
        entry["flags"] = [*o.flags, *measured.get("flags", [])]
        if o.problem is not None:
            entry["left_out"] = o.problem
        frames.append(entry)
    used = [result.residual[o.camera, o.timestep] for o in result.used]
    fit = result.tracking
    content: dict[str, Any] = {
        "source": str(recording.source.resolve()),
        "backend": setup.settings.backend,
        "num_frames": len(result.observed),
        "num_used": len(used),
        "fps": recording.fps,
        "focal_px": [round(float(v), 1) for v in fit.fx[:, 0]],
        "focal_from": [
            "calibration" if c.calibration is not None
            else "settings" if setup.settings.focal_px is not None
            else "estimate with EXIF" if c.focal_px is not None
            else "estimate"
            for c in recording.cameras
        ],
        "median_landmark_residual": round(float(np.median(used)), 5),
        "max_abs_shape": round(float(np.abs(fit.shape).max()), 3),
        "max_abs_expression": round(float(np.abs(fit.expr).max()), 3),
        "fit_seconds": round(result.seconds, 2),
        "seconds": round(seconds, 2),
        "frames": frames,
    }  # fmt: skip
    if recording.continuous:
        video = recording.cameras[0].video
        if video is not None and recording.fps:
            # Where the first row of the fit is in the video: frames at its beginning may be left
            # out. Rows are consecutive there.
            timestep = min(result.row, key=lambda t: result.row[t])
            skipped = timestep - result.row[timestep]
            content["video_file"] = video.name
            content["start_s"] = round(recording.cameras[0].start_s + skipped / recording.fps, 6)
        content["frames_per_second_tracked"] = round(len(result.observed) / max(seconds, 1e-6), 2)
        content["flags"] = motion_flags(fit)
        content.update(smoothness_figures(fit))
    write_json(output_dir / "quality.json", content)


def smoothness_figures(fit: Tracking) -> dict[str, float]:
    """Median size of the second difference over frames: head rotation (degrees), position (mm)."""
    if fit.num_frames < 3:
        return {}
    rotation = Rotation.from_rotvec(np.asarray(fit.rot, np.float64))
    velocity = (rotation[1:] * rotation[:-1].inv()).as_rotvec()
    turn = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
    shift = np.linalg.norm(np.diff(np.asarray(fit.tra, np.float64), n=2, axis=0), axis=1)
    return {
        "median_rotation_acceleration_deg": round(float(np.degrees(np.median(turn))), 4),
        "median_translation_acceleration_mm": round(1e3 * float(np.median(shift)), 4),
    }
