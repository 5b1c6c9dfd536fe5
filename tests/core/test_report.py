"""The report page: complete, missing, failed and damaged results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from cap4d_core.animation.video import VideoWriter
from cap4d_core.errors import InputFileError
from cap4d_core.files.images import write_image
from cap4d_core.report.report import write_report
from cap4d_core.report.thumbnails import (
    contact_sheet,
    data_uri,
    evenly_spaced,
    folder_sheet,
    video_sheet,
)


class Page(HTMLParser):
    """What the tests ask about: texts, tags with attributes, and whether tags nest."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _picture(seed: int = 0, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def _video(path: Path, frames: int = 6) -> Path:
    with VideoWriter(path, 12) as writer:
        for i in range(frames):
            writer.write(np.full((32, 48, 3), 40 * i, np.uint8))
    return path


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content, "utf-8")


def _complete_subject(results: Path, name: str) -> None:
    subject = results / name
    write_image(subject / "tracking" / "overlay.png", _picture())
    quality = {
        "landmark_error_px": 1.2345,
        "references": [
            {"camera": "cam0", "yaw_deg": 12.5, "crop_box": [1, 2, 3, 4], "flags": []},
            {"camera": "cam1", "yaw_deg": -40.0, "flags": ["small face", "turned away"]},
        ],
    }
    _write(subject / "tracking" / "quality.json", quality)
    _write(subject / "tracking" / "fit.npz", "x")
    for i in range(3):
        write_image(subject / "views/reference_images/crops" / f"{i:05d}.png", _picture(i))
    for i in range(15):
        write_image(subject / "views/generated_images/images" / f"{i:05d}.png", _picture(i))
    write_image(subject / "avatar" / "metrics.png", _picture())
    write_image(subject / "avatar" / "previews" / "00100.png", _picture())
    _write(subject / "avatar" / "avatar.safetensors", "x" * 2500)
    _write(subject / "avatar" / "avatar.json", {"iterations": 4711})
    view = {
        "view": "00000.png", "psnr": 27.123, "ssim": 0.9123, "baseline_psnr": 20.0,
        "psnr_gain": 7.123, "angle_to_reference_deg": 33.3,
    }  # fmt: skip
    summary = {**{k: v for k, v in view.items() if k != "view"}, "mean_angle_to_reference_deg": 33}
    _write(subject / "evaluation" / "metrics.json", {"views": [view], "summary": summary})
    write_image(subject / "evaluation" / "side_by_side.png", _picture())
    _video(subject / "animation" / "talk" / "renders.mp4")
    _write(subject / "animation" / "talk" / "exported_animation.ply", "x")
    _video(results / "driving" / "talk" / "overlay.mp4")


def _report(results: Path, subjects: dict[str, list[str]], **options: object) -> Page:
    write_report(results / "index.html", results, subjects, **options)  # type: ignore[arg-type]
    return Page((results / "index.html").read_text("utf-8"))


