"""The built-in tracker: photos or video to a fit of the head model.

Stages: look at every frame (observe), place the landmarks on the head model (correspondence), fit
(fit_frames, landmark_fit, gaze), sort out what did not fit, choose references (selection), write
the tracking folder with mattes, overlays and figures (tracked_files).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.tracking import write_fit, write_reference_list, write_trajectory
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.fit_frames import (
    TrackedFrames,
    TrackerSetup,
    fit_external,
    fit_usable,
    usual_asymmetry,
)
from cap4d_core.tracking.observe import Observed
from cap4d_core.tracking.pixel3dmm_installation import Installation, find_installation
from cap4d_core.tracking.quality import head_angles
from cap4d_core.tracking.selection import MIN_DIFFERENCE, Candidate, select_references
from cap4d_core.tracking.tracked_files import (
    DEFAULT_FPS,
    PictureWriter,
    write_camera_paths,
    write_overlay,
    write_quality,
)
from cap4d_core.tracking.video_input import Recording, open_recording

PIXEL3DMM_FOLDER = "pixel3dmm"
# Reference videos longer than this are thinned out.
REFERENCE_FRAME_LIMIT = 300


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
    setup = TrackerSetup.load(head_model_dir, output_dir, correspondence, settings, device)
    for name in ("images", "bg"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    pictures = PictureWriter(output_dir, device, recording, settings.networks)
    begin = time.monotonic()
    observed = _observe(recording, setup, callback, pictures.take)
    if installation is None:
        result = fit_usable(recording, setup, observed, keep_gaps=False)
    else:
        work = output_dir / PIXEL3DMM_FOLDER
        result = fit_external(recording, setup, observed, installation, work, callback)
    pictures.settle(result)
    chosen = _choose_references(recording, result, settings)
    references = [(result.tracking.camera_order[o.camera], result.row[o.timestep]) for o in chosen]

    write_fit(output_dir / "fit.npz", result.tracking)
    write_reference_list(output_dir / "reference_images.json", references)
    if recording.continuous:
        write_camera_paths(output_dir, result.tracking)
    figures = write_overlay(output_dir, recording, setup, result, chosen, pictures, callback)
    write_quality(output_dir, recording, setup, result, figures, time.monotonic() - begin)


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
        recording = replace(recording, fps=DEFAULT_FPS)
    setup = TrackerSetup.load(head_model_dir, output_dir, correspondence, settings, device)
    begin = time.monotonic()
    observed = _observe(recording, setup, callback, None)
    if installation is None:
        result = fit_usable(recording, setup, observed, keep_gaps=True)
    else:
        work = output_dir / PIXEL3DMM_FOLDER
        result = fit_external(recording, setup, observed, installation, work, callback, True)
    write_fit(output_dir / "fit.npz", result.tracking)
    static = write_camera_paths(output_dir, result.tracking)
    write_trajectory(output_dir / "trajectory.npz", static)
    figures = write_overlay(output_dir, recording, setup, result, [], None, callback)
    write_quality(output_dir, recording, setup, result, figures, time.monotonic() - begin)


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


def _observe(
    recording: Recording,
    setup: TrackerSetup,
    callback: ProgressCallback | None,
    take: Callable[[Observed, NDArray[np.uint8]], None] | None,
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


def _choose_references(
    recording: Recording, result: TrackedFrames, settings: TrackingSettings
) -> list[Observed]:
    used = result.used
    candidates = []
    for o in used:
        yaw, pitch = head_angles(result.tracking, result.row[o.timestep], o.camera)
        assert o.landmarks is not None  # used frames have landmarks
        if o.landmarks.asymmetry > usual_asymmetry(yaw):
            o.flags.append("part of the face may be hidden")
        expr = result.tracking.expr[result.row[o.timestep]].astype(np.float64)
        candidates.append(
            Candidate(o.camera, o.timestep, yaw, pitch, expr, o.sharpness, o.eyes_closed)
        )
    chosen = select_references(
        candidates, settings.max_references, MIN_DIFFERENCE if recording.continuous else 0.0
    )
    return [used[i] for i in chosen]
