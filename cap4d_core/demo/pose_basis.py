"""Joints of the demo head: skinning weights, pose correctives, joint regressor.

Conventions: millimetres and the frame of `anatomy`; functions take points of the undeformed head
(N,3) and return displacements (N,3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy
from cap4d_core.demo.face_controls import JAW_JOINT, jaw_weight, lid_motion, mouth_zone
from cap4d_core.demo.fields import Points, lid_free, random_fields, smoothstep

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

JOINTS = np.array(
    [
        [0.0, -138.0, -38.0],
        [0.0, -92.0, -32.0],
        JAW_JOINT,
        anatomy.EYE_CENTRE,
        anatomy.EYE_CENTRE * [-1, 1, 1],
    ]
)


def skin_weights(pts: Points) -> Array:
    """(V,5): lower neck, head, jaw, eye +x, eye -x."""
    w = np.zeros((len(pts.p), 5))
    w[:, 2] = 0.97 * jaw_weight(pts)
    base = smoothstep(-(pts.y + 0.30 * (pts.z + 40)), 92.0, 150.0)
    w[:, 0] = base * (1 - w[:, 2])
    w[:, 1] = 1 - w[:, 0] - w[:, 2]
    for joint, side in ((3, 1.0), (4, -1.0)):
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        w[ball] = 0
        w[ball, joint] = 1
    return w


def pose_basis(pts: Points, seed: int) -> Array:
    """(36,V,3) mm, joint x row x column of the rotation of joints 0, 2, 3, 4.

    Upper lids follow the gaze: the entry [2,1] of an eye's rotation is the sine of its downward
    turn. The rest is a small smooth field, so that correctives and their constant offset at rest
    can be tested.
    """
    rng = np.random.RandomState(seed)
    calm = lid_free(pts) * pts.skin
    out = random_fields(pts.p, 36, rng, 0.22, 160.0) * calm[None, :, None]
    calm_mouth = 1 - mouth_zone(pts, 40, 30)
    out *= calm_mouth[None, :, None]
    for k, side in ((2, 1.0), (3, -1.0)):
        block = out[9 * k : 9 * k + 9]
        block *= 0.3
        block[7] = lid_motion(pts, side, 0.85, -0.5)
    return out


def joint_regressor(pts: Points) -> Array:
    """(5,V) with rows that sum to one and give JOINTS on the undeformed head."""
    out = np.zeros((5, len(pts.p)))
    still = pts.skin & (jaw_weight(pts) < 0.02)
    for j, radius in ((0, 16.0), (1, 14.0), (2, 12.0)):
        t = JOINTS[j]
        near = still & (np.abs(pts.y - t[1]) < radius) & (np.abs(pts.z - t[2]) < 70.0)
        if j == 2:  # the joint of the jaw lies between the ears
            near &= (np.abs(pts.x) > 50) & (np.abs(pts.z - t[2]) < 24.0)
        idx = np.where(near)[0]
        a = np.concatenate([pts.p[idx].T / 100.0, np.ones((1, len(idx)))])
        out[j, idx] = np.linalg.lstsq(a, np.append(t / 100.0, 1.0), rcond=None)[0]
    for j, side in ((3, 1.0), (4, -1.0)):
        ball = (~pts.skin) & (np.sign(pts.x) == side)
        ids = np.where(ball)[0]
        a = np.concatenate([pts.p[ids].T / 100.0, np.ones((1, len(ids)))])
        out[j, ids] = np.linalg.lstsq(a, np.append(JOINTS[j] / 100.0, 1.0), rcond=None)[0]
    return out
