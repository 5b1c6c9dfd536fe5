"""What a run has made so far: where it is, and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cap4d_core.batch.failures import failure_table, read_failures
from cap4d_core.config import Config


def summarise(config: Config) -> str:
    """Lines for a terminal; missing results are said to be missing."""
    results = Path(config.results)
    lines = [f"Results: {results.resolve()}"]
    page = results / "index.html"
    if page.is_file():
        lines.append(f"Report:  {page.resolve()}")
    for subject, row in config.subjects.items():
        folder = results / subject
        if not (folder / "avatar" / "avatar.safetensors").is_file():
            lines.append(f"{subject}: no avatar yet")
            continue
        lines.append(f"{subject}: avatar in {folder / 'avatar'}")
        for driving in [d for s, d in config.animations if s == subject]:
            video = folder / "animation" / driving / "renders.mp4"
            state = str(video) if video.is_file() else "not animated yet"
            lines.append(f"  {driving}: {state}")
        if row.is_evaluated:
            lines.append(f"  held-out views: {_figures(folder / 'evaluation' / 'metrics.json')}")
    failures = read_failures(results, config)
    if failures:
        lines += ["", "Failed:", failure_table(failures)]
    return "\n".join(lines)


def _figures(path: Path) -> str:
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))["summary"]
        line = (
            f"PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.3f} on {summary['num_views']} "
            f"views (nearest reference photo: {summary['baseline_psnr']:.2f} dB, "
            f"{summary['baseline_ssim']:.3f})"
        )
        lpips = summary.get("lpips")
        return line if lpips is None else f"{line}, LPIPS {lpips:.3f}"
    except FileNotFoundError:
        return "not evaluated yet"
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is not readable ({error!r})"
