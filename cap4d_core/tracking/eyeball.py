"""Geometry of the eyes: which way an iris looks, which landmarks belong to which eye.

'Left' and 'right' are sides of an upright picture. Angles of a direction in head space are (yaw
towards +x, pitch towards +y) in radians; (0, 0) is straight ahead (+z).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.tracking.landmark_topology import contour_points

Array = NDArray[np.float64]

IRIS_CENTERS = (468, 473)
EYELIDS = (contour_points("left_eye"), contour_points("right_eye"))
# Corners and middles of the lids: outer, inner, pairs of upper and lower lid.
_CORNERS = ((33, 133), (263, 362))
_LID_PAIRS = (((159, 145), (160, 144), (158, 153)), ((386, 374), (387, 373), (385, 380)))
# Below this height relative to its width an eye is closed and its iris a guess.
CLOSED_BELOW = 0.13


def eye_openness(points: Array) -> Array:
    """(2,) height of each eye relative to its width, from landmarks (478, 2 or 3)."""
    result = []
    for corners, pairs in zip(_CORNERS, _LID_PAIRS, strict=True):
        width = np.linalg.norm(points[corners[0]] - points[corners[1]])
        height = np.mean([np.linalg.norm(points[a] - points[b]) for a, b in pairs])
        result.append(height / max(width, 1e-6))
    return np.array(result)


def direction_on_eyeball(origin: Array, ray: Array, center: Array, radius: float) -> Array:
    """Unit direction from the centre of an eyeball to where a ray first meets it.

    Args:
        origin: (3,) start of the ray.
        ray: (3,) unit direction.
        center: (3,) of the eyeball.
        radius: of the eyeball.
    """
    to_center = center - origin
    along = float(ray @ to_center)
    inside = radius**2 - (float(to_center @ to_center) - along**2)
    # A ray that misses the sphere touches its rim.
    point = origin + ray * (along - np.sqrt(max(inside, 0.0)))
    direction: Array = (point - center) / np.linalg.norm(point - center)
    return direction


def direction_angles(direction: Array) -> Array:
    """(2,) yaw and pitch of a direction."""
    x, y, z = direction
    return np.array([np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))])


def eye_rotation(angles: Array) -> Array:
    """Rotation vectors (T, 3) of eyes that look by yaw and pitch (T, 2) away from ahead."""
    # Yaw about +y first, then pitch: Ry(yaw) Rx(-pitch) applied to the direction straight ahead.
    turn = Rotation.from_euler("YX", np.stack([angles[:, 0], -angles[:, 1]], axis=1))
    vectors: Array = turn.as_rotvec()
    return vectors
