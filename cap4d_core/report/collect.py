"""Finds what a results folder holds and turns it into what the report shows.

Nothing here is required: a stage that was skipped, has not run or failed is shown as such, and a
damaged file costs its own figure, not the page.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from cap4d_core.errors import UserError
from cap4d_core.files.basic import read_json
from cap4d_core.files.images import IMAGE_SUFFIXES, read_rgb
from cap4d_core.report.tables import (
    Table,
    entry_table,
    evaluation_table,
    json_text,
    number_text,
    size_text,
    value_text,
)
from cap4d_core.report.thumbnails import data_uri, first_frame, folder_sheet, video_sheet

logger = logging.getLogger(__name__)

State = Literal["done", "missing", "failed"]


@dataclass(frozen=True)
class Picture:
    """An embedded picture."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Clip:
    """A video beside the page."""

    href: str
    poster: str
    caption: str


@dataclass(frozen=True)
class Download:
    """A link to a result file."""

    href: str
    name: str
    size: str


@dataclass
class Part:
    """One stage of a subject, as shown."""

    title: str
    state: State = "missing"
    note: str = ""
    pictures: list[Picture] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    downloads: list[Download] = field(default_factory=list)
    provenance: str = ""


@dataclass
class SubjectSection:
    """All stages of a subject; `figures` go into the overview table."""

    name: str
    anchor: str
    state: State
    note: str
    parts: list[Part]
    figures: dict[str, str]


