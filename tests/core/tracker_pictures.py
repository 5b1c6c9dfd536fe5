"""Pictures of faces for tests of the tracker, rendered from the demo head: no photo is needed."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cap4d_core.demo.head import write_demo_head
from cap4d_core.demo.world import write_demo_subject
from cap4d_core.files.images import read_rgb
from cap4d_core.flame.assets import prepare_head_model


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cap4d_tracker_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def demo_head_folder() -> Path:
    """Head-model folder of the demo head."""
    source = _folder() / "source"
    write_demo_head(source)
    return prepare_head_model(source, None, _folder() / "head")


@functools.cache
def demo_subject() -> Path:
    """Four photos (320 px) of a demo subject with their exact fit; the first is frontal."""
    folder = _folder() / "subject"
    write_demo_subject(folder, 5, num_references=4, resolution=320, supersample=1)
    return folder


@functools.cache
def frontal_picture() -> NDArray[np.uint8]:
    """(H, W, 3) frontal face."""
    return read_rgb(sorted((demo_subject() / "images/cam0").iterdir())[0])


@functools.cache
def correspondence_file() -> Path:
    """Where tests share the landmarks on the demo head."""
    return _folder() / "correspondence.npz"


def save(path: Path, picture: NDArray[np.uint8], **options: object) -> Path:
    """Writes a picture with Pillow's options, e.g. exif."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)  # type: ignore[arg-type]
    return path
