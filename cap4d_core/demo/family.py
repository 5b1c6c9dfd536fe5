"""Demo subjects as training data: many people, random views, exact parameters, batched on a device.

A trainer makes people with `make_subjects` (in worker processes, before or beside CUDA), puts each
on a device with `SubjectRenderer(subject, device)`, and draws pictures with `render_views`:

    with subject_pool(16) as pool:
        for subject in make_subjects(range(1000, 1064), texture_size=256, executor=pool):
            renderer = SubjectRenderer(subject, "cuda")
            batch = render_views(renderer, 16, np.random.default_rng([7, subject.traits.seed]))

Conventions: parameters as in `cap4d_core.files.image_set.ViewParameters`, with a leading axis of N
views. One still camera looks at a head that turns. The light is fixed to the head, so any split of
the same relative motion into `rot`, `tra` and `extr` is the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.child_process import end_with_parent
from cap4d_core.demo import expressions
from cap4d_core.demo.capture import MAX_PITCH, MAX_YAW, head_poses, make_fit
from cap4d_core.demo.crop_cameras import crop_boxes, cropped
from cap4d_core.demo.head import build_demo_head
from cap4d_core.demo.rendering import SubjectRenderer, Views
from cap4d_core.demo.subject import Subject, make_subject
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import Tracking

Array = NDArray[np.float64]

MAX_ROLL = 4.0
# A third of all views is calm, as among the references.
CALM_SHARE = 1 / 3


@dataclass(frozen=True)
class FamilyViews:
    """N pictures of one subject with their exact parameters, all on one device.

    rgb (N,S,S,3) uint8 over white; matte (N,S,S) uint8, 255 = subject; shape (150,), expr (N,65),
    rot, tra, eye_rot (N,3) float32; fx, fy, cx, cy (N,) float32, pixels of the uncropped picture;
    extr (N,4,4) float32 world-to-camera; resolution (N,2) int64 height, width of the uncropped
    picture; crop_box (N,4) int64 x0, y0, x1, y1 in its pixels.
    """

    rgb: Tensor
    matte: Tensor
    shape: Tensor
    expr: Tensor
    rot: Tensor
    tra: Tensor
    eye_rot: Tensor
    fx: Tensor
    fy: Tensor
    cx: Tensor
    cy: Tensor
    extr: Tensor
    resolution: Tensor
    crop_box: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.rgb)

    def to(self, device: str | torch.device) -> FamilyViews:
        """The same on another device."""
        return FamilyViews(*(getattr(self, f.name).to(device) for f in fields(self)))

    def parameters(self) -> list[ViewParameters]:
        """One `ViewParameters` per view, on the host."""
        host = self.to("cpu")
        return [
            ViewParameters(
                shape=host.shape.numpy(),
                expr=host.expr[i].numpy(),
                rot=host.rot[i].numpy(),
                tra=host.tra[i].numpy(),
                eye_rot=host.eye_rot[i].numpy(),
                fx=float(host.fx[i]),
                fy=float(host.fy[i]),
                cx=float(host.cx[i]),
                cy=float(host.cy[i]),
                extr=host.extr[i].numpy(),
                resolution=(int(host.resolution[i, 0]), int(host.resolution[i, 1])),
                crop_box=tuple(host.crop_box[i].tolist()),
            )
            for i in range(len(self))
        ]


def make_subjects(
    seeds: Iterable[int], *, texture_size: int = 512, executor: Executor | None = None
) -> Iterator[Subject]:
    """People in the order of their numbers.

    Args:
        seeds: subject numbers.
        texture_size: side of the painted atlas; 256 is enough for pictures of 128 pixels.
        executor: where to make them, e.g. `subject_pool(16)`; None = here, one by one.
    """
    numbers = list(seeds)
    if executor is None:
        for seed in numbers:
            yield make_subject(seed, texture_size)
    else:
        yield from executor.map(make_subject, numbers, [texture_size] * len(numbers), chunksize=1)


def subject_pool(processes: int) -> ProcessPoolExecutor:
    """Worker processes for `make_subjects`.

    Each is a fresh interpreter with one thread: safe beside CUDA and beside the threads of torch,
    which a forked child must not touch. It builds the head model once, when it starts.

    Args:
        processes: their number.
    """
    return ProcessPoolExecutor(processes, get_context("spawn"), _start_worker)


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    build_demo_head()


def sample_fit(
    shape: Array, num_views: int, rng: np.random.Generator, resolution: int = 160
) -> Tracking:
    """Random poses and expressions in the range of the demo's references and held-out views.

    Args:
        shape: (150,) identity.
        num_views: N.
        rng: where draws come from.
        resolution: side of the uncropped picture in pixels; the crop is about 0.8 of it.
    """
    yaw = rng.uniform(-MAX_YAW, MAX_YAW, num_views)
    pitch = rng.uniform(-MAX_PITCH, MAX_PITCH, num_views)
    roll = rng.uniform(-MAX_ROLL, MAX_ROLL, num_views)
    shift = rng.uniform(-1, 1, (num_views, 3)) * np.array([0.006, 0.006, 0.02])
    expr, eye = expressions.sample_expressions(num_views, rng)
    calm = rng.uniform(size=num_views) < CALM_SHARE
    expr[calm, : expressions.index_of("blink_left")] *= 0.15
    rot, tra = head_poses(yaw, pitch, roll, shift)
    return make_fit(shape, expr, eye, rot, tra, resolution, None)


def views_of(fit: Tracking) -> Views:
    """The frames of a tracking as seen by its camera 0."""

    def t(a: NDArray[np.generic]) -> Tensor:
        return torch.as_tensor(np.asarray(a, np.float32))

    n = fit.num_frames
    fx, fy, cx, cy = (t(v[0]).expand(n) for v in (fit.fx, fit.fy, fit.cx, fit.cy))
    return Views(
        expr=t(fit.expr),
        eye_rot=t(fit.eye_rot),
        rot=t(fit.rot),
        tra=t(fit.tra),
        extr=t(fit.extr[:1]).expand(n, 4, 4),
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
    )


def render_fit(
    renderer: SubjectRenderer,
    fit: Tracking,
    *,
    size: int = 128,
    supersample: int = 2,
    batch: int = 64,
) -> FamilyViews:
    """The pipeline's head crops of every frame of a fit.

    Crops are rendered with their own cameras, not resampled.

    Args:
        renderer: of the subject.
        fit: poses and one still camera.
        size: side of the pictures.
        supersample: samples per pixel and axis.
        batch: pictures held in memory at once.
    """
    device = renderer.device
    views = views_of(fit).part(0, fit.num_frames, device)
    boxes = crop_boxes(renderer, views)
    out = renderer.render(
        cropped(views, boxes, size), (size, size), supersample=supersample, batch=batch
    )
    matte = out.matte[..., None]
    over_white = out.rgb * matte + 1 - matte
    height, width = (int(v) for v in fit.resolutions[0])
    return FamilyViews(
        rgb=_to_uint8(over_white),
        matte=_to_uint8(out.matte),
        shape=renderer.shape,
        expr=views.expr,
        rot=views.rot,
        tra=views.tra,
        eye_rot=views.eye_rot,
        fx=views.fx,
        fy=views.fy,
        cx=views.cx,
        cy=views.cy,
        extr=views.extr,
        resolution=torch.tensor([[height, width]], device=device).expand(len(boxes), 2),
        crop_box=boxes,
    )


def render_views(
    renderer: SubjectRenderer,
    num_views: int,
    rng: np.random.Generator,
    *,
    size: int = 128,
    resolution: int = 160,
    supersample: int = 2,
    batch: int = 64,
) -> FamilyViews:
    """Random views of one subject.

    Args:
        renderer: of the subject, on the device where the pictures are wanted.
        num_views: N.
        rng: draws poses and expressions; the same state gives the same views.
        size: side of the pictures.
        resolution: side of the uncropped picture the parameters refer to.
        supersample: samples per pixel and axis.
        batch: pictures held in memory at once.
    """
    fit = sample_fit(renderer.subject.shape, num_views, rng, resolution)
    return render_fit(renderer, fit, size=size, supersample=supersample, batch=batch)


def _to_uint8(image: Tensor) -> Tensor:
    """As `cap4d_core.files.images.to_uint8`."""
    return (image.clamp(0, 1) * 255.0).round().to(torch.uint8)
