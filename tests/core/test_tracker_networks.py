"""Face networks, detector, landmarks, matte."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cap4d_core.errors import InputFileError
from cap4d_core.tracking.detector import (
    Detection,
    FaceDetector,
    anchor_centers,
    merge_overlaps,
    suppress_overlaps,
)
from cap4d_core.tracking.face_models import MODEL_FOLDER, load_face_model
from cap4d_core.tracking.landmark_topology import CONTOURS, MIRRORED
from cap4d_core.tracking.landmarks import (
    LandmarkNetwork,
    Region,
    cut_region,
    region_of_detection,
    region_of_landmarks,
)
from cap4d_core.tracking.matting import PortraitMatting, guided_filter
from cap4d_core.tracking.tflite_graph import GraphNetwork
from tests.core.own_networks import own_networks
from tests.core.tracker_pictures import frontal_picture

RECORDED = {
    "face_detection_short_range": [-7.3682, 7.22876, 9.21598, 23.74693],
    "face_detection_full_range": [2.20091, 13.89807, -6.68529, 6.18236],
    "face_landmarks": [
        -16.92967,
        0.0,
        66.58798,
        12.38903,
        67.87605,
        7.16624,
        110.73653,
        21.71122,
        63.22422,
        51.54113,
        96.01175,
        25.78739,
        96.59431,
        24.46084,
    ],
    "selfie_segmentation": [0.00056, 0.0117],
}


def _network(operations: list[dict], constants: dict[str, torch.Tensor], size: int) -> GraphNetwork:
    output = operations[-1]["outputs"][0]
    description = {
        "input": 0,
        "input_shape": [1, size, size, 3],
        "outputs": {"y": output},
        "operations": operations,
    }
    return GraphNetwork(description, constants)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_puts_the_odd_pixel_last(size: int, stride: int) -> None:
    # TFLite: out = ceil(n / s), total = (out - 1) s + k - n, half of it (rounded down) before.
    torch.manual_seed(0)
    weight, bias = torch.rand(2, 3, 3, 3), torch.rand(2)
    operation = {
        "op": "CONV_2D", "inputs": [0, 1, 2], "outputs": [3], "stride": [stride, stride],
        "padding": "same", "dilation": [1, 1], "activation": "none",
    }  # fmt: skip
    network = _network([operation], {"1": weight, "2": bias}, size)
    x = torch.rand(1, size, size, 3)
    total = (-(-size // stride) - 1) * stride + 3 - size
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), [total // 2, total - total // 2] * 2)
    expected = torch.nn.functional.conv2d(padded, weight, bias, stride).permute(0, 2, 3, 1)
    assert torch.allclose(network(x)["y"], expected, atol=1e-6)


def test_depth_to_space_matches_its_definition() -> None:
    operation = {"op": "DEPTH_TO_SPACE", "inputs": [0], "outputs": [1], "block_size": 1}
    x = torch.rand(2, 4, 4, 3)
    assert torch.equal(_network([operation], {}, 4)(x)["y"], x)
    # One cell of 2 x 2 x 1: channels in row-major order of the block.
    from cap4d_core.tracking.tflite_graph import _depth_to_space

    cell = torch.arange(4.0).reshape(1, 1, 1, 4)
    assert _depth_to_space([cell], {"block_size": 2})[0, :, :, 0].tolist() == [[0, 1], [2, 3]]


def test_unknown_operation_and_unborn_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown operation SOFTMAX"):
        _network([{"op": "SOFTMAX", "inputs": [0], "outputs": [1]}], {}, 4)
    with pytest.raises(ValueError, match="tensor 7 before it exists"):
        _network([{"op": "RELU", "inputs": [7], "outputs": [1]}], {}, 4)


@pytest.mark.parametrize(
    "name",
    ["face_detection_short_range", "face_detection_full_range", "face_landmarks",
     "selfie_segmentation"],
)  # fmt: skip
def test_batch_gives_what_single_pictures_give(name: str) -> None:
    network = load_face_model(name)  # type: ignore[arg-type]
    torch.manual_seed(1)
    x = torch.rand(2, *network.input_size, 3)
    both, second = network(x), network(x[1:])
    for key, value in both.items():
        # Other blocking for another batch size; landmark outputs reach 200.
        assert torch.allclose(value[1:], second[key], atol=2e-3), key


def test_networks_agree_with_the_original_runtime() -> None:
    """Against TFLite itself, where that and the original files are at hand."""
    interpreter_module = pytest.importorskip("ai_edge_litert.interpreter")
    wheel_path = os.environ.get("CAP4D_MEDIAPIPE_WHEEL")
    if not wheel_path:
        pytest.skip("set CAP4D_MEDIAPIPE_WHEEL (see tools/convert_face_models.py)")
    provenance = json.loads((MODEL_FOLDER / "provenance.json").read_text())
    for name, entry in provenance["models"].items():
        if name == "face_landmarks":  # operations that TFLite alone does not have
            continue
        with zipfile.ZipFile(wheel_path) as wheel:
            interpreter = interpreter_module.Interpreter(model_content=wheel.read(entry["source"]))
        network = load_face_model(name)
        x = torch.rand(1, *network.input_size, 3)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
        interpreter.invoke()
        ours = network(x)
        for detail in interpreter.get_output_details():
            theirs = interpreter.get_tensor(detail["index"])
            # Outputs reach 160; float32 in another order of summation.
            assert np.abs(theirs - ours[detail["name"]].numpy()).max() < 1e-3


def test_recorded_answers_of_the_networks() -> None:
    """Mean and spread of outputs for a smooth picture, recorded where TFLite agreed to 1e-4."""
    for name, recorded in RECORDED.items():
        network = load_face_model(name)  # type: ignore[arg-type]
        height, width = network.input_size
        y, x = np.mgrid[:height, :width] / height
        picture = torch.from_numpy(np.stack([x, y, x * y], -1)).float()[None]
        found = [
            number
            for _, value in sorted(network(picture).items())
            for number in (float(value.mean()), float(value.std(correction=0)))
        ]
        # Magnitudes up to 100; float32 in another order of summation.
        assert np.allclose(found, recorded, rtol=1e-4, atol=1e-3), name


def test_damaged_and_missing_networks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    monkeypatch.setattr("cap4d_core.tracking.face_models.MODEL_FOLDER", folder)
    shutil.copytree(MODEL_FOLDER, folder)
    weights = folder / "selfie_segmentation.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputFileError, match=r"selfie_segmentation.*SHA-256.*pip install"):
        load_face_model("selfie_segmentation")
    weights.unlink()
    with pytest.raises(InputFileError, match="nothing there"):
        load_face_model("selfie_segmentation")


def test_own_networks_take_the_place_of_shipped_ones(tmp_path: Path) -> None:
    own = own_networks(tmp_path / "own")
    image = np.zeros((128, 96, 3), np.uint8)
    image[:, 48:] = 255
    matte = PortraitMatting("cpu", own).matte(image)
    assert matte[:, 60:].min() > 250 and matte[:, :36].max() < 140
    # What the folder does not hold is taken from the package.
    assert load_face_model("face_landmarks", "cpu", own).input_size == (192, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": {"a": 2, "b": 2}}, "2 outputs; expected one"),
        ({"operations": [{"op": "NEW_OP", "inputs": [0], "outputs": [2]}]}, "unknown operation"),
    ],
)
def test_networks_for_another_purpose_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    own = own_networks(tmp_path / "own", changes)
    with pytest.raises(InputFileError, match=message):
        load_face_model("selfie_segmentation", "cpu", own)


def test_replaced_detectors_and_landmarks_need_their_interface(tmp_path: Path) -> None:
    own = own_networks(tmp_path / "own")
    listed = json.loads((own / "provenance.json").read_text())["models"]["selfie_segmentation"]
    for name, message in (
        ("face_detection_short_range", r"input \(64, 48\); expected \(128, 128\)"),
        ("face_landmarks", "outputs out; expected also conv_faceflag"),
    ):
        for end in (".json", ".safetensors"):
            shutil.copy(own / f"selfie_segmentation{end}", own / f"{name}{end}")
        (own / "provenance.json").write_text(json.dumps({"models": {name: listed}}))
        with pytest.raises(InputFileError, match=message):
            load_face_model(name, "cpu", own)  # type: ignore[arg-type]
    (own / "provenance.json").write_text("{}")
    with pytest.raises(InputFileError, match="no 'models'"):
        load_face_model("face_landmarks", "cpu", own)


def test_licence_and_provenance_come_with_the_networks() -> None:
    assert "Apache License" in (MODEL_FOLDER / "LICENSE").read_text()
    provenance = json.loads((MODEL_FOLDER / "provenance.json").read_text())
    assert provenance["licence"] == "Apache-2.0"
    assert all(path.stat().st_size < 4e6 for path in MODEL_FOLDER.iterdir())


def test_anchors_cover_the_picture() -> None:
    centers = anchor_centers(128, ((8, 2), (16, 6)))
    assert centers.shape == (896, 2)
    assert centers[0].tolist() == [0.5 / 16] * 2 and centers[1].tolist() == [0.5 / 16] * 2
    assert centers[2].tolist() == [1.5 / 16, 0.5 / 16]  # x runs first
    assert np.allclose(centers[512:].mean(0), 0.5)


def _face(x: float, side: float, score: float) -> Detection:
    return Detection((x, 0.0, x + side, side), score, np.full((6, 2), x))


def test_overlapping_boxes_are_merged_and_distant_ones_kept() -> None:
    merged = merge_overlaps([_face(0, 10, 0.9), _face(2, 10, 0.3), _face(50, 10, 0.6)], 0.3)
    assert [round(f.box[0], 3) for f in merged] == [0.5, 50.0]  # (0.9 * 0 + 0.3 * 2) / 1.2
    kept = suppress_overlaps([_face(0, 30, 0.9), _face(5, 8, 0.6), _face(50, 10, 0.5)], 0.3)
    assert [f.box[0] for f in kept] == [0, 50]  # a box inside another is the same face


def test_mirror_table_is_an_involution_that_keeps_contours() -> None:
    assert np.array_equal(MIRRORED[MIRRORED], np.arange(478))
    for left, right in (("left_eye", "right_eye"), ("left_brow", "right_brow")):
        edges = {frozenset(MIRRORED[list(edge)].tolist()) for edge in CONTOURS[left]}
        assert edges == {frozenset(edge.tolist()) for edge in CONTOURS[right]}


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


@pytest.fixture(scope="module")
def network() -> LandmarkNetwork:
    return LandmarkNetwork()


def test_face_is_found_where_it_is_moved(detector: FaceDetector) -> None:
    picture = frontal_picture()
    wide = np.full((picture.shape[0], 2 * picture.shape[1], 3), 255, np.uint8)
    wide[:, picture.shape[1] :] = picture
    (alone,), (moved,) = detector.detect(picture), detector.detect(wide)
    shift = np.subtract(moved.box, alone.box)
    # Detection works on a reduced picture; a tenth of the face is what it is worth.
    assert np.abs(shift - [picture.shape[1], 0, picture.shape[1], 0]).max() < 0.1 * alone.side


def test_landmarks_follow_a_rotation_of_the_picture(
    detector: FaceDetector, network: LandmarkNetwork
) -> None:
    picture = frontal_picture()
    height, width = picture.shape[:2]
    first = network.predict(picture, region_of_detection(detector.detect(picture)[0]))
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 20.0, 1.0)
    turned = cv2.warpAffine(picture, matrix, (width, height), borderValue=(255, 255, 255))
    second = network.predict(turned, region_of_detection(detector.detect(turned)[0]))
    expected = first.points[:468, :2] @ matrix[:, :2].T + matrix[:, 2]
    distance = np.linalg.norm(second.points[:468, :2] - expected, axis=1)
    assert np.median(distance) < 0.01 * first.region.side
    assert first.score > 0.9 and first.asymmetry < 0.01


def test_region_maps_its_corners_and_resamples_exactly() -> None:
    region = Region((40.0, 30.0), 16.0, np.pi / 2)
    matrix = region.to_picture(16)
    assert np.allclose(matrix @ [8, 8, 1], [40, 30])
    # A quarter turn at unit scale only permutes pixels.
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    crop = cut_region(picture, region, 16)
    assert np.array_equal(crop, np.rot90(picture[22:38, 32:48]))


def test_region_of_landmarks_is_level_with_the_eyes() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(478, 3)) * 20 + 100
    points[33, :2], points[263, :2] = (80, 90), (120, 110)
    region = region_of_landmarks(points)
    assert region.angle == pytest.approx(np.arctan2(20, 40))
    corners = region.to_picture(1) @ np.array([[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert np.allclose(np.linalg.norm(corners[:, 0] - corners[:, 1]), region.side)


def test_guided_filter_is_a_mean_on_flat_pictures_and_keeps_edges() -> None:
    rng = np.random.default_rng(0)
    values = gaussian_filter(rng.random((40, 50)), 1).astype(np.float32)
    flat = np.full((40, 50, 3), 0.5, np.float32)
    twice = cv2.blur(cv2.blur(values, (7, 7), borderType=2), (7, 7), borderType=2)
    assert np.allclose(guided_filter(flat, values, 3, 1e-4), twice, atol=1e-5)
    step = np.zeros((40, 50, 3), np.float32)
    step[:, 25:] = 1.0
    assert np.abs(guided_filter(step, step[..., 0], 3, 1e-6) - step[..., 0]).max() < 1e-3


def test_matte_separates_the_head(detector: FaceDetector) -> None:
    from cap4d_core.files.images import read_grey
    from tests.core.tracker_pictures import demo_subject

    picture = frontal_picture()
    truth = read_grey(sorted((demo_subject() / "bg/cam0").iterdir())[0]) > 127
    matte = PortraitMatting().matte(picture, detector.detect(picture)[0].box) > 127
    union = (matte | truth).sum()
    assert (matte & truth).sum() / union > 0.9
