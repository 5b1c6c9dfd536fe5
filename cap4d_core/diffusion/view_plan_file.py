"""The view plan (`plan.npz`): everything sampling needs to know about a subject's views.

Fields (N views, R references in the listed order):
    version, num_requested, base_reference, parity; subject, reference_camera (R)
    shape (150,)
    view_{expr, rot, tra, eye_rot, fx, fy, cx, cy, extr, resolution, crop_box}, view_id,
        view_yaw_deg, view_pitch_deg (about the frontal view; NaN for cameras given as matrices),
        view_expression_row, view_gaze_row (rows of the expression source; -1 if none)
    reference_{expr, ...}, reference_timestep (R)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_npz, take_array, write_npz
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import NUM_EXPRESSION, NUM_SHAPE

PLAN_VERSION = 1
_VECTORS = {"expr": NUM_EXPRESSION, "rot": 3, "tra": 3, "eye_rot": 3}
_INTRINSICS = ("fx", "fy", "cx", "cy")
_HINT = "Delete it and run the workflow again."


@dataclass(frozen=True)
class ViewPlan:
    """A subject's views to generate and its references.

    Attributes:
        subject: name, enters all random draws.
        views: N views; the index is the view id.
        references: R references in the listed order.
        reference_cameras: their camera names.
        base_reference: the reference that views are planned around; comes first in sampling.
        num_requested: views asked for; N is this rounded up.
        yaw_deg, pitch_deg: (N,) angles about the frontal view, NaN for cameras given as matrices.
        expression_rows, gaze_rows: (N,) rows of the expression source, -1 if none.
        parity: planned as published.
    """

    subject: str
    views: tuple[ViewParameters, ...]
    references: tuple[ViewParameters, ...]
    reference_cameras: tuple[str, ...]
    base_reference: int
    num_requested: int
    yaw_deg: NDArray[np.float64]
    pitch_deg: NDArray[np.float64]
    expression_rows: NDArray[np.int64]
    gaze_rows: NDArray[np.int64]
    parity: bool = False

    @property
    def reference_order(self) -> list[int]:
        """Reference ids as sampling counts them: the base reference first."""
        others = [i for i in range(len(self.references)) if i != self.base_reference]
        return [self.base_reference, *others]


def _pack(views: Sequence[ViewParameters], prefix: str) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        name: np.stack([np.asarray(getattr(v, name), np.float32) for v in views])
        for name in _VECTORS
    }
    for name in _INTRINSICS:
        arrays[name] = np.array([getattr(v, name) for v in views], np.float64)
    arrays["extr"] = np.stack([np.asarray(v.extr, np.float64) for v in views])
    arrays["resolution"] = np.array([v.resolution for v in views], np.int64)
    arrays["crop_box"] = np.array([v.crop_box for v in views], np.int64)
    return {f"{prefix}_{name}": array for name, array in arrays.items()}


def _unpack(
    arrays: dict[str, NDArray[Any]], path: Path, prefix: str, timesteps: Sequence[int | None]
) -> tuple[ViewParameters, ...]:
    count = len(timesteps)

    def take(name: str, *shape: int, dtype: type = np.float64) -> NDArray[Any]:
        return take_array(arrays, path, f"{prefix}_{name}", (count, *shape), dtype)

    shape = take_array(arrays, path, "shape", (NUM_SHAPE,))
    vectors = {name: take(name, size, dtype=np.float32) for name, size in _VECTORS.items()}
    intrinsics = {name: take(name) for name in _INTRINSICS}
    extr = take("extr", 4, 4)
    resolution = take("resolution", 2, dtype=np.int64).tolist()
    boxes = take("crop_box", 4, dtype=np.int64).tolist()
    return tuple(
        ViewParameters(
            shape=shape,
            **{name: array[i] for name, array in vectors.items()},
            fx=float(intrinsics["fx"][i]),
            fy=float(intrinsics["fy"][i]),
            cx=float(intrinsics["cx"][i]),
            cy=float(intrinsics["cy"][i]),
            extr=extr[i],
            resolution=(resolution[i][0], resolution[i][1]),
            crop_box=(boxes[i][0], boxes[i][1], boxes[i][2], boxes[i][3]),
            timestep_id=timesteps[i],
        )
        for i in range(count)
    )


def write_plan(path: str | Path, plan: ViewPlan) -> None:
    """Writes a plan atomically."""
    arrays: dict[str, Any] = {
        "version": np.int64(PLAN_VERSION),
        "subject": np.asarray(plan.subject),
        "num_requested": np.int64(plan.num_requested),
        "base_reference": np.int64(plan.base_reference),
        "parity": np.asarray(plan.parity),
        "shape": np.asarray(plan.references[0].shape, np.float32),
        "view_id": np.arange(len(plan.views), dtype=np.int64),
        "view_yaw_deg": plan.yaw_deg,
        "view_pitch_deg": plan.pitch_deg,
        "view_expression_row": plan.expression_rows,
        "view_gaze_row": plan.gaze_rows,
        "reference_camera": np.asarray(plan.reference_cameras),
        "reference_timestep": np.array([r.timestep_id for r in plan.references], np.int64),
    }
    arrays |= _pack(plan.views, "view") | _pack(plan.references, "reference")
    write_npz(path, arrays)


def read_plan(path: str | Path) -> ViewPlan:
    """Reads a plan.

    Raises:
        InputFileError: missing, of another version, or incomplete.
    """
    path = Path(path)
    what = "a view plan (plan.npz)"
    arrays = read_npz(path, what)
    if "version" not in arrays or int(arrays["version"]) != PLAN_VERSION:
        found = f"version {arrays.get('version', 'none')}"
        raise InputFileError(path, found, f"version {PLAN_VERSION} of {what}", _HINT)
    for name in ("subject", "reference_camera", "num_requested", "base_reference", "parity"):
        if name not in arrays:
            raise InputFileError(path, f"no field '{name}'", what, _HINT)
    timesteps = take_array(arrays, path, "reference_timestep", (None,), np.int64).tolist()
    count = len(take_array(arrays, path, "view_id", (None,), np.int64))
    # NaN is allowed here, so not through take_array.
    angles = [np.asarray(arrays[f"view_{axis}_deg"], np.float64) for axis in ("yaw", "pitch")]
    base = int(arrays["base_reference"])
    if not 0 <= base < len(timesteps):
        raise InputFileError(path, f"base reference {base}", f"0 to {len(timesteps) - 1}", _HINT)
    return ViewPlan(
        subject=str(arrays["subject"]),
        views=_unpack(arrays, path, "view", [None] * count),
        references=_unpack(arrays, path, "reference", timesteps),
        reference_cameras=tuple(str(name) for name in arrays["reference_camera"]),
        base_reference=base,
        num_requested=int(arrays["num_requested"]),
        yaw_deg=angles[0],
        pitch_deg=angles[1],
        expression_rows=take_array(arrays, path, "view_expression_row", (count,), np.int64),
        gaze_rows=take_array(arrays, path, "view_gaze_row", (count,), np.int64),
        parity=bool(arrays["parity"]),
    )
