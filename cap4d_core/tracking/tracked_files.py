"""What the tracker leaves in its folder: pictures, mattes, camera paths, overlay, figures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.files.basic import write_json
from cap4d_core.files.images import read_grey, write_image
from cap4d_core.files.tracking import Tracking, Trajectory, write_trajectory
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.geometry.cameras import orbit_extrinsics, static_extrinsics
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.tracking.fit_frames import TrackedFrames, TrackerSetup
from cap4d_core.tracking.fit_overlay import OverlayWriter
from cap4d_core.tracking.matting import PortraitMatting
from cap4d_core.tracking.observe import Observed
from cap4d_core.tracking.quality import frame_figures, motion_flags, project_head
from cap4d_core.tracking.silhouette import distance_field
from cap4d_core.tracking.video_input import Recording

DEFAULT_FPS = 30.0


class PictureWriter:
    """Writes pictures and mattes while frames are decoded, and removes those left out later.

    A frame of a fit is found by its position in the folder of its camera, so names start with the
    timestep, and a camera that misses moments gets the pictures of the others as placeholders.
    """

    def __init__(
        self,
        output_dir: Path,
        device: str | torch.device,
        recording: Recording,
        networks: str | None = None,
    ) -> None:
        self._output_dir, self._recording = output_dir, recording
        self._matting = PortraitMatting(device, networks)
        self._coverage: dict[tuple[int, int], float] = {}

    def path(self, kind: str, camera: int, timestep: int) -> Path:
        """File of a frame."""
        name = self._recording.cameras[camera].name
        return self._output_dir / kind / name / f"{timestep:05d}.png"

    def take(self, seen: Observed, image: NDArray[np.uint8]) -> None:
        """Writes a usable frame and notes the edge of the person in it."""
        if seen.problem is not None:
            return
        matte = self._matting.matte(image, seen.face_box)
        if seen.landmarks is not None:
            face = seen.landmarks.points[:468, :2]
            seen.outline = distance_field(matte, face.min(axis=0), face.max(axis=0))
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


def write_camera_paths(output_dir: Path, fit: Tracking) -> Trajectory:
    """Writes `cam_static.npz` and `cam_orbit.npz`; returns the static path."""
    fps = fit.fps or DEFAULT_FPS
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


def write_overlay(
    output_dir: Path,
    recording: Recording,
    setup: TrackerSetup,
    result: TrackedFrames,
    references: list[Observed],
    pictures: PictureWriter | None,
    callback: ProgressCallback | None,
) -> dict[tuple[int, int], dict[str, Any]]:
    """Draws mesh and landmarks over the frames; figures of every frame in the fit."""
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


def write_quality(
    output_dir: Path,
    recording: Recording,
    setup: TrackerSetup,
    result: TrackedFrames,
    figures: dict[tuple[int, int], dict[str, Any]],
    seconds: float,
) -> None:
    """Writes `quality.json`.

    Args:
        output_dir: tracking folder.
        recording: what was tracked.
        setup: settings and models.
        result: the fit.
        figures: of `write_overlay`.
        seconds: the tracking took.
    """
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
