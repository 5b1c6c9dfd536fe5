"""What failed, why, and what is said about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cap4d_core.batch.failures import (
    Failure,
    FailureWatch,
    end_of_run,
    failure_table,
    read_failures,
    reason_in_log,
    report_failures,
    whose_log,
)
from cap4d_core.config import Config, load_config

HEADER = "2026-01-02 03:04:05 INFO    fit_avatar subject=ana\n"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "subjects.tsv").write_text("subject\ttracking\nana\tana\nben\tben\n")
    (tmp_path / "driving.tsv").write_text("driving\tfit\ntalk\tt.npz\n")
    raw = {"subjects": "subjects.tsv", "driving": "driving.tsv", "results": str(tmp_path / "out")}
    return load_config(raw, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "2026-01-02 03:04:06 ERROR   a/fit.npz: found no field 'rot'; expected it.\n",
            "a/fit.npz: found no field 'rot'; expected it.",
        ),
        (
            "2026-01-02 03:04:06 ERROR   fit_avatar failed\nTraceback (most recent call last):\n"
            '  File "x.py", line 3, in f\n    g()\nValueError: bad\n',
            "ValueError: bad",
        ),
        (
            "2026-01-02 03:04:06 ERROR   missing:\n  one\n  two\n2026-01-02 03:04:07 INFO    bye\n",
            "missing: one two",
        ),
        ("2026-01-02 03:04:06 INFO    half way\n", ""),
    ],
    ids=["sentence", "exception", "several lines", "none"],
)
def test_reason_is_the_last_error_of_the_log(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "ana.log"
    log.write_text(HEADER + text)
    assert reason_in_log(log) == reason


def test_reason_is_found_behind_much_output_and_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "ana.log"
    log.write_text("noise\n" * 100_000 + "2026-01-02 03:04:06 ERROR   " + "word " * 1000)
    assert reason_in_log(log).startswith("word word") and len(reason_in_log(log)) <= 300
    assert reason_in_log(tmp_path / "absent.log") == ""


@pytest.mark.parametrize(
    ("rule", "log", "names"),
    [
        ("fit_avatar", "r/logs/fit_avatar/ana.log", ("ana", "")),
        ("sample_views", "r/logs/sample_views/ana/1/2-of-8.log", ("ana", "")),
        ("animate_avatar", "r/logs/animate_avatar/ana/talk.log", ("ana", "talk")),
        ("track_driving", "r/logs/track_driving/talk.log", ("", "talk")),
        ("prepare_mmdm", "r/logs/prepare_mmdm.log", ("", "")),
        ("fit_avatar", "", ("", "")),
    ],
)
def test_whose_job_it_was(rule: str, log: str, names: tuple[str, str]) -> None:
    assert whose_log(rule, log) == names


def message(event: str, **values: Any) -> logging.LogRecord:
    """A record with the fields that Snakemake gives its handlers."""
    record = logging.LogRecord("snakemake.logging", logging.ERROR, "", 0, "", None, None)
    record.__dict__.update(event=event, **values)
    return record


def failed(folder: Path, rule: str, name: str, jobid: int) -> logging.LogRecord:
    log = folder / "logs" / rule / f"{name}.log"
    return message(
        "job_error", rule_name=rule, jobid=jobid, rule_msg=None, log=[str(log)],
        output=[str(folder / name / "made")],
    )  # fmt: skip


def test_failures_are_kept_until_the_job_went_well(tmp_path: Path) -> None:
    watch = FailureWatch(tmp_path)
    for number, name in enumerate(("ana", "ben", "cy")):
        record = failed(tmp_path, "fit_avatar", name, number)
        log = Path(record.__dict__["log"][0])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"2026-01-02 03:04:06 ERROR   {name} is broken\n")
        watch.emit(
            message("job_info", jobid=number, rule_name="fit_avatar", log=record.__dict__["log"])
        )
        watch.emit(record)
    assert [f.reason for f in read_failures(tmp_path)] == [
        "ana is broken", "ben is broken", "cy is broken"
    ]  # fmt: skip
    # Another attempt of one; the file of another is there.
    watch.emit(message("job_finished", job_id=1))
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "made").touch()
    assert [f.subject for f in read_failures(tmp_path)] == ["ana"]
    # The next run knows them, and forgets what it makes itself.
    again = FailureWatch(tmp_path)
    again.emit(message("job_info", jobid=7, rule_name="fit_avatar",
                       log=[str(tmp_path / "logs/fit_avatar/ana.log")]))  # fmt: skip
    again.emit(message("job_finished", job_id=7))
    assert read_failures(tmp_path) == []


def test_a_job_without_a_word_is_explained_by_its_scheduler(tmp_path: Path) -> None:
    watch = FailureWatch(tmp_path)
    record = failed(tmp_path, "sample_views", "ana", 3)
    record.__dict__["rule_msg"] = "SLURM-job '17' failed, SLURM status is: 'OUT_OF_MEMORY'."
    watch.emit(record)
    reason = read_failures(tmp_path)[0].reason
    assert "no error in its log" in reason and "OUT_OF_MEMORY" in reason


def test_damaged_list_of_failures_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / ".workflow" / "failures.json"
    path.parent.mkdir()
    for text in ("{", '{"failures": [{"rule": "x"}]}', "[]"):
        path.write_text(text)
        assert read_failures(tmp_path) == []


def test_table_names_who_stage_why_and_log() -> None:
    table = failure_table(
        [
            Failure("animate_avatar", "ana", "talk", "fit.npz: NaN", "logs/a.log"),
            Failure("prepare_mmdm", "", "", "no weights " * 20, "logs/p.log"),
        ]
    )
    lines = table.splitlines()
    assert lines[0] == "ana / talk    animate_avatar  fit.npz: NaN"
    assert lines[1].strip() == "log: logs/a.log"
    assert lines[2].startswith("all subjects  prepare_mmdm    no weights")
    assert max(map(len, lines)) <= 100


def test_report_gets_failures_where_they_belong(config: Config) -> None:
    reasons = report_failures(
        [
            Failure("sample_views", "ana", "", "killed", "l1"),
            Failure("decode_views", "ana", "", "gone", "l2"),
            Failure("track_driving", "", "talk", "no face", "l3"),
            Failure("prepare_mmdm", "", "", "wrong hash", "l4"),
        ],
        config,
    )
    assert reasons == {
        "ana/views": "sample_views: killed (l1)\ndecode_views: gone (l2)",
        "ana/animation/talk": "track_driving: no face (l3)",
        "ben/animation/talk": "track_driving: no face (l3)",
        "prepare_mmdm": "prepare_mmdm: wrong hash (l4)",
    }


def test_end_of_run_counts_and_leaves_out_subjects_of_other_tables(config: Config) -> None:
    results = Path(config.results)
    for path in ("ana/avatar/avatar.safetensors", "ana/animation/talk/renders.mp4"):
        (results / path).parent.mkdir(parents=True, exist_ok=True)
        (results / path).touch()
    watch = FailureWatch(results)
    watch.emit(failed(results, "fit_avatar", "ben", 1))
    watch.emit(failed(results, "fit_avatar", "dan", 2))
    text = end_of_run(config)
    assert "1 of 2 subjects are finished." in text and "1 failed:" in text
    assert "ben" in text and "dan" not in text
