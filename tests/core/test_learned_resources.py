"""Memory and time learned from finished jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cap4d_core.batch.measurements import (
    MAX_JOBS_PER_RULE,
    Measurement,
    read_measurements,
    settings_digest,
)
from cap4d_core.batch.resources import (
    ENOUGH_JOBS,
    FLOOR_MB,
    FLOOR_MIN,
    SECTIONS,
    learn,
    learn_resources,
    quantile,
    read_learned,
)
from cap4d_core.settings import SamplingSettings, SubjectSettings

SETTINGS = SubjectSettings()
SAMPLING = SETTINGS.sampling.model_dump(mode="json")
HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time"


def finished_job(
    results: Path, rule: str, name: str, seconds: float, memory: object, settings: Any = None
) -> None:
    """The files that a finished job leaves."""
    log = results / "logs" / rule / f"{name}.job.json"
    benchmark = results / "benchmarks" / rule / f"{name}.tsv"
    for path in (log, benchmark):
        path.parent.mkdir(parents=True, exist_ok=True)
    params = {"version": 1} | ({} if settings is None else {"settings": settings})
    log.write_text(json.dumps({"format": 1, "rule": rule, "params": params}))
    benchmark.write_text(f"{HEADER}\n{seconds}\t0:00:01\t{memory}\t1\t1\t1\t1\t1\t1\t1\n")


def test_measurements_are_read_with_the_settings_of_their_job(tmp_path: Path) -> None:
    finished_job(tmp_path, "sample_views", "ana/1/1-of-2", 60.5, 4000.25, SAMPLING)
    finished_job(tmp_path, "import_avatar", "ana", 3, "-")
    assert read_measurements(tmp_path) == [
        Measurement("import_avatar", "none", 3.0, None),
        Measurement("sample_views", settings_digest(SAMPLING), 60.5, 4000.25),
    ]
    assert read_measurements(tmp_path / "nowhere") == []


def test_unreadable_and_outdated_benchmarks_are_left_out(tmp_path: Path) -> None:
    for name in ("empty", "text", "no_job", "failed_again", "good"):
        finished_job(tmp_path, "fit_avatar", name, 10, 100)
    folder = tmp_path / "benchmarks" / "fit_avatar"
    (folder / "empty.tsv").write_text("")
    (folder / "text.tsv").write_text("s\tmax_rss\nnumber\t5\n")
    (tmp_path / "logs" / "fit_avatar" / "no_job.job.json").unlink()
    # Begun after the benchmark was written, perhaps with other settings.
    later = os.stat(folder / "failed_again.tsv").st_mtime + 60
    os.utime(tmp_path / "logs" / "fit_avatar" / "failed_again.job.json", (later, later))
    assert len(read_measurements(tmp_path)) == 1


def test_of_very_many_jobs_some_are_read(tmp_path: Path) -> None:
    for number in range(MAX_JOBS_PER_RULE + 50):
        finished_job(tmp_path, "decode_views", f"s{number:04d}", number, 100)
    seconds = [m.seconds for m in read_measurements(tmp_path)]
    assert len(seconds) == len(set(seconds)) == MAX_JOBS_PER_RULE
    assert seconds[0] == 0 and seconds[-1] > MAX_JOBS_PER_RULE + 40


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([1.0], 0.95, 1), (list(range(1, 21)), 0.95, 19), ([1, 2, 3], 0.95, 3), ([1, 2, 3], 0.5, 2)],
)
def test_quantile(values: list[float], share: float, expected: float) -> None:
    assert quantile(values, share) == expected


def measured(count: int, seconds: float, memory: float) -> list[Measurement]:
    return [Measurement("sample_views", settings_digest(SAMPLING), seconds, memory)] * count


def test_learned_values_are_quantile_times_margin_above_the_floor() -> None:
    learned = learn(measured(ENOUGH_JOBS, 3600, 10_000))
    assert learned.memory_mb("sample_views", SETTINGS, 16_000) == 14_300  # 1.4 x 10 000 + 300
    assert learned.runtime_min("sample_views", SETTINGS, 600) == 125  # 2 x 60 + 5
    small = learn(measured(ENOUGH_JOBS, 1, 10))
    assert small.memory_mb("sample_views", SETTINGS, 16_000) == FLOOR_MB
    assert small.runtime_min("sample_views", SETTINGS, 120) == FLOOR_MIN


def test_few_jobs_raise_but_do_not_lower() -> None:
    few = ENOUGH_JOBS - 1
    low, high = learn(measured(few, 60, 1000)), learn(measured(few, 60_000, 40_000))
    assert low.memory_mb("sample_views", SETTINGS, 16_000) == 16_000
    assert low.runtime_min("sample_views", SETTINGS, 120) == 120
    assert high.memory_mb("sample_views", SETTINGS, 16_000) == 56_300
    assert high.runtime_min("sample_views", SETTINGS, 120) == 2005


def test_jobs_of_other_settings_teach_nothing_and_the_seed_is_no_setting() -> None:
    learned = learn(measured(ENOUGH_JOBS, 3600, 10_000))
    other = SETTINGS.model_copy(update={"sampling": SamplingSettings(num_views=28)})
    assert learned.memory_mb("sample_views", other, 16_000) == 16_000
    assert learned.find("sample_views", other) is None
    seeded = SETTINGS.model_copy(update={"sampling": SamplingSettings(seed=7)})
    assert learned.find("sample_views", seeded) is not None
    assert learned.memory_mb("fit_avatar", SETTINGS, 24_000) == 24_000


def test_file_is_the_same_for_the_same_jobs_and_is_read_back(tmp_path: Path) -> None:
    for number in range(6):
        finished_job(tmp_path, "sample_views", f"s{number}", 100 + number, 9000, SAMPLING)
    learned = learn_resources(tmp_path)
    first = (tmp_path / "resources.json").read_bytes()
    learn_resources(tmp_path)
    assert (tmp_path / "resources.json").read_bytes() == first
    assert read_learned(tmp_path).entries == learned.entries
    assert read_learned(tmp_path).memory_mb("sample_views", SETTINGS, 16_000) == 12_900


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "stages": {}}', '{"format": 1}'])
def test_damaged_or_foreign_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "resources.json").write_text(text)
    assert read_learned(tmp_path).memory_mb("fit_avatar", SETTINGS, 24_000) == 24_000


def test_nothing_is_written_where_nothing_was_run(tmp_path: Path) -> None:
    learn_resources(tmp_path)
    assert not (tmp_path / "resources.json").exists()


def test_sections_are_those_of_the_rules() -> None:
    import re

    text = "".join(p.read_text() for p in (Path(__file__).parents[2] / "rules").glob("*.smk"))
    found = {}
    for rule in re.split(r"^rule ", text, flags=re.M)[1:]:
        section = re.search(r"settings=settings\(\"(\w+)\"\)", rule)
        if section:
            found[rule.partition(":")[0]] = section[1]
    assert {rule: found.get(rule) for rule in SECTIONS} == SECTIONS
