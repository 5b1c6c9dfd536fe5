"""What changes with the iteration: learning rates, share of LPIPS, spherical harmonics degree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cap4d_core.settings import FittingSettings

# Scheduled rates fall to this share of their initial value (published).
FINAL_RATE = 0.01


@dataclass(frozen=True)
class LossWeights:
    """Weights of the image terms at one iteration; `lpips` multiplies the raw distance."""

    l1: float
    ssim: float
    lpips: float


def log_linear_rate(iteration: int, initial: float, final: float, max_steps: int) -> float:
    """Rate that falls exponentially from `initial` to `final` over `max_steps`; 0 stays 0."""
    if initial <= 0 or final <= 0:
        return 0.0
    t = min(max(iteration / max_steps, 0.0), 1.0)
    return math.exp((1 - t) * math.log(initial) + t * math.log(final))


def scheduled_rates(iteration: int, settings: FittingSettings) -> dict[str, float]:
    """Rates of positions, deformation network and neck at an iteration (counted from 1)."""
    ends = {
        "xyz": (settings.lr_position, settings.lr_position_final),
        "deform_net": (settings.lr_deform_net, settings.lr_deform_net_final),
        "neck": (settings.lr_neck, settings.lr_neck_final),
    }
    return {
        name: log_linear_rate(
            iteration, first, first * FINAL_RATE if last is None else last, settings.iterations
        )
        for name, (first, last) in ends.items()
    }


def lpips_share(iteration: int, settings: FittingSettings) -> float:
    """Share that LPIPS takes over from L1 and SSIM; grows linearly between start and end."""
    start, end, peak = settings.lpips_start, settings.lpips_end, settings.lambda_lpips_end
    if iteration <= start:
        return 0.0
    if end <= start:
        return peak
    return min((iteration - start) / (end - start) * peak, peak)


def loss_weights(iteration: int, settings: FittingSettings, has_lpips: bool = True) -> LossWeights:
    """Weights of L1, 1-SSIM and LPIPS.

    Without LPIPS weights L1 and SSIM keep their full share, so the images go on driving the fit.
    """
    share = lpips_share(iteration, settings) if has_lpips else 0.0
    return LossWeights(
        l1=(1 - settings.lambda_dssim) * (1 - share),
        ssim=settings.lambda_dssim * (1 - share),
        lpips=settings.w_lpips * share,
    )


def sh_degree_at(iteration: int, settings: FittingSettings) -> int:
    """Spherical harmonics degree rendered at an iteration (counted from 1)."""
    return min(iteration // settings.sh_warmup, settings.sh_degree)


def is_due(iteration: int, interval: int, batch_size: int) -> bool:
    """Whether the last step, of so many views, reached a multiple of an interval."""
    return iteration // interval > (iteration - batch_size) // interval


def evaluation_interval(settings: FittingSettings) -> int:
    """Views between evaluations: a fifth of the run when the setting is longer than the run."""
    if settings.evaluate_every > settings.iterations:
        return max(settings.iterations // 5, 1)
    return settings.evaluate_every
