"""All evaluations of a run beside one another (rule evaluate).

    {output}/summary.json      figures per subject and reenactment, means, why some are absent
    {output}/subjects.csv      one row per subject: held-out views
    {output}/reenactments.csv  one row per subject and driving sequence
    {output}/summary.png       bars per subject

Means are over subjects, each counting once however many views it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.evaluation.tables import write_csv, write_subjects_plot
from cap4d_core.files.basic import read_json, write_json

_WHAT = "results of an evaluation"
_PANELS = (
    ("PSNR (dB)", "psnr", "baseline_psnr"),
    ("SSIM", "ssim", "baseline_ssim"),
    ("LPIPS", "lpips", "baseline_lpips"),
    ("landmark distance\n(% of the face)", "akd_percent", "baseline_akd_percent"),
    ("identity similarity", "identity_similarity", "baseline_identity_similarity"),
    ("landmark jitter (px)", "landmark_jitter", ""),
)


def summarise_evaluations(
    subjects: Mapping[str, str | Path],
    reenactments: Mapping[tuple[str, str], str | Path],
    output_dir: str | Path,
) -> dict[str, Any]:
    """Collects `metrics.json` files; see the module for the files written.

    Args:
        subjects: file of every evaluated subject.
        reenactments: file of every (subject, driving sequence).
        output_dir: created.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: nothing was evaluated, or a file is missing or of another kind.
    """
    if not subjects and not reenactments:
        raise UserError(
            "Nothing to evaluate: no subject has true pictures (column held_out, demo subjects), "
            "evaluation.protocol sets nothing aside, and there are no driving sequences to reenact."
        )
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    of_subjects = [_subject_row(name, _read(path)) for name, path in subjects.items()]
    of_films = [
        _reenactment_row(name, driving, _read(path))
        for (name, driving), path in reenactments.items()
    ]
    content: dict[str, Any] = {
        "subjects": of_subjects,
        "mean": mean_row(of_subjects),
        "reenactments": of_films,
        "mean_reenactment": mean_row(of_films),
    }
    write_json(output_dir / "summary.json", content)
    names: tuple[tuple[str, list[dict[str, Any]], str], ...] = (
        ("subjects.csv", of_subjects, "mean"),
        ("reenactments.csv", of_films, "mean_reenactment"),
    )
    for name, rows, mean in names:
        if rows:
            write_csv(output_dir / name, [*rows, {"subject": "mean", **content[mean]}])
        else:
            (output_dir / name).unlink(missing_ok=True)
    shown = of_subjects or [
        {**row, "subject": f"{row['subject']}\n{row['driving']}"} for row in of_films
    ]
    write_subjects_plot(output_dir / "summary.png", shown, _PANELS)
    return content


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the rows that have a figure."""
    names = dict.fromkeys(name for row in rows for name, v in row.items() if _is_number(v))
    return {
        name: float(np.mean([row[name] for row in rows if _is_number(row.get(name))]))
        for name in names
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: str | Path) -> dict[str, Any]:
    content = read_json(path, _WHAT)
    if not isinstance(content, dict) or not isinstance(content.get("summary"), dict):
        raise InputFileError(path, "no 'summary'", _WHAT, "Delete it and run the workflow again.")
    return content


def _subject_row(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    protocol = metrics.get("protocol", {}).get("protocol", "ground_truth")
    return {
        "subject": name,
        "protocol": protocol,
        **metrics["summary"],
        **metrics.get("temporal", {}).get("avatar", {}),
        "absent": metrics.get("absent", {}),
    }


def _reenactment_row(name: str, driving: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    truth = metrics.get("truth", {})
    known = ("psnr", "ssim", "lpips", "akd", "akd_percent", "baseline_psnr")
    return {
        "subject": name,
        "driving": driving,
        **metrics["summary"],
        **metrics.get("temporal", {}).get("avatar", {}),
        **truth.get("temporal", {}).get("avatar", {}),
        **{key: truth["summary"][key] for key in known if key in truth.get("summary", {})},
        **{f"{k}_best": v for k, v in truth.get("following", {}).items() if k.endswith("_error")},
        "absent": metrics.get("absent", {}),
    }
