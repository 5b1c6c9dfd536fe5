"""Which jobs failed, and why, in one line each.

Snakemake tells its log handlers about every failed and finished job. What failed is kept in
`{results}/.workflow/failures.json` from the first failure on, so that a killed run can be asked,
too. The reason is taken from the job's own log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cap4d_core.config import Config

FAILURES_FILE = Path(".workflow", "failures.json")
_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+) +", re.MULTILINE)
_DRIVING_RULES = frozenset({"track_driving", "make_demo_driving"})
_MAX_REASON = 300
_LOG_TAIL_BYTES = 65_536
# Part of a subject's results (as in the report) that a rule makes.
_PARTS = {
    "track_subject": "tracking",
    "make_demo_subject": "tracking",
    "plan_views": "views",
    "encode_references": "views",
    "crop_references": "views",
    "sample_views": "views",
    "decode_views": "views",
    "fit_avatar": "avatar",
    "import_avatar": "avatar",
    "make_demo_held_out": "evaluation",
    "evaluate_avatar": "evaluation",
}


@dataclass(frozen=True)
class Failure:
    """One failed job.

    Attributes:
        rule: its stage.
        subject, driving: whose; empty for jobs that all share.
        reason: one line.
        log: its log file.
        outputs: what it should have made.
    """

    rule: str
    subject: str
    driving: str
    reason: str
    log: str
    outputs: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """Subject, driving sequence or both, for people."""
        return " / ".join(name for name in (self.subject, self.driving) if name) or "all subjects"

    def is_settled(self) -> bool:
        """Whether everything that it should have made is there by now."""
        return bool(self.outputs) and all(os.path.exists(path) for path in self.outputs)


class FailureWatch(logging.Handler):
    """Listens to Snakemake's log for failed jobs, and writes them down.

    Args:
        results: results folder.
    """

    def __init__(self, results: str | Path) -> None:
        super().__init__(logging.INFO)
        self.results = Path(results)
        self.failures = {f.log or f.rule: f for f in read_failures(results)}
        self._logs: dict[Any, str] = {}  # by job number

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one message; never raises."""
        try:
            event = str(getattr(record, "event", ""))
            if event == "job_info":
                self._logs[vars(record).get("jobid")] = _key(vars(record))
            elif event == "job_error":
                self._failed(vars(record))
            elif event == "job_finished":
                self._finished(self._logs.get(vars(record).get("job_id"), ""))
        except Exception:  # reporting must not end a run
            self.handleError(record)

    def _failed(self, values: Mapping[str, Any]) -> None:
        log = next((str(path) for path in values.get("log") or []), "")
        rule = str(values.get("rule_name"))
        subject, driving = whose_log(rule, log)
        reason = reason_in_log(log) or _reason_of_scheduler(values)
        outputs = tuple(str(path) for path in values.get("output") or [])
        self.failures[_key(values)] = Failure(rule, subject, driving, reason, log, outputs)
        self._write()

    def _finished(self, key: str) -> None:
        if self.failures.pop(key, None) is not None:  # an attempt after the failed one
            self._write()

    def _write(self) -> None:
        path = self.results / FAILURES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"failures": [asdict(f) for f in self.failures.values()]}
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)


def _key(values: Mapping[str, Any]) -> str:
    """What names a job in this run and the next: its log, else its rule."""
    return next((str(path) for path in values.get("log") or []), str(values.get("rule_name")))


def watch_failures(results: str | Path) -> FailureWatch:
    """Begins to write down the failed jobs of this run."""
    watch = FailureWatch(results)
    logging.getLogger("snakemake.logging").addHandler(watch)
    return watch


