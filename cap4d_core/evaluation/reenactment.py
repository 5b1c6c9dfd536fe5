"""Cross-reenactment: an avatar driven by another person's performance (rule evaluate_reenactment).

There is no truth to compare pixels with. So it is measured whether the avatar still is its person
(identity similarity to the references), does what the driver does (`following`), and is steady over
time. Of people of the demo world the truth is known after all: the performance is rendered, and
everything of `evaluate` is measured, too.

    {output}/metrics.json        frames, summary, temporal, and why a figure is absent
    {output}/frames.csv          figures of every frame
    {output}/side_by_side.png    reference and avatar
    {output}/truth/              what `evaluate_avatar` writes, where there is a truth
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.avatar.renderer import Backend
from cap4d_core.diffusion.frames import with_crop_boxes
from cap4d_core.errors import InputFileError
from cap4d_core.evaluation.evaluate import evaluate_avatar
from cap4d_core.evaluation.faces import FaceReader
from cap4d_core.evaluation.following import FollowingError, following_error
from cap4d_core.evaluation.identity import IdentityEncoder, mean_embedding
from cap4d_core.evaluation.rendering import render_view
from cap4d_core.evaluation.side_by_side import Comparison, write_side_by_side
from cap4d_core.evaluation.stability import films_stability
from cap4d_core.evaluation.tables import write_frames_csv, write_frames_plot
from cap4d_core.files.basic import write_json
from cap4d_core.files.image_set import ImageSetItem, ViewParameters, read_image_set
from cap4d_core.files.images import read_rgb, to_uint8
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.tracking.correspondence import load_or_compute
from cap4d_core.tracking.landmark_model import LandmarkModel
from cap4d_core.tracking.landmarks import FaceLandmarks

if TYPE_CHECKING:
    from cap4d_core.avatar.gaussians import GaussianAvatar

logger = logging.getLogger(__name__)

MAX_PICTURES, COLUMNS = 11, 4
# References that an identity is averaged over.
MAX_REFERENCES = 16
NO_FRAMES = "fewer than 3 frames in which a face was found"


def evaluate_reenactment(
    avatar: GaussianAvatar,
    head_model: HeadModel,
    driving: Tracking,
    references: str | Path,
    output_dir: str | Path,
    callback: ProgressCallback | None = None,
    *,
    landmarks_file: str | Path,
    truth: str | Path | None = None,
    max_frames: int = 100,
    identity: IdentityEncoder | None = None,
    identity_absent: str = "no recognition network was given",
    mask_dilation: int = 5,
    lpips_weights: str | Path | None = None,
    renderer: Backend = "auto",
) -> dict[str, Any]:
    """Drives an avatar and measures the result; see the module for the files written.

    Args:
        avatar: the fitted avatar.
        head_model: loaded from a folder; moved to the device of the avatar.
        driving: performance of another person; seen by its first camera.
        references: image set of the avatar's person; its pictures also say how large to render.
        output_dir: created.
        callback: called after every frame.
        landmarks_file: where the landmarks are on the head model: a cache, made when missing.
        truth: image set of true pictures of the performance (`demo_truth`).
        max_frames: so many frames from the beginning.
        identity: recognition network; None = leave it out, for the reason `identity_absent`.
        identity_absent: goes into the results.
        mask_dilation: see `evaluate_avatar`; for the truth.
        lpips_weights: likewise.
        renderer: backend of the splat renderer.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: unusable files.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    assert head_model.folder is not None  # models of the workflow come from a folder
    device = next(avatar.parameters()).device
    head_model.to(device)
    reference_items = read_image_set(references)
    size = read_rgb(reference_items[0].image).shape[0]
    views = driven_views(head_model, avatar.shape.cpu().numpy(), driving, max_frames)
    reader = FaceReader(device)
    person = _person(reference_items, reader, identity)
    renders, found, frames = [], [], []
    for i, view in enumerate(views):
        image = render_view(avatar, view, size, renderer=renderer).cpu()
        face, absent = reader.find(to_uint8(image.numpy()))
        frame: dict[str, Any] = {"frame": view.timestep_id}
        if face is None:
            frame["absent"] = {"landmarks": absent}
        elif identity is not None and person is not None:
            embedding = identity.embed(to_uint8(image.numpy()), face.points[:, :2])
            frame["identity_similarity"] = float(person @ embedding)
        renders.append(image)
        found.append(face)
        frames.append(frame)
        if callback is not None:
            callback(Progress(i + 1, len(views), "frame"))
    placed = load_or_compute(head_model.folder, landmarks_file, device)
    model = LandmarkModel(HeadModel.load(head_model.folder, mouth=False), placed)
    followed = following_error(model, driving, views, found, size)
    for i, frame in enumerate(frames):
        frame.update({} if followed is None else followed.of_frame(i))
    metrics: dict[str, Any] = {
        "frames": frames,
        "summary": _summary(frames, followed),
        "absent": _absent(identity, identity_absent, person, followed, len(views)),
    }
    if len(views) >= 3:
        metrics["temporal"] = films_stability(
            head_model,
            views,
            renders,
            None,
            [None if f is None else f.points[:, :2] for f in found],
        )
    if truth is not None:
        against = evaluate_avatar(
            avatar, head_model, truth, references, output_dir / "truth", callback,
            mask_dilation=mask_dilation, lpips_weights=lpips_weights, identity=identity,
            identity_absent=identity_absent, max_frames=max_frames, renderer=renderer,
        )  # fmt: skip
        metrics["truth"] = {name: against[name] for name in ("summary", "absent")}
        metrics["truth"] |= {"temporal": against["temporal"]} if "temporal" in against else {}
        best = _best_following(model, driving, views, truth, reader, size)
        if best is not None:
            metrics["truth"]["following"] = best.summary()
    write_json(output_dir / "metrics.json", metrics)
    write_frames_csv(output_dir / "frames.csv", frames)
    write_frames_plot(output_dir / "metrics.png", frames)
    _write_pictures(output_dir / "side_by_side.png", reference_items[0], renders, frames)
    return metrics


