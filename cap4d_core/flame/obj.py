"""Wavefront OBJ templates: positions, texture coordinates and their triangles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import atomic_path, require_file


@dataclass(frozen=True)
class ObjMesh:
    """A triangle mesh with texture coordinates.

    vertices (V, 3) float64; faces (F, 3) int64 into them; uvs (U, 2) float64, v upwards; uv_faces
    (F, 3) int64 into `uvs`.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    uvs: NDArray[np.float64]
    uv_faces: NDArray[np.int64]


def read_obj(path: str | Path) -> ObjMesh:
    """Reads vertices (`v`), texture coordinates (`vt`) and triangles (`f v/vt`) in file order.

    Normals, groups and materials are skipped. Vertices are neither merged nor reordered.

    Raises:
        InputFileError: missing file, faces that are no triangles or lack texture coordinates, or
            indices out of range; says the line.
    """
    path = require_file(path, "a template mesh (.obj)")
    vertices: list[list[float]] = []
    uvs: list[list[float]] = []
    faces: list[list[int]] = []
    uv_faces: list[list[int]] = []
    with open(path, encoding="utf-8", errors="replace") as handle:
        for number, line in enumerate(handle, start=1):
            kind, *fields = line.split() or [""]
            try:
                if kind == "v":
                    vertices.append([float(value) for value in fields[:3]])
                elif kind == "vt":
                    uvs.append([float(value) for value in fields[:2]])
                elif kind == "f":
                    if len(fields) != 3:
                        raise ValueError(f"a face with {len(fields)} corners")
                    corners = [field.split("/") for field in fields]
                    faces.append([_index(corner[0], len(vertices)) for corner in corners])
                    uv_faces.append([_index(corner[1], len(uvs)) for corner in corners])
            except (ValueError, IndexError) as error:
                raise InputFileError(
                    path,
                    f"line {number}: {line.strip()[:60]!r} ({error})",
                    "triangles 'f v/vt v/vt v/vt' and numeric 'v x y z', 'vt u v'",
                ) from None
    if not vertices or not faces:
        raise InputFileError(path, f"{len(vertices)} vertices, {len(faces)} faces", "a mesh")
    try:
        positions = np.array(vertices, np.float64).reshape(len(vertices), 3)
        coordinates = np.array(uvs, np.float64).reshape(len(uvs), 2)
    except ValueError:
        raise InputFileError(
            path, "vertices with missing coordinates", "3 per v, 2 per vt"
        ) from None
    mesh = ObjMesh(positions, np.array(faces, np.int64), coordinates, np.array(uv_faces, np.int64))
    for name, indices, count in (
        ("vertex", mesh.faces, len(positions)),
        ("texture coordinate", mesh.uv_faces, len(coordinates)),
    ):
        if indices.min() < 0 or indices.max() >= count:
            raise InputFileError(
                path, f"a face with {name} {int(indices.max()) + 1}", f"{name}s 1 to {count}"
            )
    return mesh


def _index(text: str, count: int) -> int:
    """0-based index; negative numbers count back from the last one read so far."""
    number = int(text)
    if number == 0:
        raise ValueError("index 0")
    return number - 1 if number > 0 else count + number


def write_obj(path: str | Path, mesh: ObjMesh) -> None:
    """Writes a mesh as `v`, `vt`, `f v/vt` lines, atomically."""
    lines = [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in mesh.vertices]
    lines += [f"vt {u:.9g} {v:.9g}" for u, v in mesh.uvs]
    for face, uv_face in zip(mesh.faces + 1, mesh.uv_faces + 1, strict=True):
        corners = zip(face, uv_face, strict=True)
        lines.append("f " + " ".join(f"{vertex}/{uv}" for vertex, uv in corners))
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
