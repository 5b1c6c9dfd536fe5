"""Writes the demo: head model, a subject's photos and fit, held-out truth, a driving sequence.

Conventions: see `cap4d_core.files.tracking`. One still camera looks at a head that turns. The light
turns with the head (see `subject`), so a head turned by R before a still camera is the same picture
as a camera that goes round a still head, and the renderings of all directions agree on one head-
fixed appearance.

Directions are (yaw, pitch) in degrees of the head: positive yaw turns the face to its left (+x),
positive pitch lowers it. References cover yaw +-55, pitch +-20 but for a few holes; held-out views
look from inside the holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.demo import expressions
from cap4d_core.demo.head import build_demo_head, head_vertex_ids, write_demo_head
from cap4d_core.demo.rendering import Rendering, SubjectRenderer, Views
from cap4d_core.demo.subject import make_subject
from cap4d_core.files.image_set import ViewParameters, write_view_parameters
from cap4d_core.files.images import to_uint8, write_image
from cap4d_core.files.tracking import (
    Tracking,
    Trajectory,
    write_fit,
    write_reference_list,
    write_trajectory,
)
from cap4d_core.geometry.cameras import pivot_camera, static_extrinsics
from cap4d_core.geometry.crops import crop_box_from_points, crop_intrinsics
from cap4d_core.geometry.rotations import rodrigues
from cap4d_core.progress import Progress, ProgressCallback

__all__ = [
    "contact_sheet",
    "view_directions",
    "write_demo_driving",
    "write_demo_head",
    "write_demo_held_out",
    "write_demo_subject",
]

Array = NDArray[np.float64]

MAX_YAW, MAX_PITCH = 55.0, 20.0
# Centres of the directions that no reference looks from, and how far references keep away
# (degrees).
HOLES = ((-36.0, 8.0), (-12.0, -11.0), (13.0, 11.0), (37.0, -8.0))
HOLE_RADIUS = 12.0
HELD_OUT_SPREAD = 1.2
DISTANCE = 1.1
# A head, cropped as the pipeline crops it, is about this tall (m), and fills this share of a frame.
_CROP_SIDE = 0.302
_CROP_SHARE = 0.8
_PIVOT = np.array([0.0, 0.008, -0.030])


def _direction(yaw: Array, pitch: Array) -> Array:
    """Where a camera straight ahead stands in the frame of a head turned by yaw and pitch."""
    y, p = np.radians(yaw), np.radians(pitch)
    return np.stack([-np.sin(y), np.cos(y) * np.sin(p), np.cos(y) * np.cos(p)], -1)


def _angle(a: Array, b: Array) -> Array:
    """Degrees between unit vectors."""
    out: Array = np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))
    return out


def view_directions(fit: Tracking) -> Array:
    """Directions (T,3) towards camera 0 in the frame of each head."""
    extr = np.asarray(fit.extr[0], dtype=np.float64)
    centre = -(extr[:3, :3].T @ extr[:3, 3]) * np.array([1.0, -1.0, -1.0])
    turn = rodrigues(torch.as_tensor(np.asarray(fit.rot, dtype=np.float64))).numpy()
    d = np.einsum("tij,ti->tj", turn, centre - np.asarray(fit.tra, dtype=np.float64))
    return d / np.linalg.norm(d, axis=1, keepdims=True)


def _reference_directions(num: int) -> tuple[Array, Array]:
    """A low-discrepancy cover of all directions but the holes; the first is frontal."""
    holes = _direction(*np.array(HOLES).T)
    yaw, pitch = [0.0], [0.0]
    k = 0
    while len(yaw) < num:
        k += 1
        u, v = (0.5 + 0.7548776662466927 * k) % 1.0, (0.5 + 0.5698402909980532 * k) % 1.0
        y, p = (2 * u - 1) * MAX_YAW, (2 * v - 1) * MAX_PITCH
        d = _direction(np.array([y]), np.array([p]))
        if _angle(d, holes).min() > HOLE_RADIUS:
            yaw.append(y)
            pitch.append(p)
    return np.array(yaw), np.array(pitch)


def _pose(yaw: Array, pitch: Array, roll: Array, shift: Array) -> tuple[Array, Array]:
    """Rotation vectors and translations of heads turned about their middle."""
    r = [
        _matrix(y, p, q)
        for y, p, q in zip(np.radians(yaw), np.radians(pitch), np.radians(roll), strict=True)
    ]
    turn = np.array(r)
    # Rotation vectors whose `rodrigues` is the wanted matrix; angles stay far from pi.
    angle = np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1))
    axis = np.stack(
        [
            turn[:, 2, 1] - turn[:, 1, 2],
            turn[:, 0, 2] - turn[:, 2, 0],
            turn[:, 1, 0] - turn[:, 0, 1],
        ],
        -1,
    )
    scale = np.where(angle > 1e-6, angle / np.maximum(2 * np.sin(angle), 1e-9), 0.5)
    rot = axis * scale[:, None]
    tra = np.array([0.0, 0.0, -DISTANCE]) + shift - np.einsum("tij,j->ti", turn, _PIVOT)
    return rot, tra


def _matrix(yaw: float, pitch: float, roll: float) -> Array:
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    rz = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    out: Array = ry @ rx @ rz
    return out


def _focal(resolution: int) -> float:
    return _CROP_SHARE * resolution * DISTANCE / _CROP_SIDE


def _make_fit(
    shape: Array,
    expr: Array,
    eye: Array,
    rot: Array,
    tra: Array,
    resolution: int,
    fps: float | None,
) -> Tracking:
    f = np.full((1, 1), _focal(resolution), np.float32)
    c = np.full((1, 1), resolution / 2, np.float32)
    return Tracking(
        shape=shape.astype(np.float32),
        expr=expr.astype(np.float32),
        rot=rot.astype(np.float32),
        tra=tra.astype(np.float32),
        eye_rot=eye.astype(np.float32),
        neck_rot=np.zeros((len(expr), 3), np.float32),
        fx=f,
        fy=f,
        cx=c,
        cy=c,
        extr=np.eye(4, dtype=np.float32)[None],
        resolutions=np.array([[resolution, resolution]]),
        camera_order=("cam0",),
        fps=fps,
    )


def reference_fit(seed: int, num_references: int = 64, resolution: int = 160) -> Tracking:
    """The exact fit of a demo subject's reference photos."""
    rng = np.random.default_rng([seed, 11])
    yaw, pitch = _reference_directions(num_references)
    expr, eye = expressions.sample_expressions(num_references, rng)
    # Every third photo is neutral in the mouth: a face is seen at rest from many sides.
    calm = np.arange(num_references) % 3 == 0
    expr[calm, : expressions.index_of("blink_left")] *= 0.15
    expr[0], eye[0] = 0.0, 0.0
    roll = rng.uniform(-4, 4, num_references) * (np.arange(num_references) > 0)
    shift = rng.uniform(-1, 1, (num_references, 3)) * np.array([0.006, 0.006, 0.02])
    rot, tra = _pose(yaw, pitch, roll, shift)
    return _make_fit(make_subject(seed).shape, expr, eye, rot, tra, resolution, None)