def test_a_complete_subject_shows_every_stage(tmp_path: Path) -> None:
    _complete_subject(tmp_path, "ann")
    page = _report(
        tmp_path, {"ann": ["talk"]}, settings={"quality": "medium"}, versions={"torch": "2.13"}
    )
    for expected in (
        "landmark_error_px", "1.234", "yaw_deg", "-40", "small face; turned away",
        "Reference views (3)",
        "Generated views (12 of 15)",
        "27.1 dB", "7.1 dB", "0.912", "1 of 1", "4711", '"quality": "medium"', "2.13", "2.5 kB",
        "Last preview of the fit (00100.png)", "truth, avatar, nearest reference",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "failed" not in page.text and "Nothing here" not in page.text
    assert len(page.all("video")) == 2


def test_everything_linked_exists_and_nothing_is_remote(tmp_path: Path) -> None:
    name = "ann #1 100% ü"
    _complete_subject(tmp_path, name)
    page = _report(tmp_path, {name: ["talk"]})
    links = [a["href"] for a in page.all("a")] + [v["src"] for v in page.all("video")]
    anchors = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert len(links) > 6
    for link in links:
        assert link is not None
        if link.startswith("#"):
            assert link in anchors
        else:
            assert "://" not in link and not link.startswith("/")
            assert (tmp_path / unquote(link)).is_file(), link
    assert all((i["src"] or "").startswith("data:image/") for i in page.all("img"))
    assert not page.all("script") and not page.all("link")
    html = (tmp_path / "index.html").read_text("utf-8")
    assert "http://" not in html and "https://" not in html


def test_the_results_folder_can_be_moved(tmp_path: Path) -> None:
    _complete_subject(tmp_path / "a", "ann")
    _report(tmp_path / "a", {"ann": ["talk"]})
    (tmp_path / "a").rename(tmp_path / "b")
    page = Page((tmp_path / "b" / "index.html").read_text("utf-8"))
    assert (tmp_path / "b" / str(page.all("video")[0]["src"])).is_file()


def test_subjects_are_found_when_not_named(tmp_path: Path) -> None:
    _complete_subject(tmp_path, "ann")
    (tmp_path / "assets" / "head_model").mkdir(parents=True)
    write_report(tmp_path / "page.html", tmp_path)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert "1 subject." in page.text and "Animation: talk" in page.text
    assert "assets" not in page.text


def test_failures_and_absences_are_told_apart(tmp_path: Path) -> None:
    _complete_subject(tmp_path, "ann")
    page = _report(
        tmp_path,
        {"ann": ["talk", "sing"], "bob": ["talk"], "eve": []},
        failures={"bob": "no face in photo.jpg", "ann/animation/sing": "fit.npz: NaN"},
    )
    text = page.text
    assert "This subject failed: no face in photo.jpg" in text
    assert "fit.npz: NaN" in text
    assert "1 of 2" in text
    assert text.count("Nothing here") == 4 + 1 + 4  # bob's and eve's stages
    states = [(a.get("class") or "").split()[-1] for a in page.all("span") if "badge" in str(a)]
    assert states[:3] == ["failed", "failed", "missing"]  # the overview


def test_damaged_files_cost_their_figure_not_the_page(tmp_path: Path) -> None:
    _complete_subject(tmp_path, "ann")
    subject = tmp_path / "ann"
    _write(subject / "tracking" / "overlay.png", "no picture")
    _write(subject / "evaluation" / "metrics.json", "{broken")
    _write(subject / "animation" / "talk" / "renders.mp4", "no video")
    text = _report(tmp_path, {"ann": ["talk"]}).text
    assert "overlay.png: found a file that is no readable image" in text
    assert "no readable media" in text
    assert "Generated views (12 of 15)" in text


def test_names_and_messages_are_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    page = _report(tmp_path, {evil: []}, failures={evil: "<b>bold</b> & more"}, title="<i>")
    assert evil in page.text and "<b>bold</b> & more" in page.text
    assert not page.all("script") and not page.all("b") and not page.all("i")


def test_anchors_are_unique(tmp_path: Path) -> None:
    page = _report(tmp_path, {"a b": [], "a/b": [], "a-b": []})
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_is_accessible_in_the_basics(tmp_path: Path) -> None:
    _complete_subject(tmp_path, "ann")
    page = _report(tmp_path, {"ann": ["talk"]})
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title") and len(page.all("main")) == 1 and len(page.all("h1")) == 1
    assert all(image.get("alt") for image in page.all("img"))
    assert all(video.get("aria-label") and "controls" in video for video in page.all("video"))
    assert all(cell.get("scope") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_no_subjects(tmp_path: Path) -> None:
    assert "There are no subjects" in _report(tmp_path, {}).text


def test_contact_sheet_places_images_without_distortion() -> None:
    wide, square = np.zeros((10, 20, 3), np.uint8), np.zeros((50, 50, 3), np.uint8)
    sheet = contact_sheet([wide, wide, wide, square], columns=3, width=40, gap=2)
    assert sheet.shape == (42, 124, 3)  # places of 40 x 20, as the first image
    assert (sheet[:20, :40] == 0).all() and (sheet[20:22] == 255).all()
    assert (sheet[22:, 10:30] == 0).all() and (sheet[22:, :10] == 255).all()
    assert (sheet[22:, 42:] == 255).all()  # two places are empty


@pytest.mark.parametrize(("count", "wanted"), [(10, 4), (3, 6), (1, 5), (7, 1), (0, 3), (1000, 12)])
def test_evenly_spaced(count: int, wanted: int) -> None:
    chosen = evenly_spaced(count, wanted)
    assert len(chosen) == len(set(chosen)) == min(count, wanted)
    if len(chosen) > 1:
        assert chosen[0] == 0 and chosen[-1] == count - 1


def test_video_sheet_shows_first_and_last_frame(tmp_path: Path) -> None:
    sheet = video_sheet(_video(tmp_path / "a.mp4"), wanted=3, columns=3)
    middle = sheet[60].astype(int)
    assert abs(middle[90, 0] - 0) < 6 and abs(middle[-90, 0] - 200) < 6
    broken = tmp_path / "b.mp4"
    broken.write_bytes(b"nothing")
    with pytest.raises(InputFileError):
        video_sheet(broken)
    assert folder_sheet(tmp_path / "absent") is None


def test_wide_pictures_are_shrunk() -> None:
    narrow, wide = (data_uri(np.zeros((40, w, 3), np.uint8), max_width=100) for w in (100, 5000))
    assert len(wide) <= len(narrow)
