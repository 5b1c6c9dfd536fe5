"""Tables of subjects and driving sequences (tab-separated text, one row each).

Light: the standard library and pydantic. Reads the table, never the files that it names.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from cap4d_core.messages import closest, describe_error
from cap4d_core.settings import StrictModel

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
# Folders and files of the results folder that a subject's folder would collide with.
_STAGE_FOLDERS = frozenset({"assets", "benchmarks", "demo", "driving", "evaluation", "logs"})
RESERVED_NAMES = _STAGE_FOLDERS | {"index", "subjects", "training"}
DEMO_PREFIX = "demo:"

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class Subject(StrictModel):
    """One row of the subjects table: one person."""

    subject: str = Field(
        pattern=NAME_PATTERN,
        max_length=64,
        description="Name; becomes the folder results/{subject}.",
    )
    reference: str | None = Field(
        None,
        description="A photo, a folder of photos, a video, a folder with one folder or video per "
        "camera; or `demo:SEED` for a procedural subject. Tracked when `tracking` is empty.",
    )
    tracking: str | None = Field(
        None,
        description="Folder of a ready fit: fit.npz, reference_images.json, images/, bg/; it is "
        "imported then, and nothing tracked.",
    )
    avatar: str | None = Field(
        None,
        description="A ready avatar, imported instead of fitted: a folder with a released "
        "chkpnt*.pth, or with avatar.safetensors and avatar.json. `reference` and `tracking` are "
        "only needed for an evaluation then.",
    )
    held_out: str | None = Field(
        None,
        description="Image set (images/, flame/, mattes/) that the avatar is evaluated on; demo "
        "subjects have one by themselves.",
    )

    @property
    def demo_seed(self) -> int | None:
        """Seed of a procedural subject, None for real ones."""
        if self.reference is None or not self.reference.startswith(DEMO_PREFIX):
            return None
        return int(self.reference.removeprefix(DEMO_PREFIX))

    @property
    def is_evaluated(self) -> bool:
        """Whether there are held-out images to compare with."""
        return self.held_out is not None or self.demo_seed is not None


class Driving(StrictModel):
    """One row of the driving table: one motion."""

    driving: str = Field(
        pattern=NAME_PATTERN,
        max_length=64,
        description="Name; becomes the folder results/{subject}/animation/{driving}.",
    )
    video: str | None = Field(
        None,
        description="Video of a person; tracked when `fit` is empty. Its sound goes into the "
        "animation; with a ready fit, frame 0 of that is the beginning of the video.",
    )
    fit: str | None = Field(None, description="Ready fit.npz, or `demo` for a procedural motion.")
    trajectory: str | None = Field(
        None, description="Camera path (.npz); empty: a static camera, derived from the fit."
    )
    start_frame: int = Field(0, ge=0, description="First frame to use.")
    num_frames: int | None = Field(None, ge=1, description="Frames to use; empty: all.")

    @property
    def is_demo(self) -> bool:
        """Whether the motion is procedural."""
        return self.fit == "demo"


Row = TypeVar("Row", bound=BaseModel)


def expand_variables(text: str) -> str:
    """Replaces `${NAME}` and `${NAME:-default}` by environment variables.

    Raises:
        KeyError: a variable without default is not set; the argument is its name.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"], "")
        if found:
            return found
        if match["default"] is None:
            raise KeyError(match["name"])
        return str(match["default"])

    return _VARIABLE.sub(value, text)


def resolve_path(text: str, base: Path) -> str:
    """Expands variables and `~`, and takes a relative path from `base`.

    Raises:
        KeyError: as `expand_variables`.
    """
    path = Path(expand_variables(text)).expanduser()
    return os.path.normpath(base / path)


def resolve_cells(
    row: Mapping[str, Any], path_columns: tuple[str, ...], base: Path
) -> dict[str, Any]:
    """A row with its path columns resolved; the words `demo` and `demo:SEED` are left alone.

    Raises:
        KeyError: as `expand_variables`.
    """
    resolved = dict(row)
    for column in path_columns:
        cell = resolved.get(column)
        if isinstance(cell, str) and cell != "demo" and not cell.startswith(DEMO_PREFIX):
            resolved[column] = resolve_path(cell, base)
    return resolved


SUBJECT_PATHS = ("reference", "tracking", "avatar", "held_out")
DRIVING_PATHS = ("video", "fit", "trajectory")
_INTEGER_COLUMNS = frozenset({"start_frame", "num_frames"})


