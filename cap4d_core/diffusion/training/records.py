"""metrics.jsonl of a run, one JSON object per line, and the curves drawn from it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cap4d_core.files.basic import atomic_path

# Panels: title, phase, value, and where the same value of other people is.
_PANELS = (
    ("autoencoder", "autoencoder", "loss", None),
    ("autoencoder, PSNR (dB)", "autoencoder_validation", "psnr", None),
    ("denoiser", "denoiser", "loss", "validation"),
    ("views, PSNR (dB)", "validation", "psnr", None),
)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All entries; a line that a killed process did not finish is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def add_record(path: str | Path, entry: dict[str, Any]) -> None:
    """Appends an entry."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def forget_after(path: str | Path, phases: Collection[str], step: int) -> None:
    """Removes entries of phases that a resumed run will make again."""
    path, entries = Path(path), read_records(path)
    if not path.is_file():
        return
    kept = [e for e in entries if e["phase"] not in phases or e["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(e) + "\n" for e in kept), "utf-8")


def draw_curves(path: str | Path, entries: list[dict[str, Any]]) -> None:
    """Losses and measured quality over steps, one panel per phase that there is."""
    from matplotlib.figure import Figure

    series = {
        (phase, key): ([e["step"] for e in found], [e[key] for e in found])
        for phase in {e["phase"] for e in entries}
        for key in ("loss", "psnr", "nearest_reference_psnr")
        if (found := [e for e in entries if e["phase"] == phase and key in e])
    }
    panels = [panel for panel in _PANELS if (panel[1], panel[2]) in series]
    figure = Figure(figsize=(4.5 * max(len(panels), 1), 3.6), dpi=100, layout="constrained")
    for number, (title, phase, key, other) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.plot(*series[phase, key], lw=0.9, label="training" if other else None)
        if other and (other, key) in series:
            axes.plot(*series[other, key], "o-", ms=3, lw=0.9, label="other people")
            axes.legend(fontsize=8)
        if (phase, "nearest_reference_psnr") in series:
            axes.plot(*series[phase, "nearest_reference_psnr"], "--", lw=0.8, label="reference")
            axes.legend(fontsize=8)
        axes.set(title=title, xlabel="step", yscale="log" if key == "loss" else "linear")
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
