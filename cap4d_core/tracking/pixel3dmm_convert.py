"""Converts the output of Pixel3DMM into a fit of the head model in the released format.

Conventions: Pixel3DMM's world has OpenGL axes, its meshes are those of FLAME (5023 vertices) in
that world after its head transform. `extr` is world-to-camera in OpenCV axes; the head model's
space is that of OpenCV with y and z negated. Lengths in metres, images (height, width).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plyfile import PlyData, PlyParseError
from torch import Tensor

from cap4d_core.errors import InputFileError
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import NUM_HEAD_VERTICES
from cap4d_core.geometry.cameras import flip_head_opencv
from cap4d_core.geometry.rotations import so3_log
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.tracking.pixel3dmm import (
    eye_rotation,
    limit_eye_rotation,
    smooth_over_time,
    uncrop_intrinsics,
)
from cap4d_core.tracking.surface import align_similarity

Array = NDArray[np.float64]
Parameters = dict[str, Tensor]

_ERROR_UNIT_M = 0.01
_PRIOR = 1e-4
_NECK_PRIOR = 1e-2
_LBFGS_ROUND = 50
# The published schedule: Adam whose rate is halved on plateaus.
_LEARNING_RATE, _BETAS, _MIN_RATE = 1e-2, (0.96, 0.999), 1e-5
_PATIENCE, _WARMUP, MAX_STEPS = 100, 500, 8000
# The camera image that Pixel3DMM's normalised focal length and principal point refer to.
_NDC_SIDE = 256


@dataclass(frozen=True)
class Pixel3dmmOutput:
    """What is read of a tracked sequence of T frames.

    vertices (T, 5023, 3) in OpenGL-like world axes; camera (4, 4) world-to-camera; intrinsics
    (3, 3) in pixels of the original picture.
    """

    names: tuple[str, ...]
    vertices: NDArray[np.float32]
    camera: NDArray[np.float32]
    intrinsics: Array


def read_output(tracking: str | Path, preprocess: str | Path) -> Pixel3dmmOutput:
    """Reads `checkpoint/*`, `mesh/*.ply` and the crop box.

    Raises:
        InputFileError: a part is missing or not what it should be.
    """
    tracking, preprocess = Path(tracking), Path(preprocess)
    hint = "Run Pixel3DMM's tracking to its end."
    folder = tracking / "checkpoint"
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    if not files:
        raise InputFileError(folder, "no checkpoints", "one file per frame", hint)
    box_path = preprocess / "crop_ymin_ymax_xmin_xmax.npy"
    if not box_path.is_file():
        raise InputFileError(box_path, "nothing there", "the crop of the preprocessing", hint)
    try:
        edges = [int(v) for v in np.load(box_path, allow_pickle=False).reshape(4)]
    except ValueError as error:
        raise InputFileError(box_path, f"no four numbers ({error})", "the crop box") from None
    box = (edges[2], edges[0], edges[3], edges[1])
    vertices = []
    first: dict[str, Any] = {}
    for path in files:
        frame = _read_frame(path)
        first = first or frame
        mesh = _read_mesh(tracking / "mesh" / f"{path.stem}.ply")
        rotation = _array(frame, path, "flame", "R_rotation_matrix", (3, 3))
        shift = _array(frame, path, "flame", "t", (3,))
        vertices.append(mesh @ rotation.T + shift)
    path = files[0]
    camera = np.eye(4)
    flip = np.diag([1.0, -1.0, -1.0])
    camera[:3, :3] = flip @ _array(first, path, "camera", "R_base_0", (3, 3))
    camera[:3, 3] = flip @ _array(first, path, "camera", "t_base_0", (3,))
    center = (_array(first, path, "camera", "pp", (2,)) + 1.0) * (_NDC_SIDE / 2 + 0.5)
    focal = float(_array(first, path, "camera", "fl", (1,))[0]) * _NDC_SIDE
    size = tuple(int(v) for v in np.asarray(first["img_size"]).reshape(2))
    matrix = np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1]])
    return Pixel3dmmOutput(
        tuple(p.stem for p in files),
        np.stack(vertices).astype(np.float32),
        camera.astype(np.float32),
        uncrop_intrinsics(matrix, (size[0], size[1]), box),
    )


def _read_frame(path: Path) -> dict[str, Any]:
    """A checkpoint: tensors and numpy arrays only, nothing else is unpickled."""
    reconstruct = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, reconstruct, *_DTYPE_CLASSES]
    # Files written with numpy 1 name the function's module differently.
    allowed.append((reconstruct, "numpy.core.multiarray._reconstruct"))
    allowed.append((reconstruct, "numpy._core.multiarray._reconstruct"))
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputFileError(
            path, f"no readable checkpoint ({detail})", "arrays written by Pixel3DMM"
        ) from None
    if not isinstance(content, dict) or "img_size" not in content:
        raise InputFileError(path, "no frame of Pixel3DMM", "flame, camera and img_size")
    return content


_DTYPE_CLASSES = [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "f2", "u1", "?")]


def _array(
    frame: dict[str, Any], path: Path, group: str, name: str, shape: tuple[int, ...]
) -> Array:
    try:
        values = np.asarray(frame[group][name], np.float64).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputFileError(
            path, f"no usable '{group}.{name}' ({error!r})", f"an array of shape (1, {shape})"
        ) from None
    if not np.isfinite(values).all():
        raise InputFileError(path, f"'{group}.{name}' with NaN", "finite numbers")
    return values


def _read_mesh(path: Path) -> Array:
    """Vertices in file order; merging or dropping any would break the correspondence."""
    if not path.is_file():
        raise InputFileError(path, "nothing there", "the tracked mesh of a frame")
    try:
        vertex = PlyData.read(str(path))["vertex"]
        points = np.stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"], axis=-1)
    except (PlyParseError, KeyError, ValueError) as error:
        raise InputFileError(path, f"no readable mesh ({error})", "a PLY file") from None
    if len(points) != NUM_HEAD_VERTICES:
        raise InputFileError(
            path, f"{len(points)} vertices", f"{NUM_HEAD_VERTICES}, the vertices of FLAME"
        )
    return points


def zero_parameters(model: HeadModel, frames: int) -> Parameters:
    """Start of the published fit."""
    sizes = {"shape": (model.num_shape,), "expr": (frames, model.num_expr)}
    sizes |= {name: (frames, 3) for name in ("rot", "tra", "eye_rot", "neck_rot")}
    return {name: torch.zeros(size) for name, size in sizes.items()}


def aligned_parameters(model: HeadModel, targets: Tensor, weights: Tensor) -> Parameters:
    """Start with head poses from a rigid alignment of the mean head to every target.

    From zero, the head pose has to travel half a turn, during which the neck rotation runs away.
    """
    start = zero_parameters(model, len(targets))
    with torch.no_grad():
        rest = _vertices(model, {k: v[:1] if k != "shape" else v for k, v in start.items()})[0]
    mean_head = flip_head_opencv(rest).double().numpy()
    share = weights.double().numpy()
    for t, target in enumerate(targets):
        goal = flip_head_opencv(target).double().numpy()
        _, rotation, _ = align_similarity(mean_head, goal, share)
        shift = (share @ goal - rotation @ (share @ mean_head)) / share.sum()
        start["rot"][t] = so3_log(torch.from_numpy(rotation)).float()
        start["tra"][t] = torch.from_numpy(shift).float()
    return start


def fit_vertices(
    model: HeadModel,
    targets: Tensor,
    weights: Tensor,
    *,
    published: bool = False,
    max_steps: int = MAX_STEPS,
    observe: Callable[[int, Parameters], None] | None = None,
    callback: ProgressCallback | None = None,
) -> tuple[Parameters, Tensor]:
    """Finds head-model parameters whose vertices match tracked meshes.

    Args:
        model: head model without mouth parts.
        targets: (T, 5023, 3) vertices in OpenCV-like axes of the tracker's world.
        weights: (5023,) importance of the vertices.
        published: start from zero, as the released converter does; else start from a rigid
            alignment and hold back the rotation of the lower neck, which nothing downstream uses.
        max_steps: upper limit.
        observe: called with the step and the parameters before every step.
        callback: called with the progress.

    Returns:
        The parameters and the mean vertex error per frame in metres.
    """
    weights = weights / weights.sum()
    if published:
        start = zero_parameters(model, len(targets))
    else:
        start = aligned_parameters(model, targets, weights)
    parameters = {name: value.requires_grad_() for name, value in start.items()}

    def loss_now() -> Tensor:
        error = (_vertices(model, parameters) - targets) / _ERROR_UNIT_M
        loss = (error.square().sum(-1) * weights).sum(-1).mean()
        loss = loss + _PRIOR * parameters["shape"].square().sum()
        loss = loss + _PRIOR * parameters["expr"].square().sum(-1).mean()
        if not published:
            loss = loss + _NECK_PRIOR * parameters["neck_rot"].square().sum(-1).mean()
        return loss

    if published:
        _descend(parameters, loss_now, max_steps, observe, callback)
    else:
        _minimise(parameters, loss_now, max_steps, callback)
    result = {name: value.detach() for name, value in parameters.items()}
    with torch.no_grad():
        distance = (_vertices(model, result) - targets).norm(dim=-1)
    return result, distance.mean(-1)


def _descend(
    parameters: Parameters,
    loss_now: Callable[[], Tensor],
    max_steps: int,
    observe: Callable[[int, Parameters], None] | None,
    callback: ProgressCallback | None,
) -> None:
    """The published optimisation."""
    optimizer = torch.optim.Adam(
        list(parameters.values()), lr=_LEARNING_RATE, betas=_BETAS, eps=1e-8
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=_PATIENCE, threshold=1e-4
    )
    for step in range(max_steps):
        if step < _WARMUP:
            with torch.no_grad():
                for name in ("shape", "expr", "eye_rot"):
                    parameters[name].zero_()
        if observe is not None:
            observe(step, parameters)
        loss = loss_now()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > _WARMUP:
            scheduler.step(loss.item())
        if optimizer.param_groups[0]["lr"] < _MIN_RATE:
            break
        if callback is not None:
            callback(Progress(step + 1, max_steps, "step", {"loss": float(loss)}))


def _minimise(
    parameters: Parameters,
    loss_now: Callable[[], Tensor],
    max_steps: int,
    callback: ProgressCallback | None,
) -> None:
    """Quasi-Newton steps until the loss stands still: fewer and closer than gradient descent."""
    optimizer = torch.optim.LBFGS(
        list(parameters.values()),
        max_iter=_LBFGS_ROUND,
        history_size=60,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_now()
        loss.backward()
        return loss

    before = float("inf")
    for step in range(0, max_steps, _LBFGS_ROUND):
        loss = float(optimizer.step(closure).detach())
        if callback is not None:
            callback(Progress(step + _LBFGS_ROUND, max_steps, "step", {"loss": loss}))
        if before - loss < 1e-4 * loss:
            break
        before = loss


def _vertices(model: HeadModel, parameters: Parameters) -> Tensor:
    output = model(
        parameters["shape"],
        parameters["expr"],
        parameters["rot"],
        parameters["tra"],
        parameters["eye_rot"],
        neck_rot=parameters["neck_rot"],
    )
    return flip_head_opencv(output.vertices)


def to_tracking(
    output: Pixel3dmmOutput,
    parameters: Parameters,
    gaze: NDArray[np.floating[Any]] | None,
    size: tuple[int, int],
    fps: float | None,
) -> Tracking:
    """The fit in the released format.

    Args:
        output: what Pixel3DMM wrote.
        parameters: of `fit_vertices`.
        gaze: (T, 2) yaw and pitch in radians; None = not known, eyes straight ahead.
        size: (height, width) of the original pictures.
        fps: frame rate of videos (gaze is smoothed), None for photos.
    """
    frames = len(output.vertices)
    eye_rot: NDArray[Any] = np.zeros((frames, 3), np.float32)
    if gaze is not None:
        # Gaze is given in the tracker's own camera axes (y up).
        own_axes = np.diag([1.0, -1.0, -1.0]).astype(np.float32) @ output.camera[:3, :3]
        camera = torch.from_numpy(own_axes).expand(frames, 3, 3)
        directions = torch.from_numpy(np.asarray(gaze, np.float32))
        turned = eye_rotation(directions, camera, parameters["rot"])
        eye_rot = limit_eye_rotation(turned).numpy()
        if fps is not None:
            eye_rot = smooth_over_time(eye_rot)
    intrinsics = output.intrinsics.astype(np.float32)
    values = {name: parameters[name].numpy() for name in ("shape", "expr", "rot", "tra")}
    return Tracking(
        **values,
        eye_rot=eye_rot,
        neck_rot=parameters["neck_rot"].numpy(),
        fx=intrinsics[None, None, 0, 0],
        fy=intrinsics[None, None, 1, 1],
        cx=intrinsics[None, None, 0, 2],
        cy=intrinsics[None, None, 1, 2],
        extr=output.camera[None],
        resolutions=np.array([size], np.int64),
        camera_order=("cam0",),
        fps=fps,
    )
