"""Fits of the head model to images, in the released formats.

Frames (all angles are rotation vectors in radians, lengths in metres):
    head space: +x to the viewer's right when the face looks at them, +y up, +z out of the face.
    OpenCV space: y and z negated. `extr` maps OpenCV world points to the camera (+z forward).
Image sizes are (height, width). Intrinsics are in pixels of the full image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, read_npz, take_array, write_json, write_npz
from cap4d_core.files.images import IMAGE_SUFFIXES

FloatArray = NDArray[np.floating[Any]]

NUM_SHAPE = 150
NUM_EXPRESSION = 65


@dataclass(frozen=True)
class Tracking:
    """Head-model parameters of T frames seen by C cameras (`fit.npz`).

    shape (150,); expr (T, 65); rot, tra, eye_rot, neck_rot (T, 3); fx, fy, cx, cy (C, 1) pixels;
    extr (C, 4, 4) world-to-camera; resolutions (C, 2) as (height, width); camera_order: C names;
    fps: frames per second, None when the frames are independent photos or it is not recorded.
    """

    shape: FloatArray
    expr: FloatArray
    rot: FloatArray
    tra: FloatArray
    eye_rot: FloatArray
    neck_rot: FloatArray
    fx: FloatArray
    fy: FloatArray
    cx: FloatArray
    cy: FloatArray
    extr: FloatArray
    resolutions: NDArray[np.int64]
    camera_order: tuple[str, ...]
    fps: float | None = None

    @property
    def num_frames(self) -> int:
        """T, the number of frames."""
        return len(self.expr)

    def frames(self, start: int, stop: int | None) -> Tracking:
        """The fit restricted to frames start..stop-1; cameras unchanged."""
        cut = slice(start, stop)
        return replace(
            self,
            expr=self.expr[cut],
            rot=self.rot[cut],
            tra=self.tra[cut],
            eye_rot=self.eye_rot[cut],
            neck_rot=self.neck_rot[cut],
        )

    def without_coefficients(self) -> Tracking:
        """Shape and expression set to zero, blink kept.

        For fits made with a head model of another basis: poses, cameras, gaze and the blink (an own
        blendshape in the last expression column) carry over, shape and expression do not.
        """
        expr = np.zeros_like(self.expr)
        expr[:, -1] = self.expr[:, -1]
        return replace(self, shape=np.zeros_like(self.shape), expr=expr)


@dataclass(frozen=True)
class Trajectory:
    """Camera path: extr (M, 4, 4) absolute world-to-camera; fx, fy, cx, cy (M,) pixels.

    resolution is (height, width); fps None when the file does not say.
    """

    extr: FloatArray
    fx: FloatArray
    fy: FloatArray
    cx: FloatArray
    cy: FloatArray
    resolution: tuple[int, int]
    fps: float | None = None


@dataclass(frozen=True)
class Reference:
    """One reference frame of a subject: which camera, which frame, where its files are."""

    camera: str
    camera_index: int
    timestep: int
    image: Path
    matte: Path | None


@dataclass(frozen=True)
class TrackedSubject:
    """A tracking folder: the fit and its reference frames, in the listed order."""

    folder: Path
    tracking: Tracking
    references: tuple[Reference, ...]


def read_fit(path: str | Path) -> Tracking:
    """Reads `fit.npz`, checked field by field.

    `shape`, `neck_rot`, `camera_order` and `fps` may be absent (driving sequences have no shape):
    zeros, zeros, `cam0`... and None then.

    Raises:
        InputFileError: missing or wrong field; says field, found and expected.
    """
    arrays = read_npz(path, "a head-model fit (fit.npz)")
    expr = take_array(arrays, path, "expr", (None, NUM_EXPRESSION))
    frames = len(expr)
    if frames == 0:
        raise InputFileError(path, "no frames ('expr' has 0 rows)", "at least one frame")

    def per_frame(name: str, optional: bool = False) -> FloatArray:
        if optional and name not in arrays:
            return np.zeros((frames, 3), np.float32)
        return take_array(arrays, path, name, (frames, 3))

    extr = take_array(arrays, path, "extr", (None, 4, 4))
    cameras = len(extr)
    intrinsics = {
        name: take_array(arrays, path, name, (cameras, 1)) for name in ("fx", "fy", "cx", "cy")
    }
    for name in ("fx", "fy"):
        if (intrinsics[name] <= 0).any():
            raise InputFileError(path, f"'{name}' <= 0", "a positive focal length in pixels")
    resolutions = take_array(arrays, path, "resolutions", (cameras, 2), np.int64)
    if (resolutions <= 0).any():
        raise InputFileError(path, f"'resolutions' {resolutions.tolist()}", "(height, width) > 0")
    check_world_to_camera(extr, path)
    names = (
        [str(name) for name in np.atleast_1d(arrays["camera_order"])]
        if ("camera_order" in arrays)
        else [f"cam{i}" for i in range(cameras)]
    )
    if len(names) != cameras:
        raise InputFileError(
            path, f"'camera_order' with {len(names)} names", f"{cameras} names, one per camera"
        )
    shape = (
        take_array(arrays, path, "shape", (NUM_SHAPE,))
        if "shape" in arrays
        else np.zeros(NUM_SHAPE, np.float32)
    )
    return Tracking(
        shape=shape,
        expr=expr,
        rot=per_frame("rot"),
        tra=per_frame("tra"),
        eye_rot=per_frame("eye_rot"),
        neck_rot=per_frame("neck_rot", optional=True),
        extr=extr,
        resolutions=resolutions,
        camera_order=tuple(names),
        fps=_positive_scalar(arrays, "fps"),
        **intrinsics,
    )


def check_world_to_camera(extr: FloatArray, path: str | Path) -> None:
    """Refuses matrices that are no rigid world-to-camera transforms.

    Raises:
        InputFileError: the upper left 3x3 block is not a rotation or the last row not (0, 0, 0, 1).
    """
    rotation = extr[:, :3, :3].astype(np.float64)
    identity = rotation @ rotation.transpose(0, 2, 1)
    rigid = np.abs(identity - np.eye(3)).max(initial=0.0) < 1e-2
    if not rigid or (np.linalg.det(rotation) < 0).any():
        raise InputFileError(path, "'extr' that is no rotation + translation", "rigid 4x4 matrices")
    if np.abs(extr[:, 3] - [0, 0, 0, 1]).max(initial=0.0) > 1e-4:
        raise InputFileError(path, "'extr' with another last row", "last row (0, 0, 0, 1)")


def _positive_scalar(arrays: dict[str, NDArray[Any]], name: str) -> float | None:
    if name not in arrays or arrays[name].size != 1:
        return None
    value = float(arrays[name].reshape(()))
    return value if np.isfinite(value) and value > 0 else None


def write_fit(path: str | Path, fit: Tracking) -> None:
    """Writes `fit.npz` in the released format (float32, resolutions int64)."""
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(fit, name), np.float32)
        for name in (
            "shape", "expr", "rot", "tra", "eye_rot", "neck_rot", "fx", "fy", "cx", "cy", "extr"
        )
    }  # fmt: skip
    arrays["resolutions"] = np.asarray(fit.resolutions, np.int64)
    arrays["camera_order"] = np.asarray(fit.camera_order)
    arrays["fps"] = np.float64(-1.0 if fit.fps is None else fit.fps)
    write_npz(path, arrays)


def read_trajectory(path: str | Path) -> Trajectory:
    """Reads a camera path (`orbit.npz`, `cam_static.npz`, `cam_orbit.npz`).

    Raises:
        InputFileError: missing or wrong field.
    """
    arrays = read_npz(path, "a camera trajectory")
    extr = take_array(arrays, path, "extr", (None, 4, 4))
    if len(extr) == 0:
        raise InputFileError(path, "no cameras ('extr' has 0 rows)", "at least one camera")
    check_world_to_camera(extr, path)
    height, width = take_array(arrays, path, "resolution", (2,), np.int64).tolist()
    if height <= 0 or width <= 0:
        raise InputFileError(path, f"'resolution' ({height}, {width})", "(height, width) > 0")
    intrinsics = {
        name: take_array(arrays, path, name, (len(extr), 1))[:, 0]
        for name in ("fx", "fy", "cx", "cy")
    }
    return Trajectory(
        extr=extr,
        resolution=(height, width),
        fps=_positive_scalar(arrays, "fps"),
        **intrinsics,
    )


def write_trajectory(path: str | Path, trajectory: Trajectory) -> None:
    """Writes a camera path in the released format."""
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(trajectory, name), np.float32)[:, None]
        for name in ("fx", "fy", "cx", "cy")
    }
    arrays["extr"] = np.asarray(trajectory.extr, np.float32)
    arrays["resolution"] = np.asarray(trajectory.resolution, np.int64)
    if trajectory.fps is not None:
        arrays["fps"] = np.float64(trajectory.fps)
    write_npz(path, arrays)


def list_frames(folder: Path) -> list[Path]:
    """Image files of a folder in sorted name order; frame t is the t-th file."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def read_tracked_subject(folder: str | Path) -> TrackedSubject:
    """Reads a tracking folder: `fit.npz`, `reference_images.json`, `images/{cam}/`, `bg/{cam}/`.

    The frame of timestep t is the t-th image of its camera in sorted name order (the number in the
    file name is not used). Mattes (255 = foreground) are optional; without the folder of a camera
    its frames count as all foreground.

    Raises:
        InputFileError: anything missing, unknown camera, timestep out of range.
    """
    folder = Path(folder)
    fit = read_fit(folder / "fit.npz")
    list_path = folder / "reference_images.json"
    entries = read_json(list_path, 'a list of ["camera", timestep] pairs')
    if not isinstance(entries, list) or not entries:
        raise InputFileError(list_path, "no list or an empty one", 'a list of ["cam0", 0] pairs')
    references = []
    for number, entry in enumerate(entries):
        valid = (
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], int)
        )
        if not valid:
            raise InputFileError(
                list_path, f"entry {number}: {entry!r}", 'a pair such as ["cam0", 0]'
            )
        camera, timestep = entry
        if camera not in fit.camera_order:
            raise InputFileError(
                list_path,
                f"entry {number}: camera {camera!r}",
                f"one of {', '.join(fit.camera_order)} ('camera_order' of fit.npz)",
            )
        if not 0 <= timestep < fit.num_frames:
            raise InputFileError(
                list_path,
                f"entry {number}: timestep {timestep}",
                f"0 to {fit.num_frames - 1} (fit.npz has {fit.num_frames} frames)",
            )
        references.append(
            Reference(
                camera=camera,
                camera_index=fit.camera_order.index(camera),
                timestep=timestep,
                image=_frame_file(folder / "images" / camera, timestep, "image"),
                matte=(
                    _frame_file(folder / "bg" / camera, timestep, "matte")
                    if (folder / "bg" / camera).is_dir()
                    else None
                ),
            )
        )
    return TrackedSubject(folder, fit, tuple(references))


def _frame_file(folder: Path, timestep: int, what: str) -> Path:
    if not folder.is_dir():
        raise InputFileError(folder, "no folder", f"a folder with one {what} per frame")
    files = list_frames(folder)
    if timestep >= len(files):
        raise InputFileError(
            folder,
            f"{len(files)} {what}s",
            f"at least {timestep + 1} (timestep {timestep} is used)",
        )
    return files[timestep]


def write_reference_list(path: str | Path, references: list[tuple[str, int]]) -> None:
    """Writes `reference_images.json`."""
    write_json(path, [[camera, int(timestep)] for camera, timestep in references])
