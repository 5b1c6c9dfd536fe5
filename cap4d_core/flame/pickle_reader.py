"""Reads head models from Python pickles without executing anything they contain.

A pickle is a program: a normal load runs whatever it names. Here only the few names that rebuild
NumPy arrays are honoured. SciPy sparse matrices and chumpy arrays (in original FLAME files) are
understood from their recorded state, through placeholders that merely collect it; nothing in the
pickle is called, chumpy need not be installed. Every other name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import require_file

REQUIRED_KEYS = (
    "v_template", "f", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table",
)  # fmt: skip
# Parent of the root joint in kintree_table: -1 written as an unsigned 32-bit number.
_NO_PARENT = 2**32 - 1
_SPARSE_FORMATS = ("csc", "csr", "coo")
_MAX_NESTING = 20


class _RefusedGlobal(pickle.UnpicklingError):
    """The pickle names something other than array data."""


class _Inert:
    """Stands for an object of a library that is not called: keeps arguments and state."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        instance = super().__new__(cls)
        instance.__dict__["_arguments"] = args
        return instance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Protocol 2 may wrap the state as (dict, slots).
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})


def _encode(text: str, encoding: str = "latin1", errors: str = "strict") -> bytes:
    """`codecs.encode`, through which protocol 2 stores bytes; only that encoding."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise _RefusedGlobal(f"_codecs.encode with encoding {encoding!r}")
    return text.encode("latin1")


def _reconstruct_object(cls: Any, base: Any = object, state: Any = None) -> _Inert:
    """`copyreg._reconstructor`, for placeholders only."""
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise _RefusedGlobal(f"copyreg._reconstructor of {cls!r}")
    return cls()


def _reconstruct_array(subtype: Any, shape: Any, dtype: Any) -> NDArray[Any]:
    """`numpy._core.multiarray._reconstruct`; the array's __setstate__ fills it in."""
    if subtype is not np.ndarray:
        raise _RefusedGlobal(f"numpy array subclass {subtype!r}")
    return np.ndarray.__new__(np.ndarray, (0,), np.dtype("b"))


