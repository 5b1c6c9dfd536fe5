"""Conversions of the external tracker (G1 to G4)."""

from __future__ import annotations

import numpy as np
import torch

from cap4d_core.tracking.pixel3dmm import (
    eye_rotation,
    gaze_from_logits,
    limit_eye_rotation,
    select_references,
    shrink_to,
    smooth_over_time,
    uncrop_intrinsics,
)
from tests.parity.goldens import Golden, adapter


@adapter("G1_eye_rotation")
def eyes(g: Golden) -> None:
    gaze, camera, head = (
        torch.from_numpy(g.input(f"in.{name}")) for name in ("yaw_pitch", "R_cam", "r_head")
    )
    rotvec = eye_rotation(gaze, camera, head).numpy()
    # Half turns about r and -r are the same rotation: take the sign of the expected one.
    half_turn = np.linalg.norm(rotvec, axis=-1) > np.pi - 1e-4
    opposite = (rotvec * g.peek("out.eye_rotvec")).sum(-1) < 0
    rotvec[half_turn & opposite] *= -1
    g.compare("out.eye_rotvec", rotvec, atol=1e-5)
    limited = limit_eye_rotation(torch.from_numpy(g.input("in.eye_raw")))
    g.compare("out.eye_clamped", limited, atol=1e-5)
    g.compare("out.eye_smoothed", smooth_over_time(limited.numpy()), atol=1e-5)


@adapter("G2_calibration")
def calibration(g: Golden) -> None:
    results = []
    for intrinsics, case in zip(g.input("in.K"), g.input("in.cases").tolist(), strict=True):
        height, width, *box = case
        results.append(uncrop_intrinsics(intrinsics, (height, width), tuple(box)))
    g.compare("out.K", np.stack(results), atol=1e-3)


@adapter("G3_reference_selection")
def references(g: Golden) -> None:
    for found, name in list(g.match(r"out\.n(\d+)")):
        g.compare(name, select_references(int(found[1])))


@adapter("G4_gaze_decode")
def gaze(g: Golden) -> None:
    yaw, pitch = (torch.from_numpy(g.input(f"in.{n}_logits")) for n in ("yaw", "pitch"))
    g.compare("out.gaze", gaze_from_logits(yaw, pitch), atol=1e-5)
    small, factor = shrink_to(torch.from_numpy(g.input("in.img")), int(g.input("in.max")[0]))
    g.compare("out.small", small, atol=1e-5)
    g.compare("out.factor", np.array([factor]), atol=1e-5)