def held_out_fit(seed: int, num_views: int = 16, resolution: int = 160) -> Tracking:
    """The exact fit of the held-out views: directions in the holes, own expressions."""
    rng = np.random.default_rng([seed, 12])
    holes = np.array(HOLES)[np.arange(num_views) % len(HOLES)]
    jitter = rng.uniform(-1, 1, (num_views, 2)) * HELD_OUT_SPREAD
    expr, eye = expressions.sample_expressions(num_views, rng)
    yaw, pitch = (holes + jitter).T
    rot, tra = _pose(yaw, pitch, np.zeros(num_views), np.zeros((num_views, 3)))
    return _make_fit(make_subject(seed).shape, expr, eye, rot, tra, resolution, None)


def _render_fit(
    renderer: SubjectRenderer, fit: Tracking, intrinsics: Array, size: int, supersample: int
) -> Rendering:
    """Pictures of every frame with intrinsics (T,4) fx, fy, cx, cy."""

    def t(a: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(a), dtype=torch.float32)

    k = t(intrinsics)
    views = Views(
        expr=t(fit.expr),
        eye_rot=t(fit.eye_rot),
        rot=t(fit.rot),
        tra=t(fit.tra),
        extr=t(fit.extr[:1]).expand(fit.num_frames, 4, 4),
        fx=k[:, 0],
        fy=k[:, 1],
        cx=k[:, 2],
        cy=k[:, 3],
    )
    return renderer.render(views, (size, size), supersample=supersample)


