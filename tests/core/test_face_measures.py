"""Landmark distance and identity similarity."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cap4d_core.errors import InputFileError, MissingAssetError
from cap4d_core.evaluation.face_comparison import FaceComparison
from cap4d_core.evaluation.faces import FaceReader, keypoint_distance
from cap4d_core.evaluation.identity import (
    FIVE_POINTS,
    TEMPLATE,
    OnnxIdentity,
    align_face,
    mean_embedding,
)
from tests.core.tracker_pictures import frontal_picture


def test_distance_in_pixels_and_of_the_face() -> None:
    truth = np.random.default_rng(0).uniform(0, 1, (478, 2))
    truth[:2] = [[0, 0], [1, 1]]
    truth = truth * [80, 20] + 5
    distance = keypoint_distance(truth + np.array([3, 4]), truth)
    assert distance.pixels == pytest.approx(5)
    assert distance.percent == pytest.approx(100 * 5 / 40)  # sqrt(80 * 20) = 40
    with pytest.raises(ValueError, match="landmarks against"):
        keypoint_distance(truth, truth[:468])


@pytest.fixture(scope="module")
def reader() -> FaceReader:
    return FaceReader()


def test_a_moved_face_is_as_far_as_it_was_moved(reader: FaceReader) -> None:
    picture = frontal_picture()
    moved = np.roll(picture, 6, axis=1)
    here, there = reader.read(picture).landmarks, reader.read(moved).landmarks
    assert here is not None and there is not None
    assert keypoint_distance(there, here).pixels == pytest.approx(6, abs=1)
    assert keypoint_distance(there - [6, 0], here).percent < 0.7


def test_no_face_says_why(reader: FaceReader) -> None:
    reading = reader.read(np.full((128, 128, 3), 200, np.uint8))
    assert reading.landmarks is None and reading.absent == "no face found"


class Mean:
    """Stands in for a network: the mean colour of the face as its embedding."""

    def embed(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        color = align_face(image, landmarks, 32).reshape(-1, 3).mean(0) + 1
        return np.asarray(color / np.linalg.norm(color))


def test_comparison_of_one_view() -> None:
    truth = torch.from_numpy(frontal_picture().copy()).float() / 255
    comparison = FaceComparison(Mean())
    same = comparison.compare(truth, truth, truth.roll(8, 1), "a.png")
    assert same["akd"] == 0 and same["identity_similarity"] == pytest.approx(1)
    assert same["baseline_akd_percent"] > 1 and "absent" not in same
    red = truth * torch.tensor([1.0, 0.3, 0.3])
    other = comparison.compare(red, truth, truth, "b.png")
    assert other["identity_similarity"] < 0.95
    blank = comparison.compare(torch.ones_like(truth), truth, truth, "b.png")
    assert "akd" not in blank and blank["absent"] == {"akd": "render: no face found"}
    lost = comparison.compare(truth, torch.ones_like(truth), truth, "b.png")
    assert lost == {"absent": {"akd": "truth: no face found"}}
    assert [x is None for x in comparison.landmarks] == [False, False, True, False]
    assert [x is None for x in comparison.true_landmarks] == [False, False, False, True]


def test_faces_are_aligned_to_the_template() -> None:
    angle, scale = 0.4, 2.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = np.zeros((478, 2))
    landmarks[list(FIVE_POINTS)] = scale * TEMPLATE @ turn.T + [150, 20]
    y, x = np.mgrid[:420, :420] + 0.5
    picture = np.zeros((420, 420, 3), np.uint8)
    for px, py in landmarks[list(FIVE_POINTS)]:
        blob = 255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 4.0**2))
        picture = np.maximum(picture, blob[..., None].astype(np.uint8))
    face = align_face(picture, landmarks, 112)[..., 0].astype(float)
    y, x = np.mgrid[:112, :112] + 0.5
    for px, py in TEMPLATE:
        near = (x - px) ** 2 + (y - py) ** 2 < 6**2
        weight = face[near]
        assert weight.max() > 200
        center = np.array([(x[near] * weight).sum(), (y[near] * weight).sum()]) / weight.sum()
        np.testing.assert_allclose(center, [px, py], atol=0.3)
    # Half the size, too.
    assert align_face(picture, landmarks, 56).shape == (56, 56, 3)


class Session:
    """onnxruntime's session, for a network that gives back three pixels."""

    shape: Any = ("N", 3, 112, 112)

    def __init__(self, path: str, providers: list[str]) -> None:
        if Path(path).read_text() != "network":
            raise RuntimeError("INVALID_PROTOBUF")

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="data", shape=list(self.shape))]

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert feed["data"].shape == (1, 3, 112, 112) and feed["data"].dtype == np.float32
        assert feed["data"].min() >= -1 and feed["data"].max() <= 1
        return [feed["data"][:, :, 60, 56] + 2]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(InferenceSession=Session, get_available_providers=lambda: ["CPU"])
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def test_networks_are_read_and_used(runtime: None, tmp_path: Path) -> None:
    file = tmp_path / "face.onnx"
    file.write_text("network")
    network = OnnxIdentity.load(file)
    landmarks = np.zeros((478, 2))
    landmarks[list(FIVE_POINTS)] = TEMPLATE
    picture = np.zeros((112, 112, 3), np.uint8)
    picture[..., 0] = 255
    red = network.embed(picture, landmarks)
    # Red is 1, nothing is -1: (3, 1, 1).
    np.testing.assert_allclose(red, np.array([3, 1, 1]) / np.sqrt(11), atol=1e-6)
    blue = network.embed(picture[..., ::-1], landmarks)
    assert red @ blue == pytest.approx(7 / 11, abs=1e-6)
    assert mean_embedding([red, blue]) @ red == pytest.approx(3 / np.sqrt(11), abs=1e-6)


def test_other_files_and_networks_are_refused(
    runtime: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "face.onnx"
    with pytest.raises(InputFileError, match="nothing there"):
        OnnxIdentity.load(file)
    file.write_text("something else")
    with pytest.raises(InputFileError, match="no readable network"):
        OnnxIdentity.load(file)
    file.write_text("network")
    monkeypatch.setattr(Session, "shape", (1, 224, 224, 3))
    with pytest.raises(InputFileError, match=r"data \[1, 224, 224, 3\]; expected one input"):
        OnnxIdentity.load(file)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingAssetError, match="onnxruntime, which is not installed"):
        OnnxIdentity.load(file)