def read_rows(
    path: Path, columns: tuple[str, ...]
) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Reads a tab-separated table with a header line.

    Empty lines and lines that start with `#` are skipped, empty cells left out.

    Returns:
        (line number, cells by column) of every row; and the problems found.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        return [], [f"{path}: no such file; it must be a tab-separated table"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read as UTF-8 text ({error})"]

    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        return [], [f"{path}: empty; its first line must name columns: {', '.join(columns)}"]

    cells = csv.reader((line for _, line in lines), delimiter="\t")
    header = [name.strip() for name in next(cells)]
    problems = []
    where = f"{path}:{lines[0][0]}"
    if len(header) == 1 and ("," in header[0] or ";" in header[0]):
        return [], [f"{where}: no tabs; separate the columns by tab characters, not , or ;"]
    for name in header:
        if name not in columns:
            problems.append(f"{where}: unknown column '{name}'{closest(name, columns)}")
        if header.count(name) > 1:
            problems.append(f"{where}: column '{name}' appears {header.count(name)} times")
    if columns[0] not in header:
        problems.append(f"{where}: no column '{columns[0]}'")
    if problems:
        return [], list(dict.fromkeys(problems))

    rows = []
    for (number, _), values in zip(lines[1:], cells, strict=True):
        if len(values) > len(header):
            problems.append(f"{path}:{number}: {len(values)} cells, the header has {len(header)}")
            continue
        pairs = zip(header, (value.strip() for value in values), strict=False)
        rows.append((number, {name: value for name, value in pairs if value}))
    if not rows and not problems:
        problems.append(f"{path}: a header but no rows")
    return rows, problems


def parse_row(row: Mapping[str, Any], model: type[Row], where: str) -> tuple[Row | None, list[str]]:
    """Validates one row; returns the row or None, and the problems."""
    converted: dict[str, Any] = dict(row)
    for column in _INTEGER_COLUMNS & converted.keys():
        # Text of a table: only plain digits are whole numbers here.
        if re.fullmatch(r"[+-]?\d+", str(converted[column])):
            converted[column] = int(converted[column])
    try:
        return model.model_validate(converted), []
    except ValidationError as error:
        return None, [
            f"{where}: {describe_error(detail, model)}"
            for detail in error.errors(include_url=False)
        ]


def read_table(
    path: Path, model: type[Row], path_columns: tuple[str, ...]
) -> tuple[dict[str, Row], list[str]]:
    """Reads and checks a table; relative paths in it are relative to its folder.

    Returns:
        Rows by name (first column) in the order of the table; and all problems, with lines.
    """
    columns = tuple(model.model_fields)
    numbered, problems = read_rows(path, columns)
    rows: dict[str, Row] = {}
    seen: dict[str, int] = {}
    for number, cells in numbered:
        where = f"{path}:{number}"
        try:
            cells = resolve_cells(cells, path_columns, path.parent)
        except KeyError as error:
            problems.append(f"{where}: environment variable {error.args[0]} is not set")
            continue
        row, errors = parse_row(cells, model, where)
        problems += errors
        name = str(cells.get(columns[0], ""))
        if row is None:
            continue
        problems += [f"{where}: {text}" for text in row_problems(row)]
        if name in seen:
            problems.append(f"{where}: {columns[0]} '{name}' is already in line {seen[name]}")
            continue
        seen[name] = number
        rows[name] = row
    return rows, problems


def row_problems(row: BaseModel) -> list[str]:
    """Rules that concern more than one column."""
    if isinstance(row, Subject):
        return _subject_problems(row)
    if isinstance(row, Driving):
        return _driving_problems(row)
    return []


def _subject_problems(row: Subject) -> list[str]:
    problems = []
    if row.subject in RESERVED_NAMES:
        problems.append(
            f"subject: '{row.subject}' is the name of a folder of the results; choose another"
        )
    is_demo = row.reference is not None and (
        row.reference.startswith(DEMO_PREFIX) or row.reference == "demo"
    )
    if is_demo:
        if not re.fullmatch(r"demo:\d+", str(row.reference)):
            problems.append(f"reference: '{row.reference}' is not demo:SEED, such as demo:1")
        if row.tracking is not None:
            problems.append("tracking: must be empty for demo subjects, which bring their own fit")
    elif row.tracking is None and row.reference is None:
        if row.avatar is None:
            problems.append(
                f"reference: '{row.subject}' has neither reference (photos or video) nor tracking "
                "(a ready fit) nor avatar (a ready avatar)"
            )
        elif row.held_out is not None:
            problems.append(
                f"held_out: the evaluation of the imported avatar of '{row.subject}' compares with "
                "photos, too; give reference or tracking, or leave held_out empty"
            )
    return problems


def _driving_problems(row: Driving) -> list[str]:
    problems = []
    if row.is_demo and (row.video or row.trajectory):
        problems.append("fit: 'demo' brings its own camera; leave video and trajectory empty")
    if row.fit is None and row.video is None:
        problems.append(f"fit: '{row.driving}' has neither fit nor video")
    elif row.fit is not None and not row.is_demo and not row.fit.endswith(".npz"):
        problems.append(f"fit: '{row.fit}' is no .npz file")
    if row.fit is None and (row.start_frame or row.num_frames or row.trajectory):
        problems.append(
            "video: start_frame, num_frames and trajectory belong to ready fits; a part of a video "
            "is chosen by tracking.start_s and tracking.end_s"
        )
    if row.trajectory is not None and not row.trajectory.endswith(".npz"):
        problems.append(f"trajectory: '{row.trajectory}' is no .npz file")
    return problems