class Collector:
    """Reads results below `results_dir` for a page at `page`."""

    def __init__(self, results_dir: Path, page: Path, failures: Mapping[str, str]) -> None:
        self.results_dir = results_dir
        self.page = page
        self.failures = failures

    def subject(self, name: str, drivings: Sequence[str], anchor: str) -> SubjectSection:
        """Everything about one subject."""
        folder = self.results_dir / name
        parts = [
            self._tracking(folder / "tracking"),
            self._views(folder / "views"),
            self._avatar(folder / "avatar"),
            self._evaluation(folder / "evaluation"),
            *(self._animation(folder / "animation" / driving, driving) for driving in drivings),
        ]
        stages = ["tracking", "views", "avatar", "evaluation"]
        stages += [f"animation/{driving}" for driving in drivings]
        for part, stage in zip(parts, stages, strict=True):
            reason = self.failures.get(f"{name}/{stage}")
            if reason:
                part.state, part.note = "failed", reason
        note = self.failures.get(name, "")
        states = {part.state for part in parts}
        state: State = "done"
        if note or "failed" in states:
            state = "failed"
        elif states == {"missing"}:
            state = "missing"
        return SubjectSection(name, anchor, state, note, parts, self._figures(folder, parts))

    def _tracking(self, folder: Path) -> Part:
        part = Part("Tracking", "done" if folder.is_dir() else "missing")
        self._add_overlay(part, folder, "Head model over the input")
        self._add_numbers(part, folder / "quality.json", "Tracking quality")
        self._add_downloads(part, folder, ["fit.npz", "quality.json"])
        return part

    def _views(self, folder: Path) -> Part:
        part = Part("Views", "done" if folder.is_dir() else "missing")
        sheets = {
            "Reference views": ("reference_images/crops", "reference_images/images"),
            "Generated views": ("generated_images/images",),
        }
        for caption, places in sheets.items():
            present = [folder / p for p in places if any((folder / p).glob("*.png"))]
            if not present:
                continue
            count = sum(1 for _ in present[0].glob("*.png"))
            shown = f"{min(count, 12)} of {count}" if count > 12 else str(count)
            self._add_picture(part, partial(folder_sheet, present[0]), f"{caption} ({shown})")
        return part

    def _avatar(self, folder: Path) -> Part:
        part = Part("Avatar", "done" if (folder / "avatar.safetensors").exists() else "missing")
        self._add_image(part, folder / "metrics.png", "Losses and quality during the fit")
        for file in sorted((folder / "previews").glob("*.png"))[-1:]:
            self._add_image(part, file, f"Last preview of the fit ({file.name})")
        self._add_downloads(
            part, folder, ["avatar.safetensors", "avatar.json", "metrics.json", "manifest.json"]
        )
        part.provenance = json_text(self._json(folder / "avatar.json"))
        return part

    def _evaluation(self, folder: Path) -> Part:
        part = Part("Evaluation", "done" if (folder / "metrics.json").exists() else "missing")
        metrics = self._json(folder / "metrics.json")
        if isinstance(metrics, dict) and isinstance(metrics.get("views"), list):
            self._add_image(
                part,
                folder / "side_by_side.png",
                "Held-out views: truth, avatar, nearest reference",
            )
            part.tables.append(evaluation_table(metrics))
        self._add_downloads(part, folder, ["metrics.json", "side_by_side.png"])
        return part

    def _animation(self, folder: Path, driving: str) -> Part:
        video = folder / "renders.mp4"
        part = Part(f"Animation: {driving}", "done" if video.exists() else "missing")
        if video.exists():
            self._add_clip(part, video, f"Driven by {driving}")
            self._add_picture(part, lambda: video_sheet(video), "Frames of the animation")
        self._add_overlay(
            part, self.results_dir / "driving" / driving, "Head model over the driving sequence"
        )
        self._add_numbers(
            part, self.results_dir / "driving" / driving / "quality.json", "Driving sequence"
        )
        names = ["renders.mp4", "renders.mov", "exported_animation.ply", "avatar_frame0.ply"]
        names.append("manifest.json")
        self._add_downloads(part, folder, names)
        part.provenance = json_text(self._json(folder / "animation.json"))
        return part

    def _figures(self, folder: Path, parts: Sequence[Part]) -> dict[str, str]:
        summary = (self._json(folder / "evaluation" / "metrics.json") or {}).get("summary", {})
        animations = [part for part in parts if part.title.startswith("Animation")]
        done = sum(part.state == "done" for part in animations)
        return {
            "PSNR": number_text(summary.get("psnr"), " dB"),
            "Gain over nearest reference": number_text(summary.get("psnr_gain"), " dB"),
            "SSIM": number_text(summary.get("ssim"), digits=3),
            "Animations": f"{done} of {len(animations)}",
        }

    # --- adding, each tolerant of damaged files

    def _add_picture(self, part: Part, make: Callable[[], Any], caption: str) -> None:
        try:
            image = make()
        except UserError as error:
            part.note = f"{part.note} {caption}: {error}".strip()
            return
        if image is not None:
            part.pictures.append(Picture(data_uri(image), caption))

    def _add_image(self, part: Part, path: Path, caption: str) -> None:
        if path.exists():
            self._add_picture(part, lambda: read_rgb(path), caption)

    def _add_clip(self, part: Part, path: Path, caption: str) -> None:
        try:
            poster = data_uri(first_frame(path), 640)
        except UserError as error:
            part.state, part.note = "failed", str(error)
            return
        part.clips.append(Clip(self._href(path), poster, caption))

    def _add_overlay(self, part: Part, folder: Path, caption: str) -> None:
        for path in sorted(folder.glob("overlay.*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self._add_image(part, path, caption)
            elif path.suffix.lower() in (".mp4", ".mov", ".webm"):
                self._add_clip(part, path, caption)

    def _add_numbers(self, part: Part, path: Path, caption: str) -> None:
        """Numbers of a JSON object as one table, lists of objects as further ones."""
        content = self._json(path)
        if not isinstance(content, dict):
            return
        rows = [[key, value_text(v)] for key, v in content.items() if value_text(v)]
        if rows:
            part.tables.append(Table(caption, ("Measure", "Value"), rows))
        for key, entries in content.items():
            if isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries):
                part.tables.append(entry_table(f"{caption}: {key}", entries))

    def _add_downloads(self, part: Part, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            path = folder / name
            if path.is_file():
                size = size_text(path.stat().st_size)
                part.downloads.append(Download(self._href(path), name, size))

    def _href(self, path: Path) -> str:
        relative = os.path.relpath(path.resolve(), self.page.parent.resolve())
        return quote(Path(relative).as_posix())

    def _json(self, path: Path) -> Any:
        if not path.exists():
            return None
        try:
            return read_json(path)
        except UserError as error:
            logger.warning("%s", error)
            return None
