"""Constant tables of the conditioning renderer, which the released checkpoint carries along.

By released names: freqs (7,) float32, faces and faces_uvs (F, 3) int64, face_mask (F,) bool,
props (V, 3) float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.diffusion.released_layout import TABLE_NAMES
from cap4d_core.errors import InputFileError, UserError

logger = logging.getLogger(__name__)

# Props are of order 1 and computed in float32 from a template with 6 decimals.
TABLE_ATOL = 1e-5


def check_tables(path: Path, tables: Mapping[str, Tensor]) -> None:
    """Demands that the renderer's tables fit each other.

    Raises:
        InputFileError: says which does not.
    """
    what = "consistent tables of the conditioning renderer"
    missing = set(TABLE_NAMES.values()) - set(tables)
    if missing:
        raise InputFileError(path, f"no table {', '.join(sorted(missing))}", what)
    faces, props, mask = tables["faces"], tables["props"], tables["face_mask"]
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.shape != tables["faces_uvs"].shape:
        uv_shape = tuple(tables["faces_uvs"].shape)
        raise InputFileError(path, f"faces {tuple(faces.shape)}, faces_uvs {uv_shape}", what)
    if mask.shape != faces.shape[:1]:
        raise InputFileError(path, f"face_mask {tuple(mask.shape)}, {len(faces)} faces", what)
    if props.ndim != 2 or props.shape[1] != 3:
        raise InputFileError(path, f"props {tuple(props.shape)}", what)
    if len(faces) and (int(faces.min()) < 0 or int(faces.max()) >= len(props)):
        found = f"face corners {int(faces.min())} to {int(faces.max())}, {len(props)} vertices"
        raise InputFileError(path, found, what)


def typed_tables(tables: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of tables (arrays or tensors) in the types of the released file."""
    types = {"freqs": torch.float32, "props": torch.float32, "face_mask": torch.bool}
    return {
        name: torch.as_tensor(np.asarray(value)).to(types.get(name, torch.int64), copy=True)
        for name, value in tables.items()
    }


def choose_tables(
    source: Path, stored: Mapping[str, Tensor] | None, head_tables: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint's tables if it has them, else the head model's; and notes for provenance.

    The checkpoint's win because the weights were trained with them; differences are logged.

    Raises:
        UserError: neither has all tables, or they are inconsistent.
    """
    head = typed_tables(head_tables or {})
    if stored is None:
        lacking = sorted(set(TABLE_NAMES.values()) - set(head))
        if lacking:
            names = "\n  ".join(f"missing: {key}" for key in TABLE_NAMES)
            raise UserError(
                f"{source}: no tables of the conditioning renderer; expected a checkpoint with "
                f"them, or those of a head model.\n  {names}"
            )
        check_tables(source, head)
        logger.warning("%s holds no renderer tables; those of the head model are used", source)
        return head, {"from": "head model"}
    tables = typed_tables(stored)
    differences = []
    for name in (n for n in TABLE_NAMES.values() if n in head):
        ours, theirs = tables[name], head[name]
        if ours.shape != theirs.shape:
            found = f"shape {tuple(ours.shape)}, in the head model {tuple(theirs.shape)}"
        elif not torch.allclose(ours.double(), theirs.double(), rtol=0, atol=TABLE_ATOL):
            gap = (ours.double() - theirs.double()).abs()
            count = int((gap > TABLE_ATOL).sum())
            found = f"{count} of {gap.numel()} values differ, by up to {gap.max():.3g}"
        else:
            continue
        differences.append(f"{name}: {found}")
    if differences:
        logger.warning(
            "%s: renderer tables differ from those of the head model (%s). The checkpoint's are "
            "used, as the weights were trained with them; is it the head model they belong to?",
            source,
            "; ".join(differences),
        )
    notes = {"from": "checkpoint", "compared": sorted(head), "differences": differences}
    return tables, notes


def head_model_tables(head_model_dir: str | Path) -> dict[str, Tensor]:
    """Tables of a head model, by released names, as the conditioning renderer derives them.

    Args:
        head_model_dir: folder written by `prepare_head_model`.

    Raises:
        InputFileError: a file of the head model is missing or wrong.
    """
    from cap4d_core.diffusion.conditioning import RendererTables
    from cap4d_core.flame.template import load_flame_template

    template = load_flame_template(head_model_dir)
    tables = RendererTables.from_template(
        template.vertices, template.faces, template.head_vertex_ids
    )
    return typed_tables(
        {
            "freqs": tables.frequencies,
            "faces": tables.faces,
            "faces_uvs": template.uv_faces,
            "face_mask": tables.face_mask,
            "props": tables.props,
        }
    )
