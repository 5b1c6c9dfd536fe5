"""Fits the frames of a recording: which ones, with which cameras, and again without the misfits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.errors import InputFileError
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import ProgressCallback
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.gaze import estimate_gaze
from cap4d_core.tracking.landmark_fit import (
    Camera,
    LandmarkFit,
    LandmarkFitter,
    Observation,
    with_eyes,
)
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.observe import FaceObserver, Observed
from cap4d_core.tracking.pixel3dmm_installation import Installation
from cap4d_core.tracking.pixel3dmm_run import fit_with_pixel3dmm
from cap4d_core.tracking.quality import head_angles
from cap4d_core.tracking.video_input import RecordedCamera, Recording

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

CORRESPONDENCE_FILE = "correspondence.npz"
# EXIF gives the focal length, but cropped pictures keep the tag.
_EXIF_UNCERTAINTY = 0.3
# A fit whose landmarks are off by more than this share of the face is no fit.
MAX_RESIDUAL = 0.04
MAX_YAW_DEG = 80.0
# Mirror disagreement of faces with nothing in front of them: up to so much at 0 and per degree of
# yaw; beyond so many times that, too much is hidden.
_ASYMMETRY, _ASYMMETRY_PER_DEGREE, _HIDDEN = 0.010, 0.0002, 2.0
# Influence of frames without landmarks inside a driving video: the smoothness fills them.
_UNSEEN = 1e-4


@dataclass(frozen=True)
class TrackerSetup:
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
    ) -> TrackerSetup:
        """Loads head model and networks; see `cap4d_core.tracking.track.track_subject`."""
        cache = Path(correspondence or output_dir / CORRESPONDENCE_FILE)
        placed = load_or_compute(head_model_dir, cache, device, settings.networks)
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


def _camera_of(camera: RecordedCamera, settings: TrackingSettings) -> Camera:
    known = camera.calibration
    if known is not None:
        return Camera(camera.size, (known.fx + known.fy) / 2, 0.0, known.extr, (known.cx, known.cy))
    if settings.focal_px is not None:
        return Camera(camera.size, settings.focal_px)
    return Camera(camera.size, camera.focal_px, _EXIF_UNCERTAINTY)


def fit_usable(
    recording: Recording, setup: TrackerSetup, observed: list[Observed], keep_gaps: bool
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


def fit_external(
    recording: Recording,
    setup: TrackerSetup,
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


def usual_asymmetry(yaw_deg: float) -> float:
    """Mirror disagreement above which part of a face may be hidden."""
    return _ASYMMETRY + _ASYMMETRY_PER_DEGREE * abs(yaw_deg)


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
        elif o.landmarks is not None and o.landmarks.asymmetry > _HIDDEN * usual_asymmetry(yaw):
            o.problem = (
                f"part of the face is hidden (mirror disagreement {o.landmarks.asymmetry:.3f}; "
                f"up to {usual_asymmetry(yaw):.3f} is usual)"
            )
        else:
            continue
        found = True
    return found


def _fit_once(
    recording: Recording, setup: TrackerSetup, observed: list[Observed], keep_gaps: bool
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
        observations.append(
            Observation(number[o.timestep], o.camera, o.landmarks.points, outline=o.outline)
        )
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
