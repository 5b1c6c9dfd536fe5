"""Image sets: square head crops with head-model and camera parameters, one pair of files per view.

    {folder}/images/%05d.png    square crop, RGB
    {folder}/flame/%05d.npz     parameters (released format), see ViewParameters
    {folder}/mattes/%05d.png    optional, 255 = foreground (ground truth of rendered sets)

Frames and units as in `cap4d_core.files.tracking`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, read_npz, take_array, write_npz
from cap4d_core.files.tracking import (
    NUM_EXPRESSION,
    NUM_SHAPE,
    FloatArray,
    check_world_to_camera,
    list_frames,
)


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of one view.

    shape (150,); expr (65,); rot, tra, eye_rot (3,); intrinsics fx, fy, cx, cy in pixels of the
    original image; extr (4, 4) world-to-camera; resolution (height, width) of the original image;
    crop_box (x0, y0, x1, y1) in original pixels, square, may leave the image; timestep_id: frame in
    the tracking (references only).
    """

    shape: FloatArray
    expr: FloatArray
    rot: FloatArray
    tra: FloatArray
    eye_rot: FloatArray
    fx: float
    fy: float
    cx: float
    cy: float
    extr: FloatArray
    resolution: tuple[int, int]
    crop_box: tuple[int, int, int, int]
    timestep_id: int | None = None


@dataclass(frozen=True)
class ImageSetItem:
    """One view of an image set."""

    image: Path
    parameters: ViewParameters
    matte: Path | None = None


def read_view_parameters(path: str | Path) -> ViewParameters:
    """Reads one `flame/%05d.npz`.

    Raises:
        InputFileError: missing or wrong field.
    """
    arrays = read_npz(path, "parameters of one view")
    extr = take_array(arrays, path, "extr", (1, 4, 4), np.float64)
    check_world_to_camera(extr, path)
    x0, y0, x1, y1 = take_array(arrays, path, "crop_box", (4,), np.int64).tolist()
    if x1 <= x0 or y1 <= y0:
        raise InputFileError(path, f"'crop_box' {[x0, y0, x1, y1]}", "x0 < x1 and y0 < y1")
    height, width = take_array(arrays, path, "resolutions", (1, 2), np.int64)[0].tolist()
    scalars = {
        name: float(take_array(arrays, path, name, (1, 1), np.float64)[0, 0])
        for name in ("fx", "fy", "cx", "cy")
    }
    return ViewParameters(
        shape=take_array(arrays, path, "shape", (NUM_SHAPE,)),
        expr=take_array(arrays, path, "expr", (1, NUM_EXPRESSION))[0],
        rot=take_array(arrays, path, "rot", (1, 3))[0],
        tra=take_array(arrays, path, "tra", (1, 3))[0],
        eye_rot=take_array(arrays, path, "eye_rot", (1, 3))[0],
        extr=extr[0],
        resolution=(height, width),
        crop_box=(x0, y0, x1, y1),
        timestep_id=int(arrays["timestep_id"]) if "timestep_id" in arrays else None,
        **scalars,
    )


def write_view_parameters(path: str | Path, view: ViewParameters) -> None:
    """Writes one `flame/%05d.npz` in the released format."""
    arrays: dict[str, NDArray[Any]] = {
        name: np.full((1, 1), getattr(view, name), np.float32) for name in ("fx", "fy", "cx", "cy")
    }
    arrays["extr"] = np.asarray(view.extr)[None]
    arrays["shape"] = np.asarray(view.shape, np.float32)
    for name in ("expr", "rot", "tra", "eye_rot"):
        arrays[name] = np.asarray(getattr(view, name), np.float32)[None]
    arrays["resolutions"] = np.asarray([view.resolution], np.int64)
    if view.timestep_id is not None:
        arrays["timestep_id"] = np.asarray(view.timestep_id, np.int64)
    arrays["crop_box"] = np.asarray(view.crop_box, np.int64)
    write_npz(path, arrays)


def read_image_set(folder: str | Path) -> list[ImageSetItem]:
    """Reads an image set; images and parameters are paired by position in sorted name order.

    Raises:
        InputFileError: folder missing, empty, or counts differ.
    """
    folder = Path(folder)
    for part in ("images", "flame"):
        if not (folder / part).is_dir():
            raise InputFileError(folder / part, "no folder", "an image set (images/ and flame/)")
    images = list_frames(folder / "images")
    parameters = sorted((folder / "flame").glob("*.npz"))
    if not images or len(images) != len(parameters):
        raise InputFileError(
            folder,
            f"{len(images)} images and {len(parameters)} parameter files",
            "as many images as parameter files, at least one",
        )
    mattes: list[Path] = list_frames(folder / "mattes") if (folder / "mattes").is_dir() else []
    if mattes and len(mattes) != len(images):
        raise InputFileError(folder / "mattes", f"{len(mattes)} mattes", f"{len(images)}")
    return [
        ImageSetItem(image, read_view_parameters(file), mattes[i] if mattes else None)
        for i, (image, file) in enumerate(zip(images, parameters, strict=True))
    ]


def read_image_index(
    index: str | Path, folder: str | Path | None = None, images: str = "images"
) -> list[ImageSetItem]:
    """Reads the views that an index file lists, in the order of their names.

    Unlike `read_image_set` this leaves out files of an earlier run that still lie in the folder.

    Args:
        index: `index.json` of an image set, or of one shard of it: `files` maps names relative to
            `folder` to their SHA-256.
        folder: of the image set; default: the one of the index file.
        images: which pictures to take: `images`, or `crops` where they are listed.

    Raises:
        InputFileError: no index file, or a listed file is gone.
    """
    index = Path(index)
    folder = index.parent if folder is None else Path(folder)
    content = read_json(index, "an index of images")
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise InputFileError(index, "no 'files'", "an index of images", "Delete it and run again.")
    listed = sorted(name for name in content["files"] if name.startswith(f"{images}/"))
    if not listed and images != "images":
        return read_image_index(index, folder)
    items = []
    for name in listed:
        parameters = folder / "flame" / f"{Path(name).stem}.npz"
        for path in (folder / name, parameters):
            if not path.is_file():
                raise InputFileError(
                    path,
                    "nothing there",
                    f"a file listed in {index}",
                    f"Delete {index} and run the workflow again.",
                )
        items.append(ImageSetItem(folder / name, read_view_parameters(parameters)))
    return items
