"""Restricted reading of head-model pickles: what is understood, what is refused unexecuted."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from cap4d_core.errors import InputFileError
from cap4d_core.flame.pickle_reader import load_flame_pickle


def flame_dict(seed: int = 0) -> dict[str, Any]:
    """A dict with the entries of a FLAME model; bases of fewer vertices, to be quick."""
    generator = np.random.default_rng(seed)
    regressor = np.zeros((5, 5023))
    regressor[np.arange(5), [10, 20, 30, 40, 50]] = 1.0
    return {
        "v_template": generator.normal(size=(5023, 3)),
        "f": generator.integers(0, 5023, (60, 3)).astype(np.uint32),
        "shapedirs": generator.normal(size=(20, 3, 400)).astype(np.float16),
        "posedirs": generator.normal(size=(20, 3, 36)).astype(np.float32),
        "J_regressor": regressor,
        "weights": generator.random((5023, 5)),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.int64),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def _write(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = flame_dict()
    arrays = load_flame_pickle(_write(tmp_path / "m.pkl", content, protocol))
    assert set(arrays) == set(content) - {"bs_style", "bs_type"}
    assert np.array_equal(arrays["v_template"], content["v_template"].astype(np.float32))
    assert arrays["f"].dtype == np.int32 and np.array_equal(arrays["f"], content["f"])
    assert arrays["shapedirs"].dtype == np.float32
    assert arrays["kintree_table"][0].tolist() == [-1, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["csc", "csr", "coo"])
@pytest.mark.parametrize("array", [False, True])
def test_sparse_regressors_become_dense(tmp_path: Path, kind: str, array: bool) -> None:
    content = flame_dict()
    dense = content["J_regressor"]
    content["J_regressor"] = getattr(sparse, f"{kind}_{'array' if array else 'matrix'}")(dense)
    arrays = load_flame_pickle(_write(tmp_path / "m.pkl", content))
    assert np.array_equal(arrays["J_regressor"], dense.astype(np.float32))


@pytest.fixture
def chumpy() -> Iterator[types.ModuleType]:
    """Classes that pickle as chumpy's do; gone before anything is read."""
    package, module, reordering = (
        types.ModuleType(name) for name in ("chumpy", "chumpy.ch", "chumpy.reordering")
    )

    class Ch:
        def __init__(self, **state: Any) -> None:
            self.__dict__.update(state)

        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__

        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("chumpy code must not run")

    def make(name: str, owner: types.ModuleType) -> None:
        cls = type(name, (Ch,), {"__module__": owner.__name__, "__qualname__": name})
        setattr(owner, name, cls)

    make("Ch", module)
    make("add", module)
    make("Select", reordering)
    make("transpose", reordering)
    package.__dict__.update(ch=module, reordering=reordering)
    yield package


def _pickle_with(modules: types.ModuleType, path: Path, content: Any) -> Path:
    parts = {"chumpy": modules, "chumpy.ch": modules.ch, "chumpy.reordering": modules.reordering}
    sys.modules.update(parts)
    try:
        return _write(path, content)
    finally:
        for name in parts:
            del sys.modules[name]


def test_chumpy_arrays_are_read_without_chumpy(chumpy: types.ModuleType, tmp_path: Path) -> None:
    content = flame_dict()
    expected = {key: np.asarray(content[key]) for key in ("v_template", "weights", "posedirs")}
    ch, reordering = chumpy.ch, chumpy.reordering
    content["v_template"] = ch.Ch(x=expected["v_template"], _dirty_vars={"x"})
    order = np.arange(5023 * 5)[::-1].copy()
    content["weights"] = reordering.Select(
        a=ch.Ch(x=expected["weights"].ravel()[::-1].copy()), idxs=order, preferred_shape=(5023, 5)
    )
    content["posedirs"] = reordering.transpose(
        a=ch.Ch(x=np.ascontiguousarray(expected["posedirs"].transpose(2, 0, 1))), axes=[1, 2, 0]
    )
    path = _pickle_with(chumpy, tmp_path / "m.pkl", content)
    assert "chumpy" not in sys.modules
    arrays = load_flame_pickle(path)
    for key, values in expected.items():
        assert np.array_equal(arrays[key], values.astype(np.float32)), key


def test_unknown_chumpy_expression_names_key_and_class(
    chumpy: types.ModuleType, tmp_path: Path
) -> None:
    content = flame_dict()
    content["weights"] = chumpy.ch.add(a=1, b=2)
    with pytest.raises(InputFileError, match=r"'weights'.*chumpy\.ch\.add"):
        load_flame_pickle(_pickle_with(chumpy, tmp_path / "m.pkl", content))


class _Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (builtins.eval, r"builtin(s|__)\.eval"),
        (builtins.getattr, r"builtin(s|__)\.getattr"),
        (np.fromfile, r"numpy.*fromfile"),
        (np.save, r"numpy\.save"),
        (np.memmap, r"numpy.*memmap"),
    ],
)
def test_anything_but_array_data_is_refused_by_name(
    tmp_path: Path, function: Any, name: str
) -> None:
    victim = tmp_path / "executed"
    arguments = {
        os.system: (f"touch {victim}",),
        builtins.eval: (f"open({str(victim)!r}, 'w')",),
        builtins.getattr: (os, "system"),
        np.fromfile: (str(victim),),
        np.save: (str(victim), np.zeros(1)),
        np.memmap: (str(victim), "u1", "w+", 0, 8),
    }[function]
    if function is builtins.getattr:
        arguments = ("text", "upper")
    content = {**flame_dict(), "v_template": _Call(function, *arguments)}
    path = _write(tmp_path / "evil.pkl", content)
    with pytest.raises(InputFileError, match=name) as caught:
        load_flame_pickle(path)
    assert "Nothing was executed" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "payload",
    [
        # The allowed helpers must not be a way around the list.
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"ccopyreg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\nI0\nI1\ntRVx\ntR.",
        b"\x80\x04\x8c\x09chumpy.ch\x8c\x09os.system\x93.",
        b"Pnumber\n.",
    ],
)
def test_helpers_of_the_format_cannot_be_abused(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(payload)
    with pytest.raises(InputFileError):
        load_flame_pickle(path)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.pkl", flame_dict()).read_bytes()
    broken = tmp_path / "broken.pkl"
    for content in (whole[: len(whole) // 2], b"<html>login</html>", b"\x80\x02K\x01."):
        broken.write_bytes(content)
        with pytest.raises(InputFileError, match=r"broken\.pkl"):
            load_flame_pickle(broken)
    with pytest.raises(InputFileError, match="no shapedirs, posedirs"):
        load_flame_pickle(_write(broken, {"v_template": np.zeros((5023, 3)), "f": np.zeros(3)}))
    with pytest.raises(InputFileError, match="nothing there"):
        load_flame_pickle(tmp_path / "absent.pkl")
