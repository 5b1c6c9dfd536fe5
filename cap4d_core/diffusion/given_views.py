"""A user's own views (`sampling.plan`) and the expressions that views are made of."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_npz, require_file, take_array
from cap4d_core.files.tracking import NUM_EXPRESSION, check_world_to_camera

PLAN_FILE = "a table of views (.tsv with yaw_deg, pitch_deg[, expression_row], or .npz)"


@dataclass(frozen=True)
class Expressions:
    """Rows of expressions (M, 65) and gaze (M, 3) to take views from."""

    expr: NDArray[np.float32]
    eye_rot: NDArray[np.float32]

    @classmethod
    def read(cls, path: Path, factor: float) -> Expressions:
        """Reads gen_data.npz, scaled by `factor`."""
        arrays = read_npz(path, "expressions to generate (gen_data.npz)")
        expr = take_array(arrays, path, "expr", (None, NUM_EXPRESSION))
        eye_rot = take_array(arrays, path, "eye_rot", (len(expr), 3))
        scale = np.float32(factor)
        return cls(expr * scale, eye_rot * scale)


@dataclass(frozen=True)
class GivenViews:
    """A user's own views: M rows of angles or cameras, optionally expressions.

    yaw_deg, pitch_deg (M,) about the frontal view, or extr (M, 4, 4); expression_rows (M,) rows of
    gen_data.npz, or expr (M, 65) with eye_rot (M, 3), used as they are.
    """

    yaw_deg: NDArray[np.float64] | None = None
    pitch_deg: NDArray[np.float64] | None = None
    extr: NDArray[np.float64] | None = None
    expression_rows: NDArray[np.int64] | None = None
    expressions: Expressions | None = None

    def __len__(self) -> int:
        given = self.extr if self.yaw_deg is None else self.yaw_deg
        return 0 if given is None else len(given)


def read_given_views(path: str | Path) -> GivenViews:
    """Reads a user's table of views.

    Raises:
        InputFileError: unreadable, no rows, or wrong columns.
    """
    path = require_file(path, PLAN_FILE)
    if path.suffix.lower() == ".npz":
        return _read_given_npz(path)
    with open(path, newline="", encoding="utf-8") as handle:
        lines = (line for line in handle if line.strip() and not line.startswith("#"))
        reader = csv.DictReader(lines, delimiter="\t")
        columns = reader.fieldnames or []
        rows = list(reader)
    known = {"yaw_deg", "pitch_deg", "expression_row"}
    if not {"yaw_deg", "pitch_deg"} <= set(columns) or not set(columns) <= known or not rows:
        found = f"columns {', '.join(columns) or 'none'} and {len(rows)} rows"
        raise InputFileError(path, found, PLAN_FILE)
    try:
        yaw = np.array([float(row["yaw_deg"]) for row in rows])
        pitch = np.array([float(row["pitch_deg"]) for row in rows])
        numbers = (
            np.array([int(row["expression_row"]) for row in rows], np.int64)
            if "expression_row" in columns
            else None
        )
    except (TypeError, ValueError) as error:
        raise InputFileError(path, f"a cell that is no number ({error})", PLAN_FILE) from None
    if not np.isfinite([yaw, pitch]).all():
        raise InputFileError(path, "NaN or infinite angles", "angles in degrees")
    return GivenViews(yaw, pitch, expression_rows=numbers)


def _read_given_npz(path: Path) -> GivenViews:
    arrays = read_npz(path, PLAN_FILE)
    extr = yaw = pitch = rows = expressions = None
    if "extr" in arrays:
        extr = take_array(arrays, path, "extr", (None, 4, 4), np.float64)
        check_world_to_camera(extr, path)
    else:
        yaw = take_array(arrays, path, "yaw_deg", (None,), np.float64)
        pitch = take_array(arrays, path, "pitch_deg", (len(yaw),), np.float64)
    views = GivenViews(yaw, pitch, extr)
    if len(views) == 0:
        raise InputFileError(path, "no views", "at least one")
    if "expr" in arrays:
        expr = take_array(arrays, path, "expr", (len(views), NUM_EXPRESSION))
        gaze = np.zeros((len(views), 3), np.float32)
        if "eye_rot" in arrays:
            gaze = take_array(arrays, path, "eye_rot", (len(views), 3))
        expressions = Expressions(expr, gaze)
    elif "expression_row" in arrays:
        rows = take_array(arrays, path, "expression_row", (len(views),), np.int64)
    return replace(views, expression_rows=rows, expressions=expressions)
