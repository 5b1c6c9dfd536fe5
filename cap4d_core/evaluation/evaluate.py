"""Measures an avatar on views it has not seen.

Every held-out view is rendered from its camera with its expression and compared with the truth
inside the matte, grown by a few pixels so that splats spilling over the outline count. The
baseline is the reference image whose viewing direction is nearest: what one would show without an
avatar. An avatar that does not beat it has learned nothing about the third dimension.

Frames: head-fixed OpenCV axes, see `cap4d_core.files.tracking`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.renderer import Backend, render_gaussians
from cap4d_core.errors import InputFileError
from cap4d_core.evaluation.metrics import dilated_mask, lpips, psnr, ssim
from cap4d_core.evaluation.side_by_side import Comparison, write_side_by_side
from cap4d_core.files.basic import write_json
from cap4d_core.files.image_set import ImageSetItem, ViewParameters, read_image_set
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.geometry.cameras import head_to_origin, intrinsics_matrix
from cap4d_core.geometry.crops import crop_intrinsics, resize
from cap4d_core.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from cap4d_core.avatar.gaussians import GaussianAvatar
    from cap4d_core.flame.model import HeadModel

logger = logging.getLogger(__name__)

MAX_PICTURES = 12


@dataclass(frozen=True)
class ViewResult:
    """Figures of one held-out view; `psnr_gain` is avatar minus baseline, angles in degrees.

    The LPIPS distances are None without weights.
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
    renderer: Backend = "auto",
) -> dict[str, Any]:
    """Compares an avatar with held-out views; writes `metrics.json` and `side_by_side.png`.

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
        renderer: backend of the splat renderer.

    Returns:
        `metrics.json`: `views` (see `ViewResult`) and `summary` (means over the views).

    Raises:
        InputFileError: an image set is missing or broken, or a matte shows no foreground.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    items, reference_items = read_image_set(held_out), read_image_set(references)
    reference_directions = np.stack([viewing_direction(r.parameters) for r in reference_items])
    shown = set(np.linspace(0, len(items) - 1, min(MAX_PICTURES, len(items))).round().astype(int))
    device = next(avatar.parameters()).device
    head_model.to(device)
    perceptual = Lpips.load(lpips_weights, device=str(device)) if lpips_weights else None
    results, comparisons = [], []
    for number, item in enumerate(items):
        truth, mask = _truth(item, mask_dilation, background)
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
        )
        results.append(result)
        if number in shown:
            caption = (
                f"{result.view}: avatar {result.psnr:.1f} dB, nearest reference "
                f"{result.baseline_psnr:.1f} dB ({result.angle_to_reference_deg:.0f}° away)"
            )
            comparisons.append(Comparison(caption, (truth, image, baseline)))
        if callback:
            callback(Progress(number + 1, len(items), "view", {"psnr": result.psnr}))
    metrics = {
        "views": [
            {name: value for name, value in asdict(result).items() if value is not None}
            for result in results
        ],
        "summary": summarise(results),
        "mask_dilation_px": mask_dilation,
    }
    write_json(output_dir / "metrics.json", metrics)
    write_side_by_side(
        output_dir / "side_by_side.png", ("truth", "avatar", "nearest reference"), comparisons
    )
    return metrics


def _perceptual_distances(
    network: Lpips | None,
    image: Tensor,
    baseline: Tensor,
    truth: Tensor,
    mask: Tensor,
    device: torch.device,
) -> dict[str, float]:
    if network is None:
        return {}
    image, baseline, truth, mask = (x.to(device) for x in (image, baseline, truth, mask))
    return {
        "lpips": lpips(network, image, truth, mask),
        "baseline_lpips": lpips(network, baseline, truth, mask),
    }


def summarise(results: Sequence[ViewResult]) -> dict[str, float]:
    """Means over the views, number of views, share of views better than the baseline."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    names = ["psnr", "ssim", "baseline_psnr", "baseline_ssim", "psnr_gain"]
    names += ["lpips", "baseline_lpips"] if results[0].lpips is not None else []
    return {
        "num_views": len(results),
        **{name: mean(name) for name in names},
        "share_better_than_baseline": float(np.mean([r.psnr_gain > 0 for r in results])),
        "mean_angle_to_reference_deg": mean("angle_to_reference_deg"),
        "max_angle_to_reference_deg": max(r.angle_to_reference_deg for r in results),
    }


def viewing_direction(view: ViewParameters) -> NDArray[np.float64]:
    """Unit vector (3,) from the head to the camera, head-fixed OpenCV axes."""
    camera = _head_fixed_camera(view).numpy()
    centre = -camera[:3, :3].T @ camera[:3, 3]
    return centre / np.linalg.norm(centre)


def render_view(
    avatar: GaussianAvatar,
    view: ViewParameters,
    size: int,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    renderer: Backend = "auto",
) -> Tensor:
    """Renders the avatar as (size, size, 3) in 0..1 with the camera and expression of a view."""
    device = next(avatar.parameters()).device
    focal_center = crop_intrinsics(view.fx, view.fy, view.cx, view.cy, view.crop_box, size)
    intrinsics = intrinsics_matrix(*(torch.tensor([value]) for value in focal_center))

    def row(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)[None]

    with torch.no_grad():
        posed = avatar.pose(row(view.expr), row(view.eye_rot))
        rendered = render_gaussians(
            posed.means,
            posed.quats,
            posed.scales,
            posed.opacities,
            posed.sh,
            row(_head_fixed_camera(view)),
            intrinsics.float().to(device),
            size,
            size,
            sh_degree=int(avatar.active_sh_degree),
            background=background,
            backend=renderer,
        )
    return rendered.image[0].clamp(0, 1)


def _head_fixed_camera(view: ViewParameters) -> Tensor:
    extr, rot, tra = (
        torch.as_tensor(value, dtype=torch.float64) for value in (view.extr, view.rot, view.tra)
    )
    return head_to_origin(extr, rot, tra)


def _truth(
    item: ImageSetItem, dilation: int, background: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    image = read_rgb(item.image)
    if image.shape[0] != image.shape[1]:
        raise InputFileError(item.image, f"{image.shape[1]} x {image.shape[0]} pixels", "a square")
    truth = torch.from_numpy(image.astype(np.float32) / 255)
    if item.matte is None:
        logger.warning("%s has no matte: the whole image is compared.", item.image)
        return truth, torch.ones(truth.shape[:2], dtype=torch.bool)
    matte = read_grey(item.matte)
    if matte.shape != image.shape[:2]:
        raise InputFileError(
            item.matte, f"{matte.shape[1]} x {matte.shape[0]} pixels", "the size of its image"
        )
    if not matte.any():
        raise InputFileError(item.matte, "no foreground", "255 where the head is")
    # Soft edges already hold the background of the picture; only pure background is replaced.
    foreground = torch.from_numpy(matte > 0)[..., None]
    truth = torch.where(foreground, truth, torch.tensor(background))
    return truth, torch.from_numpy(dilated_mask(matte, dilation))
