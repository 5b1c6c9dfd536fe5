"""Figures per frame and per subject as tables (.csv) and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cap4d_core.files.basic import atomic_path

# What a plot shows: title, figure, figure of the baseline.
_PANELS = (
    ("PSNR (dB)", "psnr", "baseline_psnr"),
    ("SSIM", "ssim", "baseline_ssim"),
    ("LPIPS", "lpips", "baseline_lpips"),
    ("landmark distance (% of the face)", "akd_percent", "baseline_akd_percent"),
    ("identity similarity", "identity_similarity", "baseline_identity_similarity"),
    # Of driven avatars, which have no baseline.
    ("head pose error (°)", "pose_deg_error", ""),
    ("expression error (mm)", "expression_mm_error", ""),
    ("gaze error (°)", "gaze_deg_error", ""),
)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as comma-separated text; empty cells where a row has nothing.

    Columns come in the order in which they first appear.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {reason}" for name, reason in value.items())
    return f"{value:.6g}" if isinstance(value, float) else value


def write_frames_csv(path: str | Path, views: Sequence[Mapping[str, Any]]) -> None:
    """Writes the figures of every view; `absent` says why a cell is empty."""
    last = {"absent": ""} if any("absent" in view for view in views) else {}
    rows = [{**{k: v for k, v in view.items() if k != "absent"}} for view in views]
    columns = dict.fromkeys(name for row in rows for name in row)
    write_csv(
        path,
        [
            {**{c: row.get(c, "") for c in columns}, **last, **_reasons(view)}
            for row, view in zip(rows, views, strict=True)
        ],
    )


def _reasons(view: Mapping[str, Any]) -> dict[str, Any]:
    return {"absent": view["absent"]} if "absent" in view else {}


def write_frames_plot(path: str | Path, views: Sequence[Mapping[str, Any]]) -> None:
    """Plots what is measured over the views, avatar against the nearest reference.

    Of views without any figure the plot is empty.
    """
    plt = _pyplot()
    panels = [panel for panel in _PANELS if any(panel[1] in view for view in views)]
    rows = max(1, len(panels))
    figure, axes = plt.subplots(rows, 1, figsize=(9, 1.9 * rows + 0.5), squeeze=False, sharex=True)
    position = np.arange(len(views))
    marker = "o" if len(views) <= 50 else None
    for axis, (title, name, baseline) in zip(axes[:, 0], panels, strict=False):
        for key, label in ((name, "avatar"), (baseline, "nearest reference")):
            if not any(key in view for view in views):
                continue
            values = [view.get(key, np.nan) for view in views]
            axis.plot(position, values, marker=marker, markersize=3, linewidth=1, label=label)
        axis.set_ylabel(title, fontsize=8)
        axis.grid(alpha=0.3)
    if panels:
        axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("view")
    _save(plt, figure, path)


def write_subjects_plot(
    path: str | Path, rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str, str]]
) -> None:
    """Plots figures per subject as bars.

    Args:
        path: picture to write.
        rows: one per subject, with the name under `subject`.
        panels: title, figure, figure of the baseline ("" = none); those that no row has are left
            out.
    """
    plt = _pyplot()
    shown = [panel for panel in panels if any(panel[1] in row for row in rows)]
    figure, axes = plt.subplots(
        max(1, len(shown)), 1, figsize=(max(6, 0.8 * len(rows) + 3), 2.1 * max(1, len(shown))),
        squeeze=False, sharex=True,
    )  # fmt: skip
    position = np.arange(len(rows))
    for axis, (title, name, baseline) in zip(axes[:, 0], shown, strict=False):
        pairs = [(name, "avatar"), (baseline, "nearest reference")]
        pairs = [(key, label) for key, label in pairs if any(key in row for row in rows)]
        for k, (key, label) in enumerate(pairs):
            values = [row.get(key, np.nan) for row in rows]
            axis.bar(position + 0.4 * k - 0.2 * (len(pairs) - 1), values, 0.38, label=label)
        axis.set_ylabel(title, fontsize=8)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
        axis.set_xticks(position, [str(row["subject"]) for row in rows])
    if shown:
        axes[0, 0].legend(fontsize=8)
    _save(plt, figure, path)


def _pyplot() -> Any:
    # Slow to import, and machines that only measure lack it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: str | Path) -> None:
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
