"""Measures an avatar on views it has not seen.

Every held-out view is rendered from its camera with its expression and compared with the truth
inside the matte, grown by a few pixels so that splats spilling over the outline count. The
baseline is the reference image whose viewing direction is nearest: what one would show without an
avatar. An avatar that does not beat it has learned nothing about the third dimension.

    {output}/metrics.json       figures of every view, their means, and why a figure is absent
    {output}/frames.csv         the same per view, as a table
    {output}/metrics.png        plot of it
    {output}/side_by_side.png   truth, avatar, nearest reference

On consecutive frames of a video this is self-reenactment: the subject's own performance drives the
avatar, and the recording is the truth; then the stability over time is measured, too.

Frames: head-fixed OpenCV axes, see `cap4d_core.files.tracking`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.renderer import Backend
from cap4d_core.evaluation.face_comparison import FaceComparison
from cap4d_core.evaluation.identity import IdentityEncoder
from cap4d_core.evaluation.metrics import lpips, psnr, ssim
from cap4d_core.evaluation.rendering import (
    camera_runs,
    choose_views,
    read_truth,
    render_view,
    viewing_direction,
)
from cap4d_core.evaluation.side_by_side import Comparison, write_side_by_side
from cap4d_core.evaluation.stability import films_stability
from cap4d_core.evaluation.tables import write_frames_csv, write_frames_plot
from cap4d_core.files.basic import write_json
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_rgb
from cap4d_core.geometry.crops import resize
from cap4d_core.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from cap4d_core.avatar.gaussians import GaussianAvatar
    from cap4d_core.flame.model import HeadModel

__all__ = ["ViewResult", "evaluate_avatar", "render_view", "summarise", "viewing_direction"]

logger = logging.getLogger(__name__)

MAX_PICTURES = 12
NO_LPIPS = "no LPIPS weights (fitting.lpips_weights is not set)"
NO_FILM = "the views are no consecutive frames"


@dataclass(frozen=True)
class ViewResult:
    """Figures of one held-out view; `psnr_gain` is avatar minus baseline, angles in degrees.

    LPIPS distances are None without weights. akd: mean distance of landmarks to those of the truth
    in pixels, akd_percent of the size of the face; identity_similarity: cosine of embeddings. What
    is None for this view only is explained in `absent`, by name.
    """

    view: str
    nearest_reference: str
    angle_to_reference_deg: float
    psnr: float
    ssim: float
    baseline_psnr: float
    baseline_ssim: float
    psnr_gain: float
    lpips: float | None = None
    baseline_lpips: float | None = None
    akd: float | None = None
    akd_percent: float | None = None
    baseline_akd_percent: float | None = None
    identity_similarity: float | None = None
    baseline_identity_similarity: float | None = None
    absent: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What there is, as JSON types."""
        return {k: v for k, v in asdict(self).items() if v is not None and v != {}}


