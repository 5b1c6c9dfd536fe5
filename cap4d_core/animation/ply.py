"""PLY files of an avatar: the released animation layout, and one frame as ordinary splats.

`exported_animation.ply` (binary little endian) holds, in this order:

    faces              (F)    triangles of the UV grid mesh, uint32
    base_vertex        (V)    grid vertices of the first frame, V = R * R
    vertex             (N)    splats in face-local parameters and the face each is bound to
    for every frame i (five digits):
    meta_delta_min_i, meta_delta_max_i (1)   per-axis range of X_i - X_0
    delta_vertex_i     (V)    (X_i - X_0 - min) / max(max - min, 1e-10): float, or uint8 of 255 *

Positions are metres in OpenCV axes with the head fixed at the origin (+y down, +z into the head).
Frames are written one by one, so memory does not grow with the length of a sequence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import atomic_path, require_file

Float32Array = NDArray[np.float32]
_TYPES = {"float": "<f4", "double": "<f8", "uint": "<u4", "int": "<i4", "uchar": "u1"}
_XYZ = ("x", "y", "z")


@dataclass(frozen=True)
class BoundSplats:
    """Splats in the frames of their faces, as optimised (before any activation).

    xyz (N, 3); features_dc (N, 3) and features_rest (N, K, 3) spherical harmonics; opacity (N,)
    logits; log_scales (N, 3); rotations (N, 4) wxyz, any length; binding (N,) face of each.
    """

    xyz: Float32Array
    features_dc: Float32Array
    features_rest: Float32Array
    opacity: Float32Array
    log_scales: Float32Array
    rotations: Float32Array
    binding: NDArray[np.int64]

    def columns(self) -> tuple[list[str], Float32Array]:
        """Property names and the (N, P) table without binding, in the standard splat order."""
        count = len(self.xyz)
        rest = self.features_rest.reshape(count, -1, 3)
        names = [*_XYZ, "f_dc_0", "f_dc_1", "f_dc_2"]
        names += [f"f_rest_{i}" for i in range(3 * rest.shape[1])]
        names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
        table = [
            self.xyz,
            self.features_dc.reshape(count, 3),
            rest.transpose(0, 2, 1).reshape(count, -1),  # all red first, then green, then blue
            self.opacity.reshape(count, 1),
            self.log_scales,
            self.rotations,
        ]
        return names, np.concatenate(table, axis=1).astype("<f4")


class AnimationPlyWriter:
    """Writes `exported_animation.ply` frame by frame; a context manager, atomic.

    Args:
        path: file to write.
        splats: splats in face-local parameters.
        faces: (F, 3) triangles of the grid mesh.
        num_vertices: V, grid vertices per frame, empty pixels included.
        num_frames: how many frames will be written (the header says it).
        compress: 8-bit offsets, a quarter of the size.
        parity: published arithmetic: offsets are rounded down instead of to nearest, and vertices
            without a face keep what the grid holds there instead of zero.
    """

    def __init__(
        self,
        path: str | Path,
        splats: BoundSplats,
        faces: NDArray[Any],
        num_vertices: int,
        num_frames: int,
        *,
        compress: bool = False,
        parity: bool = False,
    ) -> None:
        self.path = Path(path)
        self.splats = splats
        self.faces = np.asarray(faces)
        self.num_vertices = num_vertices
        self.num_frames = num_frames
        self.compress = compress
        self.parity = parity
        self._used = np.zeros(num_vertices, bool)
        self._used[self.faces.reshape(-1)] = True
        self._written = 0
        self._base: Float32Array | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> AnimationPlyWriter:
        temporary = self._resources.enter_context(atomic_path(self.path))
        self._file: IO[bytes] = self._resources.enter_context(open(temporary, "wb"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._written != self.num_frames:
            error = RuntimeError(
                f"{self.path}: {self._written} frames written, {self.num_frames} announced"
            )
            self._resources.__exit__(RuntimeError, error, None)
            raise error
        self._resources.__exit__(kind, error, trace)

    def write(self, vertices: NDArray[Any]) -> None:
        """Adds one frame: (V, 3) deformed grid vertices, metres, OpenCV axes, head fixed."""
        if vertices.shape != (self.num_vertices, 3):
            raise ValueError(f"vertices of shape {vertices.shape}, expected {self.num_vertices}, 3")
        if self._written == self.num_frames:
            raise ValueError(f"more than the announced {self.num_frames} frames")
        current = np.asarray(vertices, np.float32)
        if not self.parity:
            # No face uses them; left as they are they widen the range that 8 bits must cover.
            current = np.where(self._used[:, None], current, np.float32(0))
        if self._base is None:
            self._base = current.copy()
            self._write_static()
        delta = current - self._base
        low, high = delta.min(axis=0), delta.max(axis=0)
        normalised = (delta - low) / np.maximum(high - low, np.float32(1e-10))
        self._write_rows(low[None])
        self._write_rows(high[None])
        if not self.compress:
            self._write_rows(normalised)
        else:
            steps = normalised * np.float32(255)
            steps = np.floor(steps) if self.parity else np.rint(steps)
            self._file.write(steps.astype(np.uint8).tobytes())
        self._written += 1

    def _write_rows(self, rows: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(rows, "<f4").tobytes())

    def _write_static(self) -> None:
        names, table = self.splats.columns()
        binding = self.splats.binding.reshape(-1, 1).astype("<f4")
        if len(self.faces) > 2**24:
            raise ValueError("face ids above 2^24 do not fit the format's float32 'binding'")
        delta_type = "uchar" if self.compress else "float"
        lines = ["ply", "format binary_little_endian 1.0"]
        lines += _element("faces", len(self.faces), "uint", ("index_0", "index_1", "index_2"))
        lines += _element("base_vertex", self.num_vertices, "float", _XYZ)
        lines += _element("vertex", len(table), "float", [*names, "binding"])
        for i in range(self.num_frames):
            lines += _element(f"meta_delta_min_{i:05d}", 1, "float", _XYZ)
            lines += _element(f"meta_delta_max_{i:05d}", 1, "float", _XYZ)
            lines += _element(f"delta_vertex_{i:05d}", self.num_vertices, delta_type, _XYZ)
        self._file.write("\n".join([*lines, "end_header", ""]).encode("ascii"))
        self._file.write(np.ascontiguousarray(self.faces, "<u4").tobytes())
        assert self._base is not None
        self._write_rows(self._base)
        self._write_rows(np.concatenate([table, binding], axis=1))


def _element(name: str, count: int, kind: str, properties: Any) -> list[str]:
    return [f"element {name} {count}", *(f"property {kind} {p}" for p in properties)]


def write_splat_ply(path: str | Path, splats: BoundSplats, comment: str = "") -> None:
    """Writes splats as the standard 3D Gaussian splatting PLY that viewers open.

    Args:
        path: file to write.
        splats: splats in WORLD units (positions in metres, log of world scales); binding unused.
        comment: one header line.
    """
    names, table = splats.columns()
    names[3:3] = ["nx", "ny", "nz"]  # expected by viewers, never used
    table = np.insert(table, [3, 3, 3], np.float32(0), axis=1)
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {comment}"] if comment else []
    lines += _element("vertex", len(table), "float", names)
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write("\n".join([*lines, "end_header", ""]).encode("ascii", "replace"))
        handle.write(np.ascontiguousarray(table, "<f4").tobytes())


def iterate_ply(path: str | Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields (element name, structured array) of a binary PLY without list properties.

    Raises:
        InputFileError: not such a PLY, or shorter than its header says.
    """
    path = require_file(path, "a PLY file")
    expected = "a binary little-endian PLY without lists"
    with open(path, "rb") as handle:
        elements: list[tuple[str, int, list[tuple[str, str]]]] = []
        if handle.readline().strip() != b"ply":
            raise InputFileError(path, "no PLY signature", expected)
        while True:
            line = handle.readline()
            words = line.decode("ascii", "replace").split()
            if not line:
                raise InputFileError(path, "no end of header", expected)
            if words[:1] == ["end_header"]:
                break
            if words[:1] == ["format"] and words[1:2] != ["binary_little_endian"]:
                raise InputFileError(path, f"format {' '.join(words[1:])}", expected)
            if words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
                elements.append((words[1], int(words[2]), []))
            elif words[:1] == ["property"]:
                if not elements or len(words) != 3 or words[1] not in _TYPES:
                    raise InputFileError(path, f"'{' '.join(words)}'", expected)
                elements[-1][2].append((words[2], _TYPES[words[1]]))
        left = path.stat().st_size - handle.tell()
        for name, count, properties in elements:
            dtype = np.dtype(properties)
            if (left := left - count * dtype.itemsize) < 0:
                raise InputFileError(path, f"an end within element '{name}'", "a complete file")
            yield name, np.frombuffer(handle.read(count * dtype.itemsize), dtype)


