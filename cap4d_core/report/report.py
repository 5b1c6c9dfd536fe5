"""Writes `index.html`: every subject, what came out of every stage, what is missing or failed.

The page needs no server, script or network: pictures are embedded, videos and downloads are linked
relative to it, so a copied results folder still works.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cap4d_core.files.basic import atomic_path
from cap4d_core.report.collect import Collector


def write_report(
    output: str | Path,
    results_dir: str | Path,
    subjects: Mapping[str, Sequence[str]] | None = None,
    *,
    failures: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    title: str = "Avatar report",
) -> None:
    """Writes the report.

    Args:
        output: the page, e.g. `results/index.html`.
        results_dir: folder with one folder per subject, and `driving/`.
        subjects: driving sequences of each subject, in the order shown; default: what is found.
            Given, results that ought to be there and are not can be shown as such.
        failures: reason by `subject` or `subject/stage` (tracking, views, avatar, evaluation,
            animation/DRIVING); shown in place of results. All of them, also of stages that all
            subjects share, are listed in a table at the top.
        settings: configuration of the run, shown as JSON.
        versions: library versions and the like.
        title: heading of the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    output, results_dir = Path(output), Path(results_dir)
    subjects = find_subjects(results_dir) if subjects is None else subjects
    collector = Collector(results_dir, output, failures or {})
    anchors = _anchors(list(subjects))
    sections = [
        collector.subject(name, drivings, anchors[name]) for name, drivings in subjects.items()
    ]
    environment = Environment(
        loader=PackageLoader("cap4d_core.report", "."),
        autoescape=True,  # names of subjects and messages of errors are not markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        title=title,
        sections=sections,
        figure_names=list(sections[0].figures) if sections else [],
        failures=dict(failures or {}),
        settings=json.dumps(settings, indent=2, default=str) if settings else "",
        versions=dict(versions or {}),
    )
    with atomic_path(output) as temporary:
        temporary.write_text(page, "utf-8")


def find_subjects(results_dir: Path) -> dict[str, list[str]]:
    """Subjects with results, and the driving sequences each has been animated with."""
    folders = sorted(results_dir.iterdir()) if results_dir.is_dir() else []
    return {
        folder.name: sorted(f.name for f in (folder / "animation").glob("*") if f.is_dir())
        for folder in folders
        if any((folder / stage).is_dir() for stage in ("tracking", "views", "avatar"))
    }


def _anchors(names: Sequence[str]) -> dict[str, str]:
    """An HTML id per subject, unique also where names differ only in other characters."""
    return {
        name: f"subject-{number}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}"
        for number, name in enumerate(names, start=1)
    }
