"""Plots of the sharding experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.sharding.report import COLUMNS, SYNC_NAMES, Results, difference, values
from benchmarks.sharding.settings import SHARDS

SHOWN = ("psnr_far", "differing_psnr")


def plot_shards(results: Results, path: Path) -> None:
    """Change against one shard over the number of shards: a row per number of references."""
    rows = results.references
    figure, axes = plt.subplots(
        len(rows), len(SHOWN), figsize=(9, 3.2 * len(rows)), squeeze=False, sharey="col"
    )
    for row, references in enumerate(rows):
        base = results.base(references)
        for column, name in enumerate(SHOWN):
            axis = axes[row, column]
            axis.axhline(0, color="0.6", linewidth=0.8)
            axis.set_title(f"{COLUMNS[name]}, {references} reference(s)", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_xticks(SHARDS, [str(s) for s in SHARDS])
            axis.set_xlabel("shards")
            axis.set_ylabel("change against one shard (dB)")
            if base is None:
                continue
            for sync, label in SYNC_NAMES.items():
                _differences(axis, results, base, references, sync, name, f"dealt anew: {label}")
            alone = results.find(references=references, shards=0)
            found = None if alone is None else difference(alone, base, name)
            if found is not None:
                axis.axhline(
                    found[0], color="tab:red", linestyle=":", label="every call on its own"
                )
    axes[0, 0].legend(fontsize=8)
    _save(figure, path)


def _differences(
    axis: Any,
    results: Results,
    base: dict[str, Any],
    references: int,
    sync: str,
    name: str,
    label: str,
) -> None:
    points = [(1, 0.0, 0.0)]
    for shards in SHARDS[1:]:
        setting = results.find(references=references, shards=shards, sync=sync)
        found = None if setting is None else difference(setting, base, name)
        if found is not None:
            points.append((shards, found[0], np.nan_to_num(found[1])))
    if len(points) > 1:
        x, y, error = np.array(points).T
        axis.errorbar(x, y, error, marker="o", markersize=4, capsize=2, label=label)


def plot_steps(results: Results, path: Path) -> None:
    """Quality over the number of steps, a line per solver; bars: spread over the people."""
    few = results.references[0]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(9, 3.4))
    found = [
        s
        for s in results.settings
        if (s["references"], s["shards"], s["guidance"]) == (few, 1, results.content["guidance"])
    ]
    for axis, name in zip(axes, SHOWN, strict=True):
        for solver in dict.fromkeys(s["solver"] for s in found):
            line = sorted((s for s in found if s["solver"] == solver), key=lambda s: s["steps"])
            mean = [np.nanmean(values(s, name)) for s in line]
            axis.plot([s["steps"] for s in line], mean, marker="o", markersize=4, label=solver)
        axis.set_xscale("log")
        ticks = sorted({s["steps"] for s in found})
        axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.set_ylabel(COLUMNS[name])
    axes[0].legend(fontsize=8)
    _save(figure, path)


def write_views(results: Results, pictures: Path, path: Path) -> bool:
    """Rows of views below one another: truth, one shard, most shards, no exchange at all.

    Returns:
        Whether there were any.
    """
    rows = []
    for references in results.references:
        rows.append((f"truth, {references} reference(s)", pictures / f"refs{references}_truth.png"))
        for shards, sync, name in (
            (1, "none", "1 shard"),
            (SHARDS[-1], "default", f"{SHARDS[-1]} shards"),
            (SHARDS[-1], "none", f"{SHARDS[-1]} shards, never dealt anew"),
            (0, "none", "every call on its own"),
        ):
            setting = results.find(references=references, shards=shards, sync=sync)
            if setting is not None:
                rows.append((name, pictures / f"{setting['key']}.png"))
    rows = [(name, file) for name, file in rows if file.is_file()]
    if not rows:
        return False
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 1.55 * len(rows)), squeeze=False)
    for axis, (name, file) in zip(axes[:, 0], rows, strict=True):
        axis.imshow(plt.imread(file), interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