def read_failures(results: str | Path, config: Config | None = None) -> list[Failure]:
    """Failed jobs whose files are still not there; with a configuration, only of its subjects."""
    try:
        entries = json.loads((Path(results) / FAILURES_FILE).read_text("utf-8"))["failures"]
        found = [Failure(**{**entry, "outputs": tuple(entry["outputs"])}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing failed here yet, or the file is of another version
    open_ones = [failure for failure in found if not failure.is_settled()]
    if config is None:
        return open_ones
    return [
        failure
        for failure in open_ones
        if failure.subject in ("", *config.subjects) and failure.driving in ("", *config.driving)
    ]


def whose_log(rule: str, log: str) -> tuple[str, str]:
    """Subject and driving sequence of a job, from the path of its log: .../{rule}/ana/talk.log."""
    parts = Path(log.removesuffix(".log")).parts
    if rule not in parts:
        return "", ""
    names = parts[len(parts) - parts[::-1].index(rule) :]
    if rule in _DRIVING_RULES:
        return "", names[0] if names else ""
    driving = names[1] if rule == "animate_avatar" and len(names) > 1 else ""
    return (names[0] if names else ""), driving


def reason_in_log(log: str | Path) -> str:
    """The last error of a job's log in one line; empty when it has none."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(0, os.path.getsize(log) - _LOG_TAIL_BYTES))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return ""
    records = list(_RECORD.finditer(text))
    for number in reversed(range(len(records))):
        if records[number][1] in ("ERROR", "CRITICAL"):
            end = records[number + 1].start() if number + 1 < len(records) else len(text)
            return _one_line(text[records[number].end() : end])
    return ""


def _one_line(message: str) -> str:
    head, traceback, rest = message.partition("Traceback (most recent call last):")
    if traceback:  # the last line that is not indented names the exception
        last = [line for line in rest.splitlines() if line.strip() and not line.startswith(" ")]
        head = last[-1] if last else head
    return textwrap.shorten(" ".join(head.split()), _MAX_REASON, placeholder=" ...")


def _reason_of_scheduler(values: Mapping[str, Any]) -> str:
    """What the executor says about a job whose log says nothing."""
    message = str(values.get("rule_msg") or "")
    return _one_line(f"no error in its log: killed, out of memory or cancelled. {message}")


def failure_table(failures: Sequence[Failure], width: int = 100) -> str:
    """A table for a terminal: who, stage, why; the log below each."""
    who = max(len(f.who) for f in failures)
    rule = max(len(f.rule) for f in failures)
    indent = " " * (who + rule + 4)
    lines = []
    for failure in failures:
        first = f"{failure.who:{who}}  {failure.rule:{rule}}  "
        text = textwrap.wrap(failure.reason, max(40, width - len(first))) or [""]
        lines += [first + text[0], *(indent + line for line in text[1:])]
        lines.append(f"{indent}log: {failure.log or 'none'}")
    return "\n".join(lines)


def report_failures(failures: Iterable[Failure], config: Config) -> dict[str, str]:
    """Failures by `subject/part` as the report wants them; shared ones by what they are."""
    reasons: dict[str, list[str]] = {}
    for failure in failures:
        text = f"{failure.rule}: {failure.reason}" + (f" ({failure.log})" if failure.log else "")
        for key in _report_keys(failure, config):
            reasons.setdefault(key, []).append(text)
    return {key: "\n".join(texts) for key, texts in reasons.items()}


def _report_keys(failure: Failure, config: Config) -> list[str]:
    if failure.subject:
        part = _PARTS.get(failure.rule)
        if failure.driving:
            part = f"animation/{failure.driving}"
        return [f"{failure.subject}/{part}" if part else failure.subject]
    if failure.driving:
        return [
            f"{subject}/animation/{driving}"
            for subject, driving in config.animations
            if driving == failure.driving
        ]
    return [failure.rule]


def end_of_run(config: Config) -> str:
    """What to say when a run ends: how many subjects are finished, and what failed."""
    failures = read_failures(config.results, config)
    done = sum(is_finished(Path(config.results), name, config) for name in config.subjects)
    lines = [f"{done} of {len(config.subjects)} subjects are finished."]
    if failures:
        lines += [f"{len(failures)} failed:", "", failure_table(failures), ""]
        lines.append("Correct the cause and run the same command again; what is there is kept.")
    return "\n".join(lines)


def is_finished(results: Path, subject: str, config: Config) -> bool:
    """Whether a subject has its avatar, its animations and, where wanted, its evaluation."""
    folder = results / subject
    wanted = [folder / "avatar" / "avatar.safetensors"]
    wanted += [
        folder / "animation" / driving / "renders.mp4"
        for name, driving in config.animations
        if name == subject
    ]
    if config.subjects[subject].is_evaluated:
        wanted.append(folder / "evaluation" / "metrics.json")
    return all(path.is_file() for path in wanted)


def write_failure_report(config: Config) -> None:
    """Writes the report although the run failed; says why where that does not work."""
    try:
        from cap4d_core.report.report import write_report

        write_report(
            Path(config.results) / "index.html",
            config.results,
            {
                name: [driving for subject, driving in config.animations if subject == name]
                for name in config.subjects
            },
            failures=report_failures(read_failures(config.results, config), config),
            settings=config.settings.model_dump(mode="json"),
        )
    except Exception as error:  # e.g. Snakemake outside the environment of the jobs, a full disk
        print(f"No report was written: {type(error).__name__}: {error}", file=sys.stderr)
