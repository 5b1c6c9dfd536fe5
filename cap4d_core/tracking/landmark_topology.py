"""Which landmark is which: contours of the face mesh and mirror images.

'left' and 'right' are sides of an upright picture of a face that looks at the viewer.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from cap4d_core.tracking.face_models import MODEL_FOLDER

NUM_MESH_POINTS = 468
LEFT_IRIS, RIGHT_IRIS = slice(468, 473), slice(473, 478)

_content = json.loads((MODEL_FOLDER / "face_mesh.json").read_text("utf-8"))

MIRRORED: NDArray[np.int64] = np.array(_content["mirrored"], np.int64)
"""(478,) number of the landmark that shows the same feature in the mirror image."""

CONTOURS: dict[str, NDArray[np.int64]] = {
    name: np.array(edges, np.int64) for name, edges in _content["contours"].items()
}
"""(E, 2) pairs of neighbouring landmarks of lips, eyes, brows, nose and face oval."""

INNER_LIP_PAIRS: NDArray[np.int64] = np.array(
    [(13, 14), (82, 87), (312, 317), (81, 178), (311, 402), (80, 88), (310, 318)]
)
"""(P, 2) landmarks of the upper and the lower lip that touch when the mouth is closed."""


def contour_points(name: str) -> NDArray[np.int64]:
    """Numbers of all landmarks on a contour, ascending."""
    return np.unique(CONTOURS[name])
