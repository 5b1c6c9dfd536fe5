"""Imports ready fits in the released formats: checks them, copies them, reports on them."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import atomic_path, sha256_file, write_json
from cap4d_core.files.images import read_grey, read_rgb, write_image
from cap4d_core.files.tracking import (
    Reference,
    Tracking,
    Trajectory,
    list_frames,
    read_fit,
    read_tracked_subject,
    read_trajectory,
    write_fit,
    write_reference_list,
    write_trajectory,
)
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_flame_template
from cap4d_core.geometry.cameras import orbit_extrinsics, static_extrinsics
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.overlay import (
    contact_sheet,
    draw_box,
    draw_head,
    fit_scale,
    shrink,
)
from cap4d_core.tracking.quality import (
    MIN_CROP_VISIBLE,
    ProjectedHead,
    frame_figures,
    head_angles,
    motion_flags,
    project_head,
)

logger = logging.getLogger(__name__)

DEFAULT_FPS = 24.0
_MAX_TILES = 24
_TILE_SIDE = 384
_STRIP_TILES = 8


def import_subject(
    source_folder: str | Path,
    output_dir: str | Path,
    settings: TrackingSettings,
    head_model_dir: str | Path,
    callback: ProgressCallback | None = None,
) -> None:
    """Imports a tracked subject: fit, reference frames and their mattes.

    Writes `fit.npz`, `reference_images.json`, `images/{camera}/*`, `bg/{camera}/*` (copies),
    `overlay.png` (the references with the head mesh and the crop box drawn over them) and
    `quality.json` (figures and flags per reference; written last).

    Args:
        source_folder: folder with fit.npz, reference_images.json, images/ and perhaps bg/.
        output_dir: the subject's tracking folder.
        settings: `foreign_basis` drops shape and expression coefficients.
        head_model_dir: folder written by `prepare_head_model`.
        callback: called after every reference.

    Raises:
        InputFileError: a file is missing or broken, sizes of picture, matte and fit differ, a matte
            is empty, or a head lies behind the camera or outside the picture.
    """
    source_folder, output_dir = Path(source_folder), Path(output_dir)
    subject = read_tracked_subject(source_folder)
    fit = _with_basis(subject.tracking, settings)
    head_model = HeadModel.load(head_model_dir)
    template = load_flame_template(head_model_dir)

    figures, tiles = [], []
    for number, reference in enumerate(subject.references):
        image, matte = _read_reference(reference, fit, source_folder / "fit.npz")
        head = project_head(head_model, template, fit, reference.timestep, reference.camera_index)
        entry = frame_figures(
            fit, head, template.faces, reference.timestep, reference.camera_index, matte
        )
        entry["image"] = reference.image.name
        _refuse_impossible(entry, head, reference, source_folder / "fit.npz")
        for flag in entry["flags"]:
            logger.warning("%s: %s", reference.image, flag)
        figures.append(entry)
        if number < _MAX_TILES and head.box is not None:
            scale = fit_scale((image.shape[0], image.shape[1]), _TILE_SIDE)
            tile = draw_head(shrink(image, scale), head, template.faces, scale)
            tiles.append(draw_box(tile, head.box, scale))
        if callback is not None:
            callback(Progress(number + 1, len(subject.references), "reference"))
    if all(reference.matte is None for reference in subject.references):
        logger.warning(
            "%s: no mattes (bg/): the background counts as part of the head", source_folder
        )

    cameras = {reference.camera for reference in subject.references}
    _copy_frames(source_folder, output_dir, "images", cameras)
    _copy_frames(source_folder, output_dir, "bg", cameras)
    write_fit(output_dir / "fit.npz", fit)
    write_reference_list(
        output_dir / "reference_images.json",
        [(reference.camera, reference.timestep) for reference in subject.references],
    )
    write_image(output_dir / "overlay.png", contact_sheet(tiles, columns=4))
    write_json(
        output_dir / "quality.json",
        {
            "source": str(source_folder.resolve()),
            "fit_sha256": sha256_file(source_folder / "fit.npz"),
            "foreign_basis": settings.foreign_basis,
            "references": figures,
        },
    )


def import_driving(
    fit_path: str | Path,
    trajectory_path: str | Path | None,
    output_dir: str | Path,
    start_frame: int,
    num_frames: int | None,
    settings: TrackingSettings,
    head_model_dir: str | Path,
) -> None:
    """Imports a driving sequence, or a part of it.

    Writes `fit.npz`; the camera paths `cam_static.npz` (the recording camera), `cam_orbit.npz` (a
    swing around the head) and `trajectory.npz` (the given one cut to the same frames, else the
    static one); `overlay.png` (film strip of the head) and `quality.json` (written last).

    Args:
        fit_path: fit.npz, or the folder that holds it.
        trajectory_path: camera path with one camera per frame of the whole fit, or None.
        output_dir: the driving sequence's folder.
        start_frame: first frame to take.
        num_frames: how many; None or more than there are = to the end.
        settings: `foreign_basis` drops expression coefficients.
        head_model_dir: folder written by `prepare_head_model`.

    Raises:
        InputFileError: a file is missing or broken, or has no frame `start_frame`.
    """
    fit_path, output_dir = Path(fit_path), Path(output_dir)
    if fit_path.is_dir():
        fit_path = fit_path / "fit.npz"
    whole = read_fit(fit_path)
    if not 0 <= start_frame < whole.num_frames:
        raise InputFileError(
            fit_path,
            f"{whole.num_frames} frames",
            f"more than {start_frame}, the start_frame of this driving sequence",
        )
    stop = whole.num_frames
    if num_frames is not None:
        if start_frame + num_frames > stop:
            logger.warning(
                "%s: %d frames from frame %d asked for, %d are there",
                fit_path, num_frames, start_frame, stop - start_frame,
            )  # fmt: skip
        stop = min(stop, start_frame + num_frames)
    fit = _with_basis(whole.frames(start_frame, stop), settings)

    static = _camera_path(fit, static_extrinsics(fit.extr[0], fit.num_frames))
    orbit = _camera_path(
        fit, orbit_extrinsics(fit.extr[0], fit.tra[0], fit.num_frames, fit.fps or DEFAULT_FPS)
    )
    given = static
    if trajectory_path is not None:
        given = _cut_trajectory(Path(trajectory_path), start_frame, fit.num_frames)

    head_model = HeadModel.load(head_model_dir)
    template = load_flame_template(head_model_dir)
    flags = motion_flags(fit)
    for flag in flags:
        logger.warning("%s: %s", fit_path, flag)
    write_fit(output_dir / "fit.npz", fit)
    write_trajectory(output_dir / "cam_static.npz", static)
    write_trajectory(output_dir / "cam_orbit.npz", orbit)
    write_trajectory(output_dir / "trajectory.npz", given)
    write_image(output_dir / "overlay.png", _film_strip(head_model, template, fit, given, fit_path))
    angles = np.round([head_angles(fit, t, 0) for t in range(fit.num_frames)], 2)
    write_json(
        output_dir / "quality.json",
        {
            "source": str(fit_path.resolve()),
            "fit_sha256": sha256_file(fit_path),
            "start_frame": start_frame,
            "num_frames": fit.num_frames,
            "fps": fit.fps,
            "foreign_basis": settings.foreign_basis,
            "yaw_deg": angles[:, 0].tolist(),
            "pitch_deg": angles[:, 1].tolist(),
            "max_abs_expression": round(float(np.abs(fit.expr).max()), 3),
            "flags": flags,
        },
    )


def _with_basis(fit: Tracking, settings: TrackingSettings) -> Tracking:
    return fit.without_coefficients() if settings.foreign_basis else fit


def _read_reference(
    reference: Reference, fit: Tracking, fit_path: Path
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    image = read_rgb(reference.image)
    expected = tuple(int(side) for side in fit.resolutions[reference.camera_index])
    if image.shape[:2] != expected:
        raise InputFileError(
            reference.image,
            f"a picture of {image.shape[0]} x {image.shape[1]} (height x width)",
            f"{expected[0]} x {expected[1]}, the 'resolutions' of {fit_path}",
            "The fit belongs to the picture in its original size and orientation.",
        )
    if reference.matte is None:
        return image, None
    matte = read_grey(reference.matte)
    if matte.shape != image.shape[:2]:
        raise InputFileError(
            reference.matte,
            f"a matte of {matte.shape[0]} x {matte.shape[1]} (height x width)",
            f"{image.shape[0]} x {image.shape[1]}, the size of {reference.image}",
        )
    if matte.max() == 0:
        raise InputFileError(
            reference.matte,
            "an empty matte (all 0)",
            "255 = foreground",
            "Remove the folder bg/ to go without mattes.",
        )
    return image, matte


def _refuse_impossible(
    entry: dict[str, Any], head: ProjectedHead, reference: Reference, fit_path: Path
) -> None:
    where = f"frame {reference.timestep} of camera {reference.camera}"
    if head.box is None:
        raise InputFileError(
            fit_path,
            f"a head that is not in front of the camera in {where} ({head.depth_m:.3f} m)",
            "a positive depth",
            "'extr' must map world to camera in OpenCV axes, 'rot' and 'tra' pose the head with +y "
            "up and +z out of the face.",
        )
    if entry["crop_inside_image"] < MIN_CROP_VISIBLE:
        raise InputFileError(
            fit_path,
            f"a head outside the picture in {where} (crop box {entry['crop_box']})",
            f"a head inside {reference.image.name}",
            "Intrinsics must be in pixels of the full picture.",
        )


def _copy_frames(source: Path, output_dir: Path, kind: str, cameras: set[str]) -> None:
    """Copies all frames of some cameras: a frame is found by its position among them."""
    target = output_dir / kind
    if target.exists():
        shutil.rmtree(target)
    for camera in sorted(cameras):
        if (source / kind / camera).is_dir():
            for file in list_frames(source / kind / camera):
                with atomic_path(target / camera / file.name) as temporary:
                    shutil.copyfile(file, temporary)


def _camera_path(fit: Tracking, extr: NDArray[Any]) -> Trajectory:
    height, width = (int(side) for side in fit.resolutions[0])
    fx, fy, cx, cy = (
        np.repeat(getattr(fit, name)[0], fit.num_frames) for name in ("fx", "fy", "cx", "cy")
    )
    return Trajectory(extr, fx, fy, cx, cy, (height, width), fit.fps or DEFAULT_FPS)


def _cut_trajectory(path: Path, start: int, num_frames: int) -> Trajectory:
    """Cameras of frames start..start+num_frames-1; a shorter path ends with its last camera."""
    path_cameras = read_trajectory(path)
    length = len(path_cameras.extr)
    if length < start + num_frames:
        logger.warning(
            "%s: %d cameras for frames up to %d; the last camera is kept",
            path, length, start + num_frames - 1,
        )  # fmt: skip
    index = np.minimum(np.arange(start, start + num_frames), length - 1)
    return replace(
        path_cameras,
        **{name: getattr(path_cameras, name)[index] for name in ("extr", "fx", "fy", "cx", "cy")},
    )


def _film_strip(
    head_model: HeadModel,
    template: HeadTemplate,
    fit: Tracking,
    trajectory: Trajectory,
    fit_path: Path,
) -> NDArray[np.uint8]:
    """Upper row: the recording camera; lower row: the trajectory."""
    count = min(_STRIP_TILES, fit.num_frames)
    frames = np.linspace(0, fit.num_frames - 1, count).round().astype(int)
    rows = []
    for along_trajectory in (False, True):
        for frame in frames:
            seen = _through_trajectory(fit, trajectory, int(frame)) if along_trajectory else fit
            height, width = (int(side) for side in seen.resolutions[0])
            scale = fit_scale((height, width), _TILE_SIDE // 2)
            tile = np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 0.93)
            head = project_head(head_model, template, seen, int(frame), 0)
            if head.box is None:
                logger.warning("%s: frame %d is not in front of the camera", fit_path, frame)
            else:
                tile = draw_head(tile, head, template.faces, scale, opacity=1.0)
            rows.append(tile)
    return contact_sheet(rows, columns=count)


def _through_trajectory(fit: Tracking, trajectory: Trajectory, frame: int) -> Tracking:
    return replace(
        fit,
        extr=np.asarray(trajectory.extr[frame : frame + 1], np.float32),
        resolutions=np.array([trajectory.resolution], np.int64),
        **{
            name: getattr(trajectory, name)[frame : frame + 1, None]
            for name in ("fx", "fy", "cx", "cy")
        },
    )
