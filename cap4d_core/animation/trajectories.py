"""Which camera sees which frame of a driving sequence.

Frames: `extr` maps OpenCV world points to the camera (+z forward); pixels (0.5, 0.5) is the centre
of the first pixel. In `DrivenSequence` the head rests at the origin and the camera carries the
head motion, so that view-dependent colours act as light fixed to the head.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.files.tracking import FloatArray, Tracking, Trajectory
from cap4d_core.geometry.cameras import head_to_origin, orbit_extrinsics
from cap4d_core.settings import AnimationSettings

logger = logging.getLogger(__name__)

DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class DrivenSequence:
    """T frames ready to render: expressions, and cameras around a head at the origin.

    expr (T, 65); eye_rot (T, 3); extr (T, 4, 4) head-fixed OpenCV world to camera; intrinsics
    (T, 3, 3) in pixels of a width x height image; fps for playback.
    """

    expr: FloatArray
    eye_rot: FloatArray
    extr: FloatArray
    intrinsics: FloatArray
    width: int
    height: int
    fps: float

    @property
    def num_frames(self) -> int:
        """T, the number of frames."""
        return len(self.expr)


def drive(
    tracking: Tracking,
    trajectory: Trajectory | None = None,
    *,
    camera: str = "auto",
    short_trajectory: str = "hold",
    fps: float | None = None,
) -> DrivenSequence:
    """Pairs every driving frame with a camera.

    Frame t takes camera t of the trajectory, whose extrinsics are absolute world-to-camera of the
    driving world. Without a trajectory, camera 0 of the fit stays where it is.

    Args:
        tracking: the driving fit; its identity (shape) is not used.
        trajectory: camera path; longer ones are cut.
        camera: "auto" (trajectory if given, else static), "static" or "orbit"; the last two
            ignore the trajectory.
        short_trajectory: "hold" repeats its last camera, "loop" starts it again.
        fps: playback rate; None = the trajectory's, else the fit's, else 24. It never resamples:
            each driving frame gives one frame.
    """
    frames = tracking.num_frames
    rate = fps or (trajectory.fps if trajectory else None) or tracking.fps or DEFAULT_FPS
    if trajectory is None or camera != "auto":
        extr = np.repeat(tracking.extr[:1], frames, axis=0)
        if camera == "orbit":
            extr = orbit_extrinsics(tracking.extr[0], tracking.tra[0], frames, rate)
        fx, fy, cx, cy = (
            np.repeat(getattr(tracking, name)[0], frames) for name in ("fx", "fy", "cx", "cy")
        )
        height, width = (int(side) for side in tracking.resolutions[0])
    else:
        index = _camera_indices(len(trajectory.extr), frames, short_trajectory)
        extr = trajectory.extr[index]
        fx, fy, cx, cy = (getattr(trajectory, name)[index] for name in ("fx", "fy", "cx", "cy"))
        height, width = trajectory.resolution
    intrinsics = np.zeros((frames, 3, 3), np.float32)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = fx, fy
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = cx, cy
    intrinsics[:, 2, 2] = 1
    return DrivenSequence(
        expr=tracking.expr,
        eye_rot=tracking.eye_rot,
        extr=_head_fixed(extr, tracking),
        intrinsics=intrinsics,
        width=width,
        height=height,
        fps=float(rate),
    )


def drive_with(
    tracking: Tracking, trajectory: Trajectory | None, settings: AnimationSettings
) -> DrivenSequence:
    """`drive` with the settings of an animation, at the size of its video."""
    sequence = drive(
        tracking,
        trajectory,
        camera=settings.camera,
        short_trajectory=settings.short_trajectory,
        fps=settings.fps,
    )
    return with_even_size(resize_cameras(sequence, settings.resolution))


def _camera_indices(cameras: int, frames: int, when_short: str) -> NDArray[np.int64]:
    index = np.arange(frames)
    if cameras >= frames:
        return index
    logger.warning(
        "The trajectory has %d cameras for %d driving frames: %s.",
        cameras,
        frames,
        "starting it again" if when_short == "loop" else "holding its last camera",
    )
    return index % cameras if when_short == "loop" else np.minimum(index, cameras - 1)


def _head_fixed(extr: FloatArray, tracking: Tracking) -> FloatArray:
    # float64: head poses far from the origin would cost digits of the camera position.
    moved = head_to_origin(
        torch.as_tensor(extr, dtype=torch.float64),
        torch.as_tensor(tracking.rot, dtype=torch.float64),
        torch.as_tensor(tracking.tra, dtype=torch.float64),
    )
    return moved.numpy().astype(np.float32)


def resize_cameras(sequence: DrivenSequence, height: int | None) -> DrivenSequence:
    """The same view in another number of pixels; the aspect ratio is kept, intrinsics scaled."""
    if height is None or height == sequence.height:
        return sequence
    width = max(1, round(sequence.width * height / sequence.height))
    scale = np.asarray([width / sequence.width, height / sequence.height, 1.0], np.float32)
    return replace(
        sequence, intrinsics=sequence.intrinsics * scale[:, None], width=width, height=height
    )


def with_even_size(sequence: DrivenSequence) -> DrivenSequence:
    """Sides rounded up to even numbers, as video needs them.

    The last column or row is rendered, not padded: intrinsics stay, the picture is not distorted.
    """
    return replace(
        sequence,
        width=sequence.width + sequence.width % 2,
        height=sequence.height + sequence.height % 2,
    )