@dataclass(frozen=True)
class PlyAnimation:
    """Content of `exported_animation.ply`: faces (F, 3), splats, vertices (T, V, 3) decoded."""

    faces: NDArray[np.int64]
    splats: BoundSplats
    vertices: Float32Array
    compressed: bool


def read_animation_ply(path: str | Path) -> PlyAnimation:
    """Reads a whole `exported_animation.ply`; all frames are held in memory.

    Raises:
        InputFileError: not this layout.
    """
    elements = dict(iterate_ply(path))
    missing = [name for name in ("faces", "base_vertex", "vertex") if name not in elements]
    if missing:
        raise InputFileError(path, f"no element {', '.join(missing)}", "an exported animation")
    faces = _matrix(elements["faces"]).astype(np.int64)
    base = _matrix(elements["base_vertex"]).astype(np.float32)
    frames, compressed = [], False
    for name in elements:
        found = re.fullmatch(r"delta_vertex_(\d+)", name)
        if not found:
            continue
        delta = _matrix(elements[name])
        compressed = delta.dtype == np.uint8
        fraction = delta.astype(np.float32) / (255.0 if compressed else 1.0)
        low = _matrix(elements[f"meta_delta_min_{found[1]}"])
        high = _matrix(elements[f"meta_delta_max_{found[1]}"])
        frames.append(base + low + fraction * (high - low))
    return PlyAnimation(
        faces=faces,
        splats=splats_of_element(elements["vertex"]),
        vertices=np.asarray(frames, np.float32).reshape(len(frames), len(base), 3),
        compressed=compressed,
    )


def splats_of_element(rows: NDArray[Any]) -> BoundSplats:
    """Splat parameters from a `vertex` element; binding is 0 where the file has none."""
    names = rows.dtype.names or ()
    count = len(rows)
    rest = [n for n in names if n.startswith("f_rest_")]

    def take(*columns: str) -> Float32Array:
        return np.stack([rows[c] for c in columns], axis=1).astype(np.float32)

    features_rest = take(*rest) if rest else np.zeros((count, 0), np.float32)
    binding = rows["binding"] if "binding" in names else np.zeros(count)
    return BoundSplats(
        xyz=take(*_XYZ),
        features_dc=take("f_dc_0", "f_dc_1", "f_dc_2"),
        features_rest=features_rest.reshape(count, 3, -1).transpose(0, 2, 1),
        opacity=rows["opacity"].astype(np.float32),
        log_scales=take("scale_0", "scale_1", "scale_2"),
        rotations=take("rot_0", "rot_1", "rot_2", "rot_3"),
        binding=binding.astype(np.int64),
    )


def _matrix(rows: NDArray[Any]) -> NDArray[Any]:
    return np.stack([rows[name] for name in rows.dtype.names or ()], axis=1)