def evaluate_avatar(
    avatar: GaussianAvatar,
    head_model: HeadModel,
    held_out: str | Path,
    references: str | Path,
    output_dir: str | Path,
    callback: ProgressCallback | None = None,
    *,
    mask_dilation: int = 5,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    lpips_weights: str | Path | None = None,
    identity: IdentityEncoder | None = None,
    identity_absent: str = "no recognition network was given",
    max_frames: int = 100,
    protocol: dict[str, Any] | None = None,
    renderer: Backend = "auto",
) -> dict[str, Any]:
    """Compares an avatar with held-out views; see the module for the files written.

    Args:
        avatar: the fitted avatar.
        head_model: moved to the device of the avatar, which poses with it.
        held_out: image set with mattes; without them whole images are compared.
        references: image set of the reference views, same crops as the held-out ones.
        output_dir: created.
        callback: called after every view.
        mask_dilation: pixels by which the foreground of the truth is grown.
        background: colour behind the avatar, and behind the truth where its matte is 0.
        lpips_weights: weights of the perceptual distance; None = leave it out.
        identity: recognition network; None = leave it out, for the reason `identity_absent`.
        identity_absent: goes into the results.
        max_frames: at most so many views are compared.
        protocol: how the views were set aside; goes into the results.
        renderer: backend of the splat renderer.

    Returns:
        `metrics.json`: `views` (see `ViewResult`), `summary` (means over the views), `temporal` of
        films, `absent` (figure: reason).

    Raises:
        InputFileError: an image set is missing or broken, or a matte shows no foreground.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    items = choose_views(read_image_set(held_out), max_frames)
    reference_items = read_image_set(references)
    reference_directions = np.stack([viewing_direction(r.parameters) for r in reference_items])
    shown = set(np.linspace(0, len(items) - 1, min(MAX_PICTURES, len(items))).round().astype(int))
    device = next(avatar.parameters()).device
    head_model.to(device)
    perceptual = Lpips.load(lpips_weights, device=str(device)) if lpips_weights else None
    faces = FaceComparison(identity, device)
    results, comparisons, renders, truths = [], [], [], []
    for number, item in enumerate(items):
        truth, mask = read_truth(item, mask_dilation, background)
        size = len(truth)
        image = render_view(avatar, item.parameters, size, background, renderer).cpu()
        cosines = reference_directions @ viewing_direction(item.parameters)
        nearest = int(np.argmax(cosines))
        nearest_item = reference_items[nearest]
        baseline = torch.from_numpy(resize(read_rgb(nearest_item.image), size)).float() / 255
        result = ViewResult(
            view=item.image.name,
            nearest_reference=nearest_item.image.name,
            angle_to_reference_deg=float(np.degrees(np.arccos(np.clip(cosines[nearest], -1, 1)))),
            psnr=psnr(image, truth, mask),
            ssim=ssim(image, truth, mask),
            baseline_psnr=psnr(baseline, truth, mask),
            baseline_ssim=ssim(baseline, truth, mask),
            psnr_gain=psnr(image, truth, mask) - psnr(baseline, truth, mask),
            **_perceptual_distances(perceptual, image, baseline, truth, mask, device),
            **faces.compare(image, truth, baseline, nearest_item.image.name),
        )
        results.append(result)
        renders.append(image)
        truths.append(truth)
        if number in shown:
            caption = (
                f"{result.view}: avatar {result.psnr:.1f} dB, nearest reference "
                f"{result.baseline_psnr:.1f} dB ({result.angle_to_reference_deg:.0f}° away)"
            )
            comparisons.append(Comparison((caption,), (truth, image, baseline)))
        if callback:
            callback(Progress(number + 1, len(items), "view", {"psnr": result.psnr}))
    absent = {}
    if perceptual is None:
        absent["lpips"] = NO_LPIPS
    if identity is None:
        absent["identity_similarity"] = identity_absent
    views = [item.parameters for item in items]
    temporal = None
    if camera_runs(views):
        temporal = films_stability(
            head_model, views, renders, truths, faces.landmarks, faces.true_landmarks
        )
    else:
        absent["temporal"] = NO_FILM
    metrics: dict[str, Any] = {
        "views": [result.to_dict() for result in results],
        "summary": summarise(results),
        "mask_dilation_px": mask_dilation,
        "absent": absent,
        **({"temporal": temporal} if temporal is not None else {}),
        **({"protocol": protocol} if protocol is not None else {}),
    }
    write_json(output_dir / "metrics.json", metrics)
    write_frames_csv(output_dir / "frames.csv", metrics["views"])
    write_frames_plot(output_dir / "metrics.png", metrics["views"])
    write_side_by_side(
        output_dir / "side_by_side.png", ("truth", "avatar", "nearest reference"), comparisons
    )
    return metrics


def _perceptual_distances(
    network: Callable[..., Tensor] | None,
    image: Tensor,
    baseline: Tensor,
    truth: Tensor,
    mask: Tensor,
    device: torch.device,
) -> dict[str, Any]:
    if network is None:
        return {}
    image, baseline, truth, mask = (x.to(device) for x in (image, baseline, truth, mask))
    return {
        "lpips": lpips(network, image, truth, mask),
        "baseline_lpips": lpips(network, baseline, truth, mask),
    }


def summarise(results: Sequence[ViewResult]) -> dict[str, float]:
    """Means over the views that have a figure; number of views, share better than the baseline."""

    def found(name: str) -> list[float]:
        return [value for r in results if (value := getattr(r, name)) is not None]

    names = ["psnr", "ssim", "baseline_psnr", "baseline_ssim", "psnr_gain"]
    names += ["lpips", "baseline_lpips", "akd", "akd_percent", "baseline_akd_percent"]
    names += ["identity_similarity", "baseline_identity_similarity"]
    summary: dict[str, float] = {"num_views": len(results)}
    summary |= {name: float(np.mean(found(name))) for name in names if found(name)}
    summary |= {
        "share_better_than_baseline": float(np.mean([r.psnr_gain > 0 for r in results])),
        "mean_angle_to_reference_deg": float(np.mean(found("angle_to_reference_deg"))),
        "max_angle_to_reference_deg": max(r.angle_to_reference_deg for r in results),
    }
    if found("akd"):
        summary["num_views_with_landmarks"] = len(found("akd"))
    return summary
