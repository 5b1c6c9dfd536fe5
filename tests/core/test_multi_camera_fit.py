"""A performance filmed by several calibrated cameras becomes an avatar seen from an unused one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.avatar.fitting import fit_avatar
from cap4d_core.demo.capture import DISTANCE, PIVOT, focal_length, make_fit
from cap4d_core.demo.expressions import talking
from cap4d_core.demo.rendering import SubjectRenderer, Views
from cap4d_core.demo.subject import make_subject
from cap4d_core.diffusion.references import crop_references
from cap4d_core.evaluation.evaluate import render_view
from cap4d_core.evaluation.metrics import psnr
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_rgb, to_uint8, write_image
from cap4d_core.files.tracking import Tracking, write_fit, write_reference_list
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import pivot_camera
from cap4d_core.geometry.rotations import rodrigues
from cap4d_core.settings import PRESETS, FittingSettings, SamplingSettings
from tests.core.tracker_pictures import demo_head_folder

pytestmark = pytest.mark.slow

SEED, FRAMES, SIDE = 24, 8, 112
# (yaw, pitch) in degrees of the calibrated cameras, and of the one that only looks on.
CAMERAS = {"left": (-45, 4), "half_left": (-16, -8), "half_right": (17, 9), "right": (44, -3)}
UNSEEN = {"front": (0, 0)}


def write_capture(folder: Path, cameras: dict[str, tuple[int, int]]) -> None:
    """Pictures, mattes, fit and reference list of all frames as `cameras` see them."""
    expr, eye, turn = talking(FRAMES, 6.0, seed=5)
    rot = 0.3 * turn
    matrices = rodrigues(torch.as_tensor(rot)).numpy()
    tra = np.array([0.0, 0.0, -DISTANCE]) - np.einsum("tij,j->ti", matrices, PIVOT)
    subject = make_subject(SEED)
    single = make_fit(subject.shape, expr, eye, rot, tra, SIDE, 6.0)
    target = np.array([0.0, 0.0, DISTANCE])
    yaw, pitch = np.array(list(cameras.values()), float).T
    extr = pivot_camera(np.tile(np.eye(4), (len(cameras), 1, 1)), target, yaw, pitch)
    count = len(cameras)
    fit = Tracking(
        shape=single.shape, expr=single.expr, rot=single.rot, tra=single.tra,
        eye_rot=single.eye_rot, neck_rot=single.neck_rot,
        fx=np.repeat(single.fx, count, 0), fy=np.repeat(single.fy, count, 0),
        cx=np.repeat(single.cx, count, 0), cy=np.repeat(single.cy, count, 0),
        extr=extr.astype(np.float32), resolutions=np.repeat(single.resolutions, count, 0),
        camera_order=tuple(cameras), fps=6.0,
    )  # fmt: skip
    renderer = SubjectRenderer(subject)
    focal, centre = torch.full((FRAMES,), focal_length(SIDE)), torch.full((FRAMES,), SIDE / 2)
    for index, name in enumerate(cameras):
        camera = torch.as_tensor(fit.extr[index]).expand(FRAMES, 4, 4)
        motion = (torch.as_tensor(a) for a in (fit.expr, fit.eye_rot, fit.rot, fit.tra))
        views = Views(*motion, camera, focal, focal, centre, centre)
        seen = renderer.render(views, (SIDE, SIDE))
        for frame in range(FRAMES):
            write_image(
                folder / "images" / name / f"{frame:04d}.png", to_uint8(seen.rgb[frame].numpy())
            )
            write_image(
                folder / "bg" / name / f"{frame:04d}.png", to_uint8(seen.matte[frame].numpy())
            )
    write_fit(folder / "fit.npz", fit)
    write_reference_list(
        folder / "reference_images.json", [(name, t) for t in range(FRAMES) for name in cameras]
    )


def test_unused_camera_sees_the_avatar_of_the_others(tmp_path: Path) -> None:
    head_folder = demo_head_folder()
    sampling = SamplingSettings(resolution=96)
    for name, cameras in (("seen", CAMERAS), ("unseen", UNSEEN)):
        write_capture(tmp_path / name, cameras)
        crop_references(tmp_path / name, head_folder, tmp_path / name / "crops", sampling)
    references = read_image_set(tmp_path / "seen" / "crops")
    assert len(references) == len(CAMERAS) * FRAMES
    demo = {**PRESETS["demo"]["fitting"], "iterations": 400, "lpips_start": 400}
    head = HeadModel.load(head_folder, lower_jaw=True)
    avatar = fit_avatar([references, []], head, FittingSettings(**demo), tmp_path / "avatar")

    scores, baselines = [], []
    nearest = [r for r in references if (r.parameters.extr == references[1].parameters.extr).all()]
    for item, near in zip(read_image_set(tmp_path / "unseen" / "crops"), nearest, strict=True):
        truth = torch.tensor(read_rgb(item.image)).float() / 255
        everywhere = torch.ones(truth.shape[:2], dtype=torch.bool)
        scores.append(psnr(render_view(avatar, item.parameters, len(truth)), truth, everywhere))
        other = torch.tensor(read_rgb(near.image)).float() / 255
        baselines.append(psnr(other, truth, everywhere))
    # Same frame, camera 18 degrees away: a wrong calibration does not come near the truth.
    assert np.mean(scores) > 25, (scores, baselines)
    assert np.mean(scores) > np.mean(baselines) + 4, (scores, baselines)
    print(f"unused camera: {np.mean(scores):.2f} dB, nearest camera: {np.mean(baselines):.2f} dB")
