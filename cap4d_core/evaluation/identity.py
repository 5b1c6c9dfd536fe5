"""Identity similarity: whether a recognition network sees the same person.

The measure is the cosine between embeddings of two faces (CSIM). No network is shipped: weights for
face recognition that may be passed on and used freely were not found. A file in ONNX format can be
given (`evaluation.identity_model`); it is run by onnxruntime, an optional dependency, and being a
graph of operators it cannot run code of its own.

The network gets faces aligned by five points to the usual template of ArcFace (Deng et al. 2019),
RGB, scaled to -1..1, at the size that its input has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from cap4d_core.errors import InputFileError, MissingAssetError
from cap4d_core.files.basic import require_file

Array = NDArray[np.float64]

NOT_SET = (
    "no recognition network (evaluation.identity_model is not set; none is shipped, see "
    "docs/evaluation.md)"
)
# Left eye, right eye, nose tip, left and right corner of the mouth (sides of the picture) in a face
# of 112 x 112 pixels.
TEMPLATE_SIDE = 112
TEMPLATE = np.array(
    [[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]]
)
# The same places among the landmarks: iris centres, nose tip, corners of the mouth.
FIVE_POINTS = (468, 473, 1, 61, 291)


class IdentityEncoder(Protocol):
    """Turns pictures of a face into embeddings that are near for one person."""

    def embed(self, image: NDArray[np.uint8], landmarks: Array) -> Array:
        """(D,) embedding of unit length of the face with landmarks (478, 2) in (H, W, 3) uint8."""
        ...


def align_face(image: NDArray[np.uint8], landmarks: Array, side: int) -> NDArray[np.uint8]:
    """The face (side, side, 3), moved, turned and scaled so that five points meet the template."""
    source = np.asarray(landmarks, np.float64)[list(FIVE_POINTS), :2]
    target = TEMPLATE * (side / TEMPLATE_SIDE)
    linear, offset = _similarity(source, target)
    # OpenCV counts from pixel centres, landmarks from pixel corners.
    offset = offset + linear @ [0.5, 0.5] - 0.5
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    warped = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR)
    return np.asarray(warped, np.uint8)


def _similarity(source: Array, target: Array) -> tuple[Array, Array]:
    """Best rotation, scale and shift in the plane (Umeyama 1991): (2, 2) and (2,)."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1.0, np.sign(np.linalg.det(u @ vt))])
    linear = u @ sign @ vt * float((s * np.diag(sign)).sum() / (a**2).sum())
    return linear, target.mean(0) - linear @ source.mean(0)


class OnnxIdentity:
    """A recognition network in an ONNX file: one input (1, 3, S, S), first output (1, D)."""

    def __init__(self, session: Any, path: Path) -> None:
        self._session, self.path = session, path
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        fits = len(inputs) == 1 and len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
        if not fits or not isinstance(shape[2], int):
            found = ", ".join(f"{i.name} {list(i.shape)}" for i in inputs) or "no inputs"
            raise InputFileError(path, found, "one input (N, 3, S, S): aligned faces, RGB in -1..1")
        self._input, self.side = inputs[0].name, int(shape[2])

    @classmethod
    def load(cls, path: str | Path) -> OnnxIdentity:
        """Opens an ONNX file.

        Raises:
            MissingAssetError: onnxruntime is not installed.
            InputFileError: missing, no ONNX network, or one of another kind.
        """
        what = "a face recognition network in ONNX format"
        path = require_file(path, what)
        try:
            import onnxruntime
        except ImportError:
            raise MissingAssetError(
                f"{path}: ONNX networks need onnxruntime, which is not installed. Install it (pip "
                "install onnxruntime), or unset evaluation.identity_model."
            ) from None
        try:
            session = onnxruntime.InferenceSession(
                str(path), providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # its exceptions have no common base that could be named
            raise InputFileError(path, f"no readable network ({error})", what) from None
        return cls(session, path)

    def embed(self, image: NDArray[np.uint8], landmarks: Array) -> Array:
        """See `IdentityEncoder`."""
        face = align_face(image, landmarks, self.side).astype(np.float32) / 127.5 - 1
        output = self._session.run(None, {self._input: face.transpose(2, 0, 1)[None]})[0]
        vector = np.asarray(output, np.float64).reshape(-1)
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise InputFileError(
                self.path, "an embedding of no length or with NaN", "a working network"
            )
        return vector / length


def mean_embedding(embeddings: list[Array]) -> Array:
    """Mean of several embeddings of a person, of unit length."""
    mean = np.mean(embeddings, axis=0)
    return np.asarray(mean / np.linalg.norm(mean))
