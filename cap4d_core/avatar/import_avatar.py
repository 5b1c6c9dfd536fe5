"""Takes over an avatar that was fitted elsewhere: a released checkpoint or one of this pipeline."""

from __future__ import annotations

import logging
from pathlib import Path

from cap4d_core.avatar.avatar_files import (
    DESCRIPTION_FILE,
    TENSOR_FILE,
    load_avatar,
    save_avatar,
)
from cap4d_core.avatar.checkpoints import find_released_checkpoint, import_released_checkpoint
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import sha256_file
from cap4d_core.flame.model import HeadModel

logger = logging.getLogger(__name__)

WHAT = f"a released chkpnt*.pth, or a folder with one or with {TENSOR_FILE} and {DESCRIPTION_FILE}"


def find_avatar(source: str | Path) -> Path:
    """The file that holds the tensors of an avatar.

    Args:
        source: a chkpnt*.pth, a folder with some (the largest iteration is taken), or a folder
            written by `fit_avatar`.

    Raises:
        InputFileError: no avatar there.
    """
    source = Path(source)
    if source.is_file() and source.suffix == ".pth":
        return source
    if (source / DESCRIPTION_FILE).is_file():
        if not (source / TENSOR_FILE).is_file():
            raise InputFileError(source, f"{DESCRIPTION_FILE} without {TENSOR_FILE}", WHAT)
        return source / TENSOR_FILE
    if not source.is_dir():
        raise InputFileError(source, "another file" if source.exists() else "nothing there", WHAT)
    if not any(source.glob("chkpnt*.pth")):
        raise InputFileError(source, "a folder without an avatar", WHAT)
    return find_released_checkpoint(source)


def import_avatar(source: str | Path, head: HeadModel, output_dir: str | Path) -> None:
    """Checks an avatar against the head model and writes it as `fit_avatar` does.

    Args:
        source: see `find_avatar`.
        head: head model with the mouth parts that the avatar was fitted with.
        output_dir: receives avatar.safetensors and avatar.json.

    Raises:
        InputFileError: no avatar there, unreadable, or one of another head model.
    """
    file = find_avatar(source)
    if file.name == TENSOR_FILE:
        avatar = load_avatar(file.parent, head)
    else:
        avatar = import_released_checkpoint(file, head)
    origin = {"source": str(file.resolve()), "sha256": sha256_file(file)}
    logger.info("%s: %d splats", file, len(avatar.splats))
    save_avatar(avatar, output_dir, {**avatar.meta, "imported_from": origin})
