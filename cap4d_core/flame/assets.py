"""Prepares the head-model folder: finds the model and its companions, checks and converts them."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError, MissingAssetError
from cap4d_core.files.basic import (
    atomic_path,
    read_npz,
    sha256_file,
    take_array,
    write_json,
    write_npz,
)
from cap4d_core.files.tracking import NUM_EXPRESSION
from cap4d_core.flame.model import (
    BLINK_FILE,
    JAW_REGRESSOR_FILE,
    MODEL_FILE,
    read_companion_array,
    read_flame_arrays,
)
from cap4d_core.flame.pickle_reader import REQUIRED_KEYS, load_flame_pickle
from cap4d_core.flame.template import (
    AVATAR_TEMPLATE,
    DEFORMABLE_VERTICES,
    FLAME_TEMPLATE,
    HEAD_VERTICES,
    NUM_HEAD_VERTICES,
    load_avatar_template,
    load_flame_template,
)

logger = logging.getLogger(__name__)

VERTEX_WEIGHTS_FILE = "flowface_vertex_weights.npy"
VERTEX_MASK_FILE = "flowface_vertex_mask.npy"
GENERATION_FILE = "gen_data.npz"
PROVENANCE_FILE = "provenance.json"

# In order of preference: what the released model was trained with comes first.
MODEL_NAMES = (
    "flame2023_no_jaw.pkl",
    "flame2023.pkl",
    "generic_model.pkl",
    "flame_gp.pkl",
)
COMPANIONS = {
    FLAME_TEMPLATE: "template with the upper mouth part and texture coordinates",
    AVATAR_TEMPLATE: "template with both mouth parts and the avatar's texture atlas",
    HEAD_VERTICES: "vertices that crop boxes enclose",
    DEFORMABLE_VERTICES: "vertices whose surface may be refined",
    BLINK_FILE: "blink blendshape",
    JAW_REGRESSOR_FILE: "jaw rotation per expression",
    VERTEX_WEIGHTS_FILE: "vertex weights of the tracker's fit",
    VERTEX_MASK_FILE: "vertices the tracker aligns",
    GENERATION_FILE: "expressions of the generated views",
}
_SUBFOLDERS = (
    ".", "assets", "assets/flame", "assets/datasets", "data/assets", "data/assets/flame",
    "data/assets/datasets", "flame", "datasets", "FLAME2023", "FLAME2020",
)  # fmt: skip
_WHERE_MODEL = (
    "Download FLAME 2023 (the version without jaw rotation) after registering at "
    "https://flame.is.tue.mpg.de and put flame2023_no_jaw.pkl there, or set head_model.path: "
    "download."
)
_WHERE_COMPANIONS = (
    "They are in data/assets/ of the public CAP4D repository (CC BY-NC 4.0); put them beside the "
    "model, name their folder in head_model.companions, or set head_model.companions: download. "
    "The setting head_model.path: demo builds a procedural head that needs no download."
)


def prepare_head_model(
    source: str | Path, companions: str | Path | None, output_dir: str | Path
) -> Path:
    """Collects head model and companions in one folder, checked and free of pickles.

    Args:
        source: the model's .pkl, or a folder that holds it (also in assets/, data/assets/flame/ and
            alike) or a folder written by this function.
        companions: folder with the other files when they do not lie beside the model.
        output_dir: receives flame.npz, the companions under their own names, and provenance.json
            with the SHA-256 of every source file.

    Returns:
        `output_dir`.

    Raises:
        MissingAssetError: the model or companions were not found; lists all that are missing.
        InputFileError: a file is not what it should be.
    """
    source, output_dir = Path(source), Path(output_dir)
    model = find_model(source)
    files = find_companions(source, model, None if companions is None else Path(companions))
    arrays = _read_model(model)

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".head_model-") as work:
        staging = Path(work)
        write_npz(staging / MODEL_FILE, arrays)
        for name, file in files.items():
            shutil.copyfile(file, staging / name)
        check_head_model(staging)
        sources = {MODEL_FILE: model, **files}
        write_json(
            staging / PROVENANCE_FILE,
            {
                name: {"source": str(path.resolve()), "sha256": sha256_file(path)}
                for name, path in sources.items()
            },
        )
        # The provenance file goes last: where it is, the folder is complete.
        (output_dir / PROVENANCE_FILE).unlink(missing_ok=True)
        for name in (*sources, PROVENANCE_FILE):
            with atomic_path(output_dir / name) as temporary:
                shutil.copyfile(staging / name, temporary)
    logger.info("head model %s -> %s", model, output_dir)
    return output_dir


def find_model(source: Path) -> Path:
    """The model file of a source: a .pkl, or a converted flame.npz.

    Raises:
        MissingAssetError: none found.
        InputFileError: several pickles of unknown names.
    """
    if source.is_file():
        return source
    folders = [source / name for name in _SUBFOLDERS if (source / name).is_dir()]
    for name in (*MODEL_NAMES, MODEL_FILE):
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    for folder in folders:
        pickles = sorted(folder.glob("*.pkl"))
        if len(pickles) > 1:
            raise InputFileError(
                folder,
                f"several pickles ({', '.join(p.name for p in pickles)})",
                f"one of {', '.join(MODEL_NAMES)}",
                "Name the file itself in head_model.path.",
            )
        if pickles:
            return pickles[0]
    found = "nothing there" if not source.exists() else "no head model in it"
    raise MissingAssetError(
        f"{source}: {found}; expected {' or '.join(MODEL_NAMES[:3])}. {_WHERE_MODEL}"
    )


def find_companions(source: Path, model: Path, companions: Path | None) -> dict[str, Path]:
    """Companion files by name.

    Raises:
        MissingAssetError: lists every missing file at once, with where to get them.
    """
    roots = [companions] if companions is not None else []
    roots += [source] if source.is_dir() else []
    # A model in data/assets/flame has companions in data/assets/datasets too.
    roots += [model.parent, model.parent.parent]
    folders = list(dict.fromkeys(root / name for root in roots for name in _SUBFOLDERS))
    found: dict[str, Path] = {}
    for name in COMPANIONS:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None:
            found[name] = path
    missing = [f"{name} ({what})" for name, what in COMPANIONS.items() if name not in found]
    if missing:
        searched = ", ".join(str(root) for root in dict.fromkeys(roots))
        lines = "\n  ".join(missing)
        raise MissingAssetError(
            f"Companion files of the head model are missing (searched {searched} and their usual "
            f"subfolders):\n  {lines}\n{_WHERE_COMPANIONS}"
        )
    return found


def _read_model(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npz":
        return dict(read_flame_arrays(path))
    arrays = load_flame_pickle(path)
    return {name: arrays[name] for name in REQUIRED_KEYS}


def check_head_model(folder: Path) -> None:
    """Checks sizes and indices of every file of a head-model folder.

    Faces of the model that differ from the template's are reported as a warning: fits stay valid,
    pictures of the mesh may not.

    Raises:
        InputFileError: the first file that is wrong.
    """
    arrays = read_flame_arrays(folder / MODEL_FILE)
    faces = arrays["f"]
    if faces.min() < 0 or faces.max() >= NUM_HEAD_VERTICES:
        raise InputFileError(
            folder / MODEL_FILE, f"'f' with vertex {faces.max()}", f"0 to {NUM_HEAD_VERTICES - 1}"
        )
    for template in (load_flame_template(folder), load_avatar_template(folder)):
        if not len(template.uvs):
            raise InputFileError(
                folder / FLAME_TEMPLATE, "no texture coordinates", "'vt' lines for every corner"
            )
        if not np.array_equal(template.faces[: len(faces)], faces):
            logger.warning(
                "the faces of the head model (%d) are not the first ones of the template with %d "
                "vertices; the template's are used",
                len(faces),
                template.num_vertices,
            )
    read_companion_array(folder / BLINK_FILE, (NUM_HEAD_VERTICES, 3))
    read_companion_array(folder / JAW_REGRESSOR_FILE, (NUM_EXPRESSION, 3))
    read_companion_array(folder / VERTEX_WEIGHTS_FILE, (NUM_HEAD_VERTICES,))
    read_companion_array(folder / VERTEX_MASK_FILE, (NUM_HEAD_VERTICES,))
    read_generation_data(folder)


def read_generation_data(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Expressions (N, 65) and eye rotations (N, 3) for generated views, from gen_data.npz.

    Raises:
        InputFileError: missing, or arrays of another shape or length.
    """
    path = folder / GENERATION_FILE
    arrays = read_npz(path, "expressions of generated views (gen_data.npz)")
    expr = take_array(arrays, path, "expr", (None, NUM_EXPRESSION))
    return expr, take_array(arrays, path, "eye_rot", (len(expr), 3))