def write_demo_subject(
    folder: str | Path,
    seed: int,
    *,
    num_references: int = 64,
    resolution: int = 160,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> Tracking:
    """Write a demo subject's tracked photos.

    `images/cam0/%08d.png`, mattes `bg/cam0/%04d.png` (255 = foreground), `fit.npz` (exact), and
    `reference_images.json` naming every frame. Edge pixels of the photos hold the subject's own
    colour (not mixed with the white background), so compositing with the matte is exact.

    Args:
        folder: where to; created.
        seed: subject number.
        num_references: photos.
        resolution: side of the square photos in pixels; the head's crop is about 0.8 of it.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in photos.

    Returns:
        The fit.
    """
    root = Path(folder)
    fit = reference_fit(seed, num_references, resolution)
    renderer = SubjectRenderer(make_subject(seed), device)
    k = np.tile([fit.fx[0, 0], fit.fy[0, 0], fit.cx[0, 0], fit.cy[0, 0]], (num_references, 1))
    out = _render_fit(renderer, fit, k, resolution, supersample)
    rgb, matte = out.rgb.cpu().numpy(), out.matte.cpu().numpy()
    for i in range(num_references):
        write_image(root / "images" / "cam0" / f"{i:08d}.png", to_uint8(rgb[i]))
        write_image(root / "bg" / "cam0" / f"{i:04d}.png", to_uint8(matte[i]))
        if callback is not None:
            callback(Progress(i + 1, num_references, "photo"))
    write_fit(root / "fit.npz", fit)
    write_reference_list(
        root / "reference_images.json", [("cam0", i) for i in range(num_references)]
    )
    return fit


def write_demo_held_out(
    folder: str | Path,
    seed: int,
    *,
    num_views: int = 16,
    resolution: int = 160,
    crop_size: int = 128,
    supersample: int = 3,
    device: str = "cpu",
    callback: ProgressCallback | None = None,
) -> Tracking:
    """Write unseen views of a demo subject as an image set with mattes.

    `images/%05d.png` (square crops over white), `mattes/%05d.png`, `flame/%05d.npz`. Directions are
    at least 10 degrees away from every reference of `write_demo_subject`, expressions are others.
    Crops are rendered with the crop's own camera, not resampled.

    Args:
        folder: where to; created.
        seed: subject number.
        num_views: pictures.
        resolution: side of the uncropped photo the parameters refer to.
        crop_size: side of the pictures.
        supersample: samples per pixel and axis.
        device: where to render.
        callback: progress in pictures.

    Returns:
        The fit of all views.
    """
    root = Path(folder)
    fit = held_out_fit(seed, num_views, resolution)
    renderer = SubjectRenderer(make_subject(seed), device)
    boxes = crop_boxes(renderer, fit)
    fx, fy, cx, cy = (float(v[0, 0]) for v in (fit.fx, fit.fy, fit.cx, fit.cy))
    k = np.array([crop_intrinsics(fx, fy, cx, cy, box, crop_size) for box in boxes])
    out = _render_fit(renderer, fit, k, crop_size, supersample)
    over_white = out.rgb * out.matte[..., None] + 1 - out.matte[..., None]
    rgb, matte = over_white.cpu().numpy(), out.matte.cpu().numpy()
    for i, box in enumerate(boxes):
        write_image(root / "images" / f"{i:05d}.png", to_uint8(rgb[i]))
        write_image(root / "mattes" / f"{i:05d}.png", to_uint8(matte[i]))
        view = ViewParameters(
            shape=fit.shape,
            expr=fit.expr[i],
            rot=fit.rot[i],
            tra=fit.tra[i],
            eye_rot=fit.eye_rot[i],
            fx=fx,
            fy=fy,
            cx=cx,
            cy=cy,
            extr=fit.extr[0],
            resolution=(resolution, resolution),
            crop_box=box,
        )
        write_view_parameters(root / "flame" / f"{i:05d}.npz", view)
        if callback is not None:
            callback(Progress(i + 1, num_views, "picture"))
    return fit


def crop_boxes(renderer: SubjectRenderer, fit: Tracking) -> list[tuple[int, int, int, int]]:
    """The pipeline's crop box of every frame (from the projected head vertices)."""

    def t(a: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(a), dtype=torch.float32, device=renderer.device)

    posed = renderer.head_model(
        renderer.shape, t(fit.expr), t(fit.rot), t(fit.tra), eye_rot=t(fit.eye_rot)
    ).vertices
    ids = head_vertex_ids(build_demo_head())
    p = posed[:, ids].cpu().numpy().astype(np.float64) * np.array([1.0, -1.0, -1.0])
    p = p @ fit.extr[0, :3, :3].T + fit.extr[0, :3, 3]
    x = p[..., 0] / p[..., 2] * fit.fx[0, 0] + fit.cx[0, 0]
    y = p[..., 1] / p[..., 2] * fit.fy[0, 0] + fit.cy[0, 0]
    return [crop_box_from_points(xy) for xy in np.stack([x, y], -1)]


def write_demo_driving(
    folder: str | Path,
    *,
    num_frames: int = 48,
    fps: float = 24.0,
    resolution: int = 160,
    seed: int = 3,
) -> Tracking:
    """Write a driving sequence: somebody talks, blinks, looks around and turns the head.

    `fit.npz` (another person's coefficients: shape zero) and `orbit.npz`, a camera path around the
    head.

    Args:
        folder: where to; created.
        num_frames: length.
        fps: frames per second.
        resolution: side of the square picture.
        seed: of the performance.

    Returns:
        The fit.
    """
    root = Path(folder)
    expr, eye, rot = expressions.talking(num_frames, fps, seed)
    turn = rodrigues(torch.as_tensor(rot)).numpy()
    tra = np.array([0.0, 0.0, -DISTANCE]) - np.einsum("tij,j->ti", turn, _PIVOT)
    fit = _make_fit(np.zeros(150), expr, eye, rot, tra, resolution, fps)
    write_fit(root / "fit.npz", fit)
    phase = 2 * np.pi * np.arange(num_frames) / num_frames
    target = np.array([0.0, 0.0, DISTANCE])
    yaw, pitch = 38.0 * np.sin(phase), 11.0 * (1 - np.cos(phase)) / 2 * np.sin(phase + 0.6)
    extr = pivot_camera(static_extrinsics(fit.extr[0], num_frames), target, yaw, pitch)
    f = np.full(num_frames, _focal(resolution))
    c = np.full(num_frames, resolution / 2)
    write_trajectory(
        root / "orbit.npz",
        Trajectory(extr=extr, fx=f, fy=f, cx=c, cy=c, resolution=(resolution, resolution), fps=fps),
    )
    return fit


def contact_sheet(
    seeds: Sequence[int], size: int = 160, columns: int = 8, device: str = "cpu"
) -> NDArray[np.uint8]:
    """One picture of each subject, with a direction and an expression of their own, in rows."""
    tiles = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 13])
        expr, eye = expressions.sample_expressions(1, rng)
        expr[:, expressions.BLINK] = 0.0
        yaw, pitch = rng.uniform(-32, 32, 1), rng.uniform(-7, 7, 1)
        rot, tra = _pose(yaw, pitch, np.zeros(1), np.zeros((1, 3)))
        fit = _make_fit(make_subject(seed).shape, 0.6 * expr, 0.5 * eye, rot, tra, size, None)
        k = np.array([[_focal(size), _focal(size), size / 2, size / 2]])
        out = _render_fit(SubjectRenderer(make_subject(seed), device), fit, k, size, 3)
        tiles.append(
            to_uint8((out.rgb * out.matte[..., None] + 1 - out.matte[..., None])[0].cpu().numpy())
        )
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)
