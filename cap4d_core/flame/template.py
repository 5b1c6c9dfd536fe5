"""Tables of the two template meshes: topology, texture atlas, vertex selections.

Vertex ranges: 0..5022 head model, 5023..5222 upper mouth half-sphere, 5223..5422 lower one (avatar
template only).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import require_file
from cap4d_core.flame.mouth import NUM_MOUTH_VERTICES
from cap4d_core.flame.obj import read_obj

NUM_HEAD_VERTICES = 5023
FLAME_TEMPLATE = "cap4d_flame_template.obj"
AVATAR_TEMPLATE = "cap4d_avatar_template.obj"
HEAD_VERTICES = "head_vertices.txt"
DEFORMABLE_VERTICES = "deformable_verts.txt"


@dataclass(frozen=True)
class HeadTemplate:
    """A template mesh and its vertex selections.

    vertices (V, 3) float64, metres, rest pose; faces (F, 3) int64; uvs (U, 2) float64, v upwards;
    uv_faces (F, 3) int64 into uvs; head_vertex_ids: the head without the mouth parts, which crop
    boxes enclose; deformable_vertex_ids: those whose surface may be refined.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    uvs: NDArray[np.float64]
    uv_faces: NDArray[np.int64]
    head_vertex_ids: NDArray[np.int64]
    deformable_vertex_ids: NDArray[np.int64]

    @property
    def num_vertices(self) -> int:
        """V."""
        return len(self.vertices)


def load_flame_template(folder: str | Path) -> HeadTemplate:
    """Template with the upper mouth part, 5223 vertices: what the diffusion model sees.

    Args:
        folder: head-model folder as written by `prepare_head_model`.

    Raises:
        InputFileError: a file is missing or has the wrong size.
    """
    return _load_template(Path(folder), FLAME_TEMPLATE, NUM_HEAD_VERTICES + NUM_MOUTH_VERTICES)


def load_avatar_template(folder: str | Path) -> HeadTemplate:
    """Template with both mouth parts, 5423 vertices: what the Gaussian avatar is bound to.

    Args:
        folder: head-model folder as written by `prepare_head_model`.

    Raises:
        InputFileError: a file is missing or has the wrong size.
    """
    return _load_template(Path(folder), AVATAR_TEMPLATE, NUM_HEAD_VERTICES + 2 * NUM_MOUTH_VERTICES)


def _load_template(folder: Path, name: str, num_vertices: int) -> HeadTemplate:
    mesh = read_obj(folder / name)
    if len(mesh.vertices) != num_vertices:
        raise InputFileError(
            folder / name, f"{len(mesh.vertices)} vertices", f"{num_vertices} vertices"
        )
    total = NUM_HEAD_VERTICES + 2 * NUM_MOUTH_VERTICES
    return HeadTemplate(
        vertices=mesh.vertices,
        faces=mesh.faces,
        uvs=mesh.uvs,
        uv_faces=mesh.uv_faces,
        head_vertex_ids=read_vertex_ids(folder / HEAD_VERTICES, NUM_HEAD_VERTICES),
        deformable_vertex_ids=read_vertex_ids(folder / DEFORMABLE_VERTICES, total),
    )


def read_vertex_ids(path: str | Path, num_vertices: int) -> NDArray[np.int64]:
    """Reads a list of 0-based vertex ids, one per line.

    Raises:
        InputFileError: missing, not whole numbers, or out of range.
    """
    path = require_file(path, "a list of vertex ids, one per line")
    try:
        ids = np.array([int(float(line)) for line in path.read_text("utf-8").split()], np.int64)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputFileError(path, f"no number ({error})", "vertex ids, one per line") from None
    if not len(ids) or ids.min() < 0 or ids.max() >= num_vertices:
        found = f"ids {ids.min()} to {ids.max()}" if len(ids) else "no ids"
        raise InputFileError(path, found, f"ids from 0 to {num_vertices - 1}")
    return ids
