"""Numbers and tables of the report as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ROWS = 20
_FINE = frozenset({"ssim", "lpips", "baseline_lpips", "identity_similarity"})


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. Numbers are already text."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def evaluation_table(metrics: Mapping[str, Any]) -> Table:
    """Figures of every held-out view, and their means, from `metrics.json`."""
    names = {
        "view": "View",
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "baseline_psnr": "Nearest reference (dB)",
        "psnr_gain": "Gain (dB)",
        "angle_to_reference_deg": "Angle to it (°)",
    }
    found = metrics.get("summary", {})
    if "lpips" in found:
        names |= {"lpips": "LPIPS", "baseline_lpips": "Nearest reference LPIPS"}
    if "akd_percent" in found:
        names["akd_percent"] = "Landmarks off (% of the face)"
    if "identity_similarity" in found:
        names["identity_similarity"] = "Identity similarity"
    rows = [
        [
            str(v.get("view", "")),
            *(number_text(v.get(n), digits=_digits(n)) for n in list(names)[1:]),
        ]
        for v in metrics["views"]
    ]
    mean = dict(metrics.get("summary", {}))
    mean["angle_to_reference_deg"] = mean.get("mean_angle_to_reference_deg")
    if rows:
        rows.append(
            ["Mean", *(number_text(mean.get(n), digits=_digits(n)) for n in list(names)[1:])]
        )
    caption = f"Held-out views, compared inside the matte ({len(metrics['views'])})"
    return Table(caption, list(names.values()), rows)


def entry_table(caption: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per object, one column per key that has something to show."""
    shown = entries[:MAX_ROWS]
    keys = [
        k
        for k in dict.fromkeys(k for e in shown for k in e)
        if any(value_text(e.get(k)) for e in shown)
    ]
    rows = [
        [str(i), *(value_text(entry.get(key)) or "–" for key in keys)]
        for i, entry in enumerate(shown)
    ]
    if len(entries) > len(shown):
        caption = f"{caption} (first {len(shown)} of {len(entries)})"
    return Table(caption, ("No.", *keys), rows)


def _digits(name: str) -> int:
    return 3 if name in _FINE else 2 if name == "akd_percent" else 1


def number_text(value: Any, unit: str = "", digits: int = 1) -> str:
    """A number with fixed digits; a dash for anything else."""
    return f"{value:.{digits}f}{unit}" if isinstance(value, int | float) else "–"


def value_text(value: Any) -> str:
    """Numbers, short names and lists of remarks as text; the rest is left to the file itself."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        return value if len(value) <= 40 else ""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "; ".join(value)
    return ""


def size_text(count: float) -> str:
    """A count of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def json_text(content: Any, limit: int = 6000) -> str:
    """Indented JSON, cut after `limit` characters; empty for nothing."""
    if not content:
        return ""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "\n… (shortened; see the file)"
