"""Where the landmarks lie on the surface of a head model, and its file.

Computed once per head model (`registration`), because it takes the network through a hundred
renderings; kept in a file that belongs to exactly that model.

Conventions: head space, metres (see cap4d_core.flame.model). Angles in degrees: yaw > 0 turns the
face to the right of the picture, pitch > 0 upwards.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_npz, require_file, sha256_file, take_array, write_npz
from cap4d_core.files.images import write_image
from cap4d_core.flame.model import MODEL_FILE, HeadModel
from cap4d_core.tracking.landmark_topology import NUM_MESH_POINTS

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

_VERSION = 13
# Views whose systematic errors are measured.
BIAS_YAW_DEG = (-70.0, -50.0, -32.0, -15.0, 0.0, 15.0, 32.0, 50.0, 70.0)


@dataclass(frozen=True)
class Correspondence:
    """Landmarks on the surface of a head model.

    faces (468,) index into the model's faces; barycentrics (468, 3); spread_m (468,): how far the
    views disagree; points (468, 3): place on the template; picture: (H, W, 3) that shows it.
    bias (Y, 468, 2): in metres across the line of sight (x right, y up when the head is upright),
    where the network saw each landmark beside its place on the surface, for every yaw of
    BIAS_YAW_DEG, averaged over pitch. It is what the network does wrong on turned heads, and where
    it puts the landmarks of the hidden side.
    scatter (Y, 468, 3): how much that differs between tilted heads and open mouths: covariance
    (xx, xy, yy) in square metres along the same axes. Landmarks of the contour slide along it.
    """

    faces: NDArray[np.int64]
    barycentrics: Array
    spread_m: Array
    points: Array
    bias: Array
    scatter: Array
    picture: NDArray[np.uint8]

    def vertices(self, model_faces: NDArray[np.int64]) -> NDArray[np.int64]:
        """(468, 3) vertex indices that `barycentrics` weight."""
        return model_faces[self.faces]


def load_or_compute(
    head_model_dir: str | Path,
    cache: str | Path,
    device: str | torch.device = "cpu",
    networks: str | Path | None = None,
) -> Correspondence:
    """The correspondence of a head model, from a cache file when that belongs to this model.

    Args:
        head_model_dir: folder written by `prepare_head_model`.
        cache: .npz to read or write; a picture is written beside it (.png).
        device: where the networks run.
        networks: folder with networks that replace shipped ones (see `face_models`); a file made
            with other networks is not noticed.
    """
    head_model_dir, cache = Path(head_model_dir), Path(cache)
    if cache.is_file():
        try:
            return read_correspondence(cache, head_model_dir)
        except InputFileError as error:
            logger.warning("%s Computed again.", error)
    # Only here: it needs this module.
    from cap4d_core.tracking.detector import FaceDetector
    from cap4d_core.tracking.landmarks import LandmarkNetwork
    from cap4d_core.tracking.registration import compute_correspondence

    digest = _digest(head_model_dir)
    model = HeadModel.load(head_model_dir, mouth=False)
    result = compute_correspondence(
        model, FaceDetector(device, networks), LandmarkNetwork(device, networks), head_model_dir
    )
    write_npz(
        cache,
        {
            "model_sha256": np.array(digest),
            "version": np.int64(_VERSION),
            "faces": result.faces,
            "barycentrics": result.barycentrics,
            "spread_m": result.spread_m,
            "points": result.points,
            "bias": result.bias,
            "scatter": result.scatter,
            "picture": result.picture,
        },
    )
    write_image(cache.with_suffix(".png"), result.picture)
    return result


def read_correspondence(path: str | Path, head_model_dir: str | Path) -> Correspondence:
    """Reads a correspondence made for a head model.

    Raises:
        InputFileError: unreadable, of another head model, or of another version of this package.
    """
    path = Path(path)
    hint = "Delete it and run the rule place_landmarks again."
    arrays = read_npz(path, "landmarks on the head model")
    version = int(arrays.get("version", np.int64(-1)))
    if version != _VERSION:
        raise InputFileError(path, f"version {version}", f"version {_VERSION}", hint)
    if str(arrays.get("model_sha256")) != _digest(Path(head_model_dir)):
        raise InputFileError(
            path, "landmarks of another head model", f"those of {head_model_dir}", hint
        )
    points = NUM_MESH_POINTS
    return Correspondence(
        take_array(arrays, path, "faces", (points,), np.int64),
        take_array(arrays, path, "barycentrics", (points, 3), np.float64),
        take_array(arrays, path, "spread_m", (points,), np.float64),
        take_array(arrays, path, "points", (points, 3), np.float64),
        take_array(arrays, path, "bias", (len(BIAS_YAW_DEG), points, 2), np.float64),
        take_array(arrays, path, "scatter", (len(BIAS_YAW_DEG), points, 3), np.float64),
        take_array(arrays, path, "picture", (None, None, 3), np.uint8),
    )


def _digest(head_model_dir: Path) -> str:
    path = require_file(head_model_dir / MODEL_FILE, "a head model made by prepare_head_model")
    return sha256_file(path)
