"""Shortcuts for large plans: the same answers, asked for less often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import snakemake.api  # noqa: F401  (the others import each other in a circle)
from snakemake import common, rules
from snakemake.dag import ScriptProcessor
from snakemake.output_index import OutputIndex

from cap4d_core.batch.planning import speed_up_planning


class Calls:
    """Counts what reaches the function that was replaced."""

    def __init__(self, answer: Any = None) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.answer = answer

    def __call__(self, *arguments: Any) -> Any:
        self.seen.append(arguments)
        return self.answer


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything that is replaced, put back after the test."""
    import smart_open

    monkeypatch.setattr("gc.set_threshold", lambda *numbers: None)
    monkeypatch.setattr(smart_open, "parse_uri", smart_open.parse_uri)
    for module in (common, rules):
        monkeypatch.setattr(module, "get_function_params", common.get_function_params)
    monkeypatch.setattr(OutputIndex, "match_producers", OutputIndex.match_producers)
    monkeypatch.setattr(ScriptProcessor, "process_job", ScriptProcessor.process_job)
    return monkeypatch


def test_script_is_looked_for_once_per_rule(patches: pytest.MonkeyPatch) -> None:
    calls = Calls()
    patches.setattr(ScriptProcessor, "process_job", lambda self, job: calls(job.rule.script))
    speed_up_planning()
    processor = ScriptProcessor(dag=None)
    for path in ("a.py", "b.py", "{w}.py"):
        for _ in range(3):
            processor.process_job(SimpleNamespace(rule=SimpleNamespace(script=path)))
    # One whose name depends on the job may be there for one job and absent for the next.
    assert calls.seen == [("a.py",), ("b.py",), *[("{w}.py",)] * 3]


def test_absent_script_is_looked_for_again(patches: pytest.MonkeyPatch) -> None:
    def absent(self: Any, job: Any) -> None:
        raise FileNotFoundError

    patches.setattr(ScriptProcessor, "process_job", absent)
    speed_up_planning()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            ScriptProcessor(None).process_job(SimpleNamespace(rule=SimpleNamespace(script="a.py")))


def test_signatures_and_matches_are_the_same(patches: pytest.MonkeyPatch) -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, wildcards: Any, attempt: int) -> int:
            return attempt

    asked = Calls({"a rule"})
    patches.setattr(OutputIndex, "match_producers", lambda self, path: asked(path))
    plain = common.get_function_params
    speed_up_planning()
    for function in (lambda wildcards, input: input, Unhashable(), Calls().__call__):
        for _ in range(2):
            assert rules.get_function_params(function) == plain(function)
    indices = [OutputIndex([]), OutputIndex([])]
    for index in indices * 2:
        assert index.match_producers("x") == {"a rule"}
    assert asked.seen == [("x",)] * 2  # once per index


def test_other_versions_of_snakemake_are_left_as_they_are(patches: pytest.MonkeyPatch) -> None:
    patches.delattr(ScriptProcessor, "process_job")
    patches.delattr(OutputIndex, "match_producers")
    speed_up_planning()
    assert not hasattr(OutputIndex, "match_producers")
