"""Tables of subjects and driving sequences: what is accepted, and how problems are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from cap4d_core.subjects import (
    DRIVING_PATHS,
    RESERVED_NAMES,
    SUBJECT_PATHS,
    Driving,
    Subject,
    expand_variables,
    read_table,
)


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "table.tsv"
    path.write_text("\n".join(line.replace(" | ", "\t") for line in lines) + "\n", "utf-8")
    return path


def subjects(path: Path) -> tuple[dict[str, Subject], list[str]]:
    return read_table(path, Subject, SUBJECT_PATHS)


def test_rows_keep_order_and_resolve_paths_from_the_table(tmp_path: Path) -> None:
    path = write(
        tmp_path, "subject | tracking", "zoe | fits/zoe", "", "# comment", "001 | /abs/one"
    )
    rows, problems = subjects(path)
    assert problems == []
    assert list(rows) == ["zoe", "001"]  # digits stay text
    assert rows["zoe"].tracking == str(tmp_path / "fits" / "zoe")
    assert rows["001"].tracking == "/abs/one"


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes("\ufeffsubject\treference\r\nada\tdemo:7\r\n".encode())
    rows, problems = subjects(path)
    assert problems == [] and rows["ada"].demo_seed == 7


def test_demo_subjects_are_evaluated_and_real_ones_when_asked(tmp_path: Path) -> None:
    path = write(
        tmp_path, "subject | reference | tracking | held_out",
        "a | demo:1", "b |  | fit", "c |  | fit | truth",
    )  # fmt: skip
    rows, problems = subjects(path)
    assert problems == []
    assert [row.is_evaluated for row in rows.values()] == [True, False, True]


def test_a_ready_avatar_needs_no_photos(tmp_path: Path) -> None:
    rows, problems = subjects(write(tmp_path, "subject | avatar", "a | old/a"))
    assert problems == []
    assert rows["a"].avatar == str(tmp_path / "old" / "a") and not rows["a"].is_evaluated


def test_driving_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "driving | fit | start_frame | num_frames", "talk | a.npz | 10 | 48")
    rows, problems = read_table(path, Driving, DRIVING_PATHS)
    assert problems == []
    assert (rows["talk"].start_frame, rows["talk"].num_frames) == (10, 48)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["subject | trackin", "a | x"], "column 'trackin'; did you mean 'tracking'?"),
        (["subject | subject | tracking", "a | b | x"], "column 'subject' appears 2 times"),
        (["reference | tracking", "a | x"], "table.tsv:1: no column 'subject'"),
        (["subject,tracking", "a,x"], "table.tsv:1: no tabs"),
        (["subject | tracking"], "a header but no rows"),
        ([""], "empty; its first line must name columns"),
        (["subject | tracking", "", "Ana B | x"], "table.tsv:3: subject: must consist of"),
        (["subject | tracking", "../x | x"], "table.tsv:2: subject: must consist of"),
        (["subject | tracking", "a | x", "a | y"], "table.tsv:3: subject 'a' is already in line 2"),
        (["subject | tracking", "logs | x"], "'logs' is the name of a folder of the results"),
        (["subject | tracking", "a | x | y"], "table.tsv:2: 3 cells, the header has 2"),
        (["subject | tracking", " | x"], "table.tsv:2: subject: must be given"),
        (["subject", "a"], "'a' has neither reference"),
        (["subject | avatar | held_out", "a | old | truth"], "held_out: the evaluation of the"),
        (["subject | reference", "a | demo:x"], "'demo:x' is not demo:SEED"),
        (["subject | reference | tracking", "a | demo:1 | x"], "must be empty for demo subjects"),
        (["subject | tracking", "a | ${SURELY_UNSET}/x"], "variable SURELY_UNSET is not set"),
    ],
)  # fmt: skip
def test_mistakes_in_the_subjects_table(tmp_path: Path, lines: list[str], expected: str) -> None:
    _, problems = subjects(write(tmp_path, *lines))
    assert len(problems) == 1, problems
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["driving | video", "a | "], "'a' has neither fit nor video"),
        (["driving | fit | start_frame", "a | x.npz | 1.5"], "start_frame: must be a whole number"),
        (["driving | fit | start_frame", "a | x.npz | -1"], "start_frame: must be at least 0"),
        (["driving | fit | num_frames", "a | x.npz | 0"], "num_frames: must be at least 1"),
        (["driving | video | num_frames", "a | b.mp4 | 9"], "belong to ready fits"),
        (["driving | fit", "a | folder"], "is no .npz file"),
        (["driving | fit | trajectory", "a | x.npz | y.json"], "trajectory: "),
        (["driving | fit | trajectory", "a | demo | y.npz"], "'demo' brings its own camera"),
    ],
)
def test_mistakes_in_the_driving_table(tmp_path: Path, lines: list[str], expected: str) -> None:
    _, problems = read_table(write(tmp_path, *lines), Driving, DRIVING_PATHS)
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_all_problems_of_a_table_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "subject | tracking", "A | x", "b | y", "b | z", "assets | w")
    rows, problems = subjects(path)
    assert [problem.split(": ")[0].rsplit(":", 1)[1] for problem in problems] == ["2", "4", "5"]
    assert "b" in rows


def test_missing_table(tmp_path: Path) -> None:
    _, problems = subjects(tmp_path / "none.tsv")
    assert len(problems) == 1 and "no such file" in problems[0]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    assert expand_variables("${DATA}/x") == "/data/x"
    assert expand_variables("${EMPTY:-/other}/x") == "/other/x"
    assert expand_variables("${NOT_SET:-}x") == "x"
    with pytest.raises(KeyError):
        expand_variables("${NOT_SET}")


def test_reserved_names_cover_what_the_rules_write() -> None:
    rules = Path(__file__).parents[2] / "rules"
    text = "".join(path.read_text() for path in rules.glob("*.smk"))
    for folder in ("assets", "demo", "driving"):
        assert f"<results>/{folder}/" in text and folder in RESERVED_NAMES
