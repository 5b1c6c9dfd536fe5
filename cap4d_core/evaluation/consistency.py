"""Do several pictures of a head agree with one another?

Every place on the head that several views show should have one colour in all of them, up to light
and expression. What the views disagree about no avatar can show: it becomes blur.

With true pictures of the same views at hand the error of a view splits into a part that all views
share (a wrong face, but the same one everywhere) and a part that differs from view to view.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cap4d_core.evaluation.metrics import SMALLEST_ERROR
from cap4d_core.evaluation.surface import SurfaceColors


@dataclass(frozen=True)
class Consistency:
    """How much views disagree about surface colours; colours in 0..1.

    mean_std: standard deviation over the views of a place, mean over places and channels.
    psnr: dB of one view against what all views of a place would say on average
        (-10 log10 of the mean variance), at most 100.
    num_points: places seen by enough views; views_per_point: by how many, on average.
    """

    mean_std: float
    psnr: float
    num_points: int
    views_per_point: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class ErrorParts:
    """Mean squared colour error of places on the head, split.

    error = shared + differing: the first is the square of the mean error over the views of a
    place, the second the variance about it; both as squared colours and as PSNR in dB (at most
    100).
    """

    shared: float
    differing: float
    shared_psnr: float
    differing_psnr: float
    num_points: int

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def cross_view_consistency(surface: SurfaceColors, min_views: int = 3) -> Consistency | None:
    """Disagreement of views about the colours of the places they share.

    Args:
        surface: of the views, see `cap4d_core.evaluation.surface`.
        min_views: places seen by fewer do not count; at least 2.

    Returns:
        None when no place is seen by enough views.
    """
    counts, _, variance = _moments(surface.colors, surface.visible, min_views)
    if not len(counts):
        return None
    return Consistency(
        mean_std=float(variance.sqrt().mean()),
        psnr=_decibels(float((variance.mean(-1) * counts).sum() / counts.sum())),
        num_points=len(counts),
        views_per_point=float(counts.mean()),
    )


def error_parts(
    surface: SurfaceColors, truth: SurfaceColors, min_views: int = 3
) -> ErrorParts | None:
    """Splits the error of views on the surface into what they share and what differs.

    Args:
        surface: of the views.
        truth: of true pictures of the same views, at the same points.
        min_views: as `cross_view_consistency`.

    Returns:
        None when no place is seen by enough views.
    """
    error = surface.colors - truth.colors
    visible = surface.visible & truth.visible
    counts, mean, variance = _moments(error, visible, min_views)
    if not len(counts):
        return None
    weights = counts / counts.sum()
    # The mean of n draws is off by its own noise: variance / n of its square is not shared.
    noise = variance / counts[:, None]
    shared = float((((mean.square() - noise).mean(-1)) * weights).sum().clamp(min=0))
    differing = float((variance.mean(-1) * weights).sum())
    return ErrorParts(shared, differing, _decibels(shared), _decibels(differing), len(counts))


def _moments(values: Tensor, visible: Tensor, min_views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number (Q,), mean (Q, 3) and unbiased variance (Q, 3) over views of places seen often."""
    if min_views < 2:
        raise ValueError("at least 2 views are needed to disagree")
    weight = visible.double()[..., None]
    counts = weight.sum(0)[:, 0]
    chosen = counts >= min_views
    weight, counts = weight[:, chosen], counts[chosen]
    values = torch.where(weight > 0, values[:, chosen].double(), 0.0)
    mean = values.sum(0) / counts[:, None]
    squares = ((values - mean).square() * weight).sum(0)
    return counts, mean, squares / (counts - 1)[:, None]


def _decibels(error: float) -> float:
    return float(-10 * torch.log10(torch.tensor(max(error, SMALLEST_ERROR), dtype=torch.float64)))