def _scalar(dtype: Any, data: Any = None) -> Any:
    """`numpy._core.multiarray.scalar` of plain numbers."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise _RefusedGlobal("a numpy scalar that is no plain number")
    return np.frombuffer(data, dtype, count=1)[0]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    """`numpy._core.numeric._frombuffer`, used by protocol 5."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise _RefusedGlobal("a numpy array of Python objects")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _allowed_globals() -> dict[tuple[str, str], Any]:
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
        ("codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = _reconstruct_array
        allowed[f"{core}.multiarray", "scalar"] = _scalar
        allowed[f"{core}.numeric", "_frombuffer"] = _from_buffer
    for module in ("copyreg", "copy_reg"):
        allowed[module, "_reconstructor"] = _reconstruct_object
    for module in ("builtins", "__builtin__"):
        # chumpy's state holds sets; plain containers run nothing.
        for container in (object, set, frozenset, list, dict, tuple, slice):
            allowed[module, container.__name__] = container
    return allowed


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that knows arrays, sparse matrices and chumpy arrays, nothing else."""

    _allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        package = module.split(".")[0]
        if package == "chumpy" or module.startswith("scipy.sparse"):
            # Attribute paths such as "os.system" would reach beyond the class itself.
            if "." in name:
                raise _RefusedGlobal(f"{module}.{name}")
            return type(name, (_Inert,), {"origin": f"{module}.{name}"})
        raise _RefusedGlobal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedGlobal("a persistent reference")


def load_flame_pickle(path: str | Path) -> dict[str, NDArray[Any]]:
    """Reads a FLAME pickle, original or with plain arrays.

    Sparse matrices become dense; floating-point arrays float32, faces int32, other whole numbers
    int64; axes of length 1 are dropped; the root's parent in kintree_table is -1. Entries that are
    no arrays (strings) are left out.

    Args:
        path: `generic_model.pkl`, `flame2023.pkl`, `flame2023_no_jaw.pkl` or alike.

    Returns:
        Arrays by name; at least v_template (5023, 3), f (F, 3), shapedirs (5023, 3, 400), posedirs
        (5023, 3, 36), J_regressor (5, 5023), weights (5023, 5), kintree_table (2, 5).

    Raises:
        InputFileError: no pickle, one that names anything but array data (nothing of it is
            executed), or one without the entries of a head model.
    """
    what = "a FLAME model pickle (dict of arrays)"
    path = require_file(path, what)
    try:
        with open(path, "rb") as handle:
            content = _ArrayUnpickler(handle, encoding="latin1").load()
    except _RefusedGlobal as error:
        raise InputFileError(
            path,
            f"a pickle that refers to {error}",
            "array data only (numpy, scipy.sparse, chumpy)",
            "Nothing was executed. A genuine FLAME file holds no such reference: download it again "
            "from https://flame.is.tue.mpg.de.",
        ) from None
    except Exception as error:
        # A damaged pickle can raise anything at all from the rebuilding of arrays.
        raise InputFileError(
            path,
            f"an unreadable pickle ({type(error).__name__}: {str(error)[:200]})",
            what,
            "It may be truncated or no pickle at all; download it again.",
        ) from None
    if not isinstance(content, dict):
        raise InputFileError(path, f"a pickled {type(content).__name__}", what)

    arrays: dict[str, NDArray[Any]] = {}
    for key, value in content.items():
        try:
            array = _to_array(value)
        except ValueError as error:
            if key in REQUIRED_KEYS:
                raise InputFileError(
                    path, f"'{key}' that cannot be read ({error})", "an array"
                ) from None
            continue
        if array is not None:
            arrays[str(key)] = array
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise InputFileError(
            path,
            f"no {', '.join(missing)} (it has {', '.join(sorted(map(str, content))) or 'nothing'})",
            f"a FLAME model with {', '.join(REQUIRED_KEYS)}",
        )
    return {key: _converted(key, array) for key, array in arrays.items()}


def _converted(key: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype.kind in "iub":
        array = array.astype(np.int64)
    if key == "kintree_table":
        array = np.where(array == _NO_PARENT, -1, array)
    if key == "f":
        array = array.astype(np.int32)
    return array.squeeze()


def _to_array(value: Any, depth: int = 0) -> NDArray[Any] | None:
    """Array of an entry, None for entries that are none; ValueError when it cannot be evaluated."""
    if depth > _MAX_NESTING:
        raise ValueError("nested too deeply")
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "O":
            raise ValueError("an array of Python objects")
        return value if value.dtype.kind in "fiub" else None
    if isinstance(value, np.number):
        return np.asarray(value)
    if not isinstance(value, _Inert):
        return None
    if value.origin.startswith("scipy.sparse"):
        return _sparse_to_array(value)
    return _chumpy_to_array(value, depth)


def _sparse_to_array(value: _Inert) -> NDArray[Any]:
    from scipy import sparse

    state = value.__dict__
    kind = next((name for name in _SPARSE_FORMATS if name in value.origin), None)
    shape = state.get("_shape", state.get("shape"))
    names = ("data", "row", "col") if kind == "coo" else ("data", "indices", "indptr")
    if kind == "coo" and "coords" in state:
        state = {**state, "row": state["coords"][0], "col": state["coords"][1]}
    parts = [state.get(name) for name in names]
    if kind is None or shape is None or not all(isinstance(p, np.ndarray) for p in parts):
        raise ValueError(f"{value.origin} (known are csc, csr and coo matrices)")
    data, second, third = parts
    size = tuple(int(length) for length in shape)
    if kind == "coo":
        matrix = sparse.coo_matrix((data, (second, third)), shape=size)
    else:
        make = sparse.csc_matrix if kind == "csc" else sparse.csr_matrix
        matrix = make((data, second, third), shape=size)
        matrix.check_format(full_check=True)
    dense: NDArray[Any] = np.asarray(matrix.todense())
    return dense


def _chumpy_to_array(value: _Inert, depth: int) -> NDArray[Any]:
    state = value.__dict__
    name = value.origin.rsplit(".", 1)[-1]
    if "x" in state:  # chumpy.Ch: the values themselves
        array = state["x"] if isinstance(state["x"], np.ndarray) else None
        inner = array if array is not None else _to_array(state["x"], depth + 1)
        if inner is not None:
            return inner
    source = _to_array(state["a"], depth + 1) if "a" in state else None
    if source is not None and name == "Select" and "idxs" in state:
        picked = source.ravel()[np.asarray(state["idxs"], np.int64).ravel()]
        shape = state.get("preferred_shape")
        return picked.reshape(tuple(shape)) if shape is not None else picked
    if source is not None and name == "reshape" and "newshape" in state:
        return source.reshape(tuple(np.atleast_1d(state["newshape"])))
    if source is not None and name == "transpose":
        axes = state.get("axes")
        return source.transpose(None if axes is None else tuple(axes))
    raise ValueError(f"a {value.origin} expression")
