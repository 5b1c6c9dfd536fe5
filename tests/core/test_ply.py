"""PLY export: round trips, layout, rounding."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.animation.ply import (
    AnimationPlyWriter,
    BoundSplats,
    iterate_ply,
    read_animation_ply,
    splats_of_element,
    write_splat_ply,
)
from cap4d_core.errors import InputFileError

FACES = np.array([[0, 1, 2], [2, 1, 4]])  # vertices 3 and 5 belong to no face
NUM_VERTICES = 6
HEADER = b"ply\nformat binary_little_endian 1.0\n"


def _splats(count: int = 5, seed: int = 0) -> BoundSplats:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return BoundSplats(
        xyz=normal(count, 3),
        features_dc=normal(count, 3),
        features_rest=normal(count, 15, 3),
        opacity=normal(count),
        log_scales=normal(count, 3),
        rotations=normal(count, 4),
        binding=rng.integers(0, len(FACES), count),
    )


def _frames(count: int = 4, seed: int = 1, vertices: int = NUM_VERTICES) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(vertices, 3)) * 0.1
    return (base + rng.normal(size=(count, vertices, 3)) * 0.01).astype(np.float32)


def _export(path: Path, frames: np.ndarray, **options: bool) -> Path:
    writer = AnimationPlyWriter(path, _splats(), FACES, frames.shape[1], len(frames), **options)
    with writer:
        for frame in frames:
            writer.write(frame)
    return path


def test_round_trip_without_compression(tmp_path: Path) -> None:
    frames = _frames()
    animation = read_animation_ply(_export(tmp_path / "a.ply", frames))
    used = np.unique(FACES)
    # Offsets of a centimetre stored as a float fraction of their range.
    np.testing.assert_allclose(animation.vertices[:, used], frames[:, used], atol=2e-8)
    np.testing.assert_array_equal(animation.faces, FACES)
    for name, expected in vars(_splats()).items():
        np.testing.assert_array_equal(getattr(animation.splats, name), expected, err_msg=name)
    assert not animation.compressed


def test_compression_is_unbiased_and_within_half_a_step(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    count = 3000
    frames = np.stack([np.zeros((count, 3)), rng.uniform(-0.01, 0.01, (count, 3))])
    faces = np.arange(count).reshape(-1, 3)
    errors = {}
    for parity in (False, True):
        path = tmp_path / f"{parity}.ply"
        with AnimationPlyWriter(
            path, _splats(), faces, count, 2, compress=True, parity=parity
        ) as writer:
            for frame in frames:
                writer.write(frame)
        animation = read_animation_ply(path)
        assert animation.compressed
        errors[parity] = animation.vertices[1] - frames[1]
    step = 0.02 / 255
    assert np.abs(errors[False]).max() <= 0.51 * step
    assert abs(errors[False].mean()) < 0.03 * step  # 9000 draws: standard error 0.003 steps
    # The published rounding lies half a step low: that is what the default mends.
    assert errors[True].mean() == pytest.approx(-0.5 * step, rel=0.1)


def test_unused_vertices_are_zero_and_do_not_widen_the_range(tmp_path: Path) -> None:
    frames = _frames()
    frames[:, [3, 5]] = np.random.default_rng(4).normal(size=(len(frames), 2, 3)) * 50
    elements = dict(iterate_ply(_export(tmp_path / "a.ply", frames)))
    base = np.stack([elements["base_vertex"][axis] for axis in "xyz"], axis=1)
    assert (base[[3, 5]] == 0).all()
    for i in range(len(frames)):
        assert max(abs(elements[f"meta_delta_max_{i:05d}"][axis][0]) for axis in "xyz") < 0.1
    kept = read_animation_ply(_export(tmp_path / "b.ply", frames, parity=True))
    np.testing.assert_allclose(kept.vertices[:, [3, 5]], frames[:, [3, 5]], rtol=1e-5)


def test_binding_survives_as_float(tmp_path: Path) -> None:
    """Face ids of a 128 grid (32258 faces) are exact in float32."""
    splats = _splats(3)
    splats.binding[:] = [0, 32257, 2**24 - 1]
    with AnimationPlyWriter(tmp_path / "a.ply", splats, FACES, NUM_VERTICES, 1) as writer:
        writer.write(_frames(1)[0])
    np.testing.assert_array_equal(
        read_animation_ply(tmp_path / "a.ply").splats.binding, splats.binding
    )


def test_another_reader_agrees(tmp_path: Path) -> None:
    from plyfile import PlyData

    path = _export(tmp_path / "a.ply", _frames(2), compress=True)
    theirs = PlyData.read(path)
    ours = dict(iterate_ply(path))
    assert [element.name for element in theirs.elements] == list(ours)
    for element in theirs.elements:
        np.testing.assert_array_equal(element.data, ours[element.name])


def test_fewer_frames_than_announced_leave_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="1 frames written, 2 announced"),
        AnimationPlyWriter(tmp_path / "a.ply", _splats(), FACES, NUM_VERTICES, 2) as writer,
    ):
        writer.write(_frames(1)[0])
    assert list(tmp_path.iterdir()) == []


def test_too_many_frames_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    frames = _frames(2)
    with (
        pytest.raises(ValueError, match="announced"),
        AnimationPlyWriter(tmp_path / "a.ply", _splats(), FACES, NUM_VERTICES, 1) as writer,
    ):
        for frame in frames:
            writer.write(frame)
    with (
        pytest.raises(ValueError, match="shape"),
        AnimationPlyWriter(tmp_path / "a.ply", _splats(), FACES, NUM_VERTICES, 1) as writer,
    ):
        writer.write(frames[0][:4])


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    vertices, count = 64 * 64, 200
    frame = _frames(1, vertices=vertices)[0]
    tracemalloc.start()
    with AnimationPlyWriter(tmp_path / "a.ply", _splats(), FACES, vertices, count) as writer:
        for i in range(count):
            writer.write(frame * (1 + i / count))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All frames would be 200 * 48 kB = 9.8 MB; a handful of arrays and the header are 0.6 MB.
    assert peak < 1.5e6


def test_splat_ply_opens_elsewhere_with_the_standard_properties(tmp_path: Path) -> None:
    from plyfile import PlyData

    splats = _splats(7)
    write_splat_ply(tmp_path / "a.ply", splats, comment="made by a test")
    data = PlyData.read(tmp_path / "a.ply")
    assert data.comments == ["made by a test"]
    rows = data["vertex"].data
    expected = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    expected += [f"f_rest_{i}" for i in range(45)]
    expected += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert list(rows.dtype.names) == expected
    # Channel-major: f_rest_15 is the first green coefficient.
    np.testing.assert_array_equal(rows["f_rest_15"], splats.features_rest[:, 0, 1])
    again = splats_of_element(rows)
    np.testing.assert_array_equal(again.features_rest, splats.features_rest)
    np.testing.assert_array_equal(again.rotations, splats.rotations)


def test_splat_ply_equals_that_of_gsplat(tmp_path: Path) -> None:
    gsplat = pytest.importorskip("gsplat")
    import torch

    splats = _splats(6)
    write_splat_ply(tmp_path / "a.ply", splats)
    theirs = tmp_path / "b.ply"
    arrays = (splats.xyz, splats.log_scales, splats.rotations, splats.opacity)
    gsplat.export_splats(
        *(torch.from_numpy(array) for array in arrays),
        torch.from_numpy(splats.features_dc)[:, None],
        torch.from_numpy(splats.features_rest),
        save_to=str(theirs),
    )
    expected = dict(iterate_ply(theirs))["vertex"]
    ours = dict(iterate_ply(tmp_path / "a.ply"))["vertex"]
    for name in expected.dtype.names or ():
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"not a ply", "no PLY signature"),
        (b"ply\nformat ascii 1.0\nend_header\n", "format ascii"),
        (HEADER, "no end of header"),
        (
            HEADER + b"element vertex 2\nproperty float x\nend_header\n1234",
            "an end within element 'vertex'",
        ),
        (
            HEADER + b"element face 1\nproperty list uchar int i\nend_header\n",
            "property list",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=found):
        read_animation_ply(path)