def driven_views(
    head_model: HeadModel, shape: NDArray[np.float32], driving: Tracking, max_frames: int
) -> list[ViewParameters]:
    """The driver's poses with another person's head, seen by the driver's first camera.

    Raises:
        InputFileError: a head that is not in front of the camera.
    """
    assert head_model.folder is not None  # models of the workflow come from a folder
    template = load_flame_template(head_model.folder)
    height, width = (int(side) for side in driving.resolutions[0])
    first = ViewParameters(
        shape=shape, expr=driving.expr[0], rot=driving.rot[0], tra=driving.tra[0],
        eye_rot=driving.eye_rot[0], fx=float(driving.fx[0, 0]), fy=float(driving.fy[0, 0]),
        cx=float(driving.cx[0, 0]), cy=float(driving.cy[0, 0]), extr=driving.extr[0],
        resolution=(height, width), crop_box=(0, 0, 1, 1),
    )  # fmt: skip
    views = [
        replace(
            first, expr=driving.expr[t], rot=driving.rot[t], tra=driving.tra[t],
            eye_rot=driving.eye_rot[t], timestep_id=t,
        )
        for t in range(min(max_frames, driving.num_frames))
    ]  # fmt: skip
    try:
        return with_crop_boxes(head_model, views, template.head_vertex_ids)
    except ValueError as error:
        raise InputFileError(
            "the driving fit", f"a head that does not project ({error})", "one before its camera"
        ) from None


def _person(
    references: Sequence[ImageSetItem], reader: FaceReader, identity: IdentityEncoder | None
) -> NDArray[np.float64] | None:
    """Mean embedding of the references, None without network or faces."""
    if identity is None:
        return None
    chosen = np.linspace(0, len(references) - 1, min(MAX_REFERENCES, len(references)))
    embeddings = []
    for i in chosen.round().astype(int):
        image = read_rgb(references[i].image)
        landmarks = reader.read(image).landmarks
        if landmarks is not None:
            embeddings.append(identity.embed(image, landmarks))
    return mean_embedding(embeddings) if embeddings else None


def _best_following(
    model: LandmarkModel,
    driving: Tracking,
    views: Sequence[ViewParameters],
    truth: str | Path,
    reader: FaceReader,
    size: int,
) -> FollowingError | None:
    """Errors of the tracker on the true pictures."""
    items = read_image_set(truth)[: len(views)]
    found: list[FaceLandmarks | None] = [reader.find(read_rgb(item.image))[0] for item in items]
    return following_error(model, driving, [item.parameters for item in items], found, size)


def _summary(frames: Sequence[dict[str, Any]], followed: FollowingError | None) -> dict[str, float]:
    similar = [f["identity_similarity"] for f in frames if "identity_similarity" in f]
    summary: dict[str, float] = {
        "num_frames": len(frames),
        "share_with_landmarks": float(np.mean(["absent" not in frame for frame in frames])),
    }
    if followed is not None:
        summary |= {k: v for k, v in followed.summary().items() if k != "num_frames"}
    if similar:
        summary["identity_similarity"] = float(np.mean(similar))
    return summary


def _absent(
    identity: IdentityEncoder | None,
    identity_absent: str,
    person: NDArray[np.float64] | None,
    followed: FollowingError | None,
    num_frames: int,
) -> dict[str, str]:
    absent = {}
    if identity is None:
        absent["identity_similarity"] = identity_absent
    elif person is None:
        absent["identity_similarity"] = "no face found in the references"
    if followed is None:
        absent["following"] = NO_FRAMES
    if num_frames < 3:
        absent["temporal"] = "fewer than 3 frames"
    return absent


def _write_pictures(
    path: Path, reference: ImageSetItem, renders: Sequence[Tensor], frames: Sequence[dict[str, Any]]
) -> None:
    """The reference, then frames of the driven avatar, row by row."""
    count = min(MAX_PICTURES, len(renders))
    shown = np.linspace(0, len(renders) - 1, count).round().astype(int).tolist()
    pictures = [torch.from_numpy(read_rgb(reference.image).astype(np.float32) / 255)]
    pictures += [renders[i] for i in shown]
    texts = ["reference", *(_caption(frames[i]) for i in shown)]
    rows = []
    for first in range(0, len(pictures), COLUMNS):
        part = slice(first, first + COLUMNS)
        rows.append(Comparison(tuple(texts[part]), tuple(pictures[part])))
    write_side_by_side(path, ("", "avatar, driven", *[""] * (COLUMNS - 2)), rows)


def _caption(frame: dict[str, Any]) -> str:
    text = f"frame {frame['frame']}"
    if "pose_deg_error" in frame:
        text += f": {frame['pose_deg_error']:.1f}° off, {frame['expression_mm_error']:.1f} mm"
    return text
