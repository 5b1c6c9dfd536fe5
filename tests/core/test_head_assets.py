"""Preparing the head-model folder; template files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.errors import InputFileError, MissingAssetError, UserError
from cap4d_core.files.basic import sha256_file
from cap4d_core.flame.assets import (
    COMPANIONS,
    check_head_model,
    find_companions,
    find_model,
    prepare_head_model,
    read_generation_data,
)
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.obj import ObjMesh, read_obj, write_obj
from cap4d_core.flame.template import load_avatar_template, load_flame_template, read_vertex_ids
from tests.core.synthetic_head import head_folder, head_source


def test_folder_is_complete_and_says_where_it_comes_from() -> None:
    folder = head_folder()
    names = {file.name for file in folder.iterdir()}
    assert names == {"flame.npz", "provenance.json", *COMPANIONS}
    provenance = json.loads((folder / "provenance.json").read_text())
    source = head_source() / "data/assets/flame/flame2023_no_jaw.pkl"
    assert provenance["flame.npz"]["sha256"] == sha256_file(source)
    for name in COMPANIONS:
        assert provenance[name]["sha256"] == sha256_file(folder / name)
    expr, eye_rot = read_generation_data(folder)
    assert expr.shape == (1000, 65) and eye_rot.shape == (1000, 3)


def test_templates_agree_with_the_model() -> None:
    flame, avatar = load_flame_template(head_folder()), load_avatar_template(head_folder())
    model = HeadModel.load(head_folder(), mouth=False)
    assert (flame.num_vertices, avatar.num_vertices) == (5223, 5423)
    count = len(model.faces)
    for template in (flame, avatar):
        assert np.array_equal(template.faces[:count], model.faces.numpy())
        assert len(template.uv_faces) == len(template.faces)
        assert template.head_vertex_ids.max() < 5023
    assert len(flame.faces) == count + 340 and len(avatar.faces) == count + 680


def test_layouts_are_found(tmp_path: Path) -> None:
    """Direct pickle; generic names beside companions; a prepared folder."""
    assets = head_source() / "data/assets"
    pickle = assets / "flame/flame2023_no_jaw.pkl"
    for source in (head_source(), assets, assets / "flame", pickle):
        model = find_model(source)
        assert model == pickle
        assert set(find_companions(source, model, None)) == set(COMPANIONS)
    assert find_model(head_folder()) == head_folder() / "flame.npz"

    flat = tmp_path / "assets_flame"
    flat.mkdir()
    for name in ("generic_model.pkl", "flame2023.pkl"):
        (flat / name).symlink_to(pickle)
    assert find_model(flat).name == "flame2023.pkl"
    assert set(find_companions(flat, find_model(flat), assets)) == set(COMPANIONS)
    only = tmp_path / "only"
    only.mkdir()
    (only / "own.pkl").symlink_to(pickle)
    assert find_model(only).name == "own.pkl"
    (only / "second.pkl").symlink_to(pickle)
    with pytest.raises(InputFileError, match=r"own\.pkl, second\.pkl"):
        find_model(only)


def test_all_missing_companions_are_listed_at_once(tmp_path: Path) -> None:
    shutil.copy(head_folder() / "head_vertices.txt", tmp_path)
    (tmp_path / "flame2023.pkl").write_bytes(b"x")
    with pytest.raises(MissingAssetError) as caught:
        prepare_head_model(tmp_path, None, tmp_path / "out")
    message = str(caught.value)
    assert all((name in message) == (name != "head_vertices.txt") for name in COMPANIONS)
    assert "head_model.companions" in message
    assert not (tmp_path / "out").exists()


def test_missing_model_says_where_to_get_it(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingAssetError, match=r"flame\.is\.tue\.mpg\.de"):
            prepare_head_model(source, None, tmp_path / "out")


def _broken(tmp_path: Path) -> Path:
    folder = tmp_path / "head"
    shutil.copytree(head_folder(), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("blink_blendshape.npy", np.zeros((10, 3)), r"blink_blendshape.*\(5023, 3\)"),
        ("jaw_regressor.npy", np.full((65, 3), np.nan), "NaN"),
        ("flowface_vertex_weights.npy", b"no array", "no readable array"),
        ("head_vertices.txt", b"1\n2\nx\n", "vertex ids"),
        ("head_vertices.txt", b"1\n5023\n", "0 to 5022"),
        ("cap4d_flame_template.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "line 4"),
        (
            "cap4d_avatar_template.obj",
            b"v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n",
            "5423 vertices",
        ),
    ],
)
def test_wrong_companions_are_named(
    tmp_path: Path, name: str, content: np.ndarray | bytes, expected: str
) -> None:
    folder = _broken(tmp_path)
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        np.save(folder / name, content)
    with pytest.raises(UserError, match=expected) as caught:
        check_head_model(folder)
    assert name in str(caught.value)
    # Nothing half-made is left behind.
    with pytest.raises(UserError):
        prepare_head_model(folder, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_different_faces_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _broken(tmp_path)
    arrays = dict(np.load(folder / "flame.npz"))
    arrays["f"] = arrays["f"][::-1]
    np.savez(folder / "flame.npz", **arrays)
    with caplog.at_level(logging.WARNING):
        check_head_model(folder)
    assert "faces of the head model" in caplog.text


def test_obj_round_trip_and_relative_indices(tmp_path: Path) -> None:
    mesh = ObjMesh(
        np.array([[0.0, 0.1, 0.2], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        np.array([[0, 1, 2], [1, 3, 2]]),
        np.array([[0.25, 0.5], [1.0, 0.0], [0.0, 1.0]]),
        np.array([[0, 1, 2], [2, 1, 0]]),
    )
    write_obj(tmp_path / "m.obj", mesh)
    back = read_obj(tmp_path / "m.obj")
    for name in ("vertices", "faces", "uvs", "uv_faces"):
        assert np.array_equal(getattr(back, name), getattr(mesh, name)), name
    relative = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nf -3/-1/1 -2/-1/1 -1/-1/1\n"
    (tmp_path / "r.obj").write_text(relative)
    assert read_obj(tmp_path / "r.obj").faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("v 0 0\nvt 0 0\nf 1/1 1/1 1/1", "coordinates"),
        ("v 0 0 0\nvt 0 0\nf 1/1 1/1 1/1 1/1", "4 corners"),
        ("v 0 0 0\nvt 0 0\nf 1/1 1/1 2/1", "vertex 2"),
        ("v 0 0 0\nvt 0 0\nf 0/1 1/1 1/1", "index 0"),
        ("v a b c", "line 1"),
        ("", "empty file"),
    ],
)
def test_bad_obj_files_say_the_line(tmp_path: Path, lines: str, expected: str) -> None:
    (tmp_path / "bad.obj").write_text(lines)
    with pytest.raises(InputFileError, match=expected):
        read_obj(tmp_path / "bad.obj")


def test_vertex_ids_accept_numpy_formats(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "ids.txt", [3, 1, 4])
    assert read_vertex_ids(tmp_path / "ids.txt", 5).tolist() == [3, 1, 4]


def test_real_head_model(real_data: Path, tmp_path: Path) -> None:
    folder = prepare_head_model(real_data / "head_model", None, tmp_path / "head")
    model = HeadModel.load(folder)
    assert model.faces.shape == (10316, 3)
