"""A whole sampling run in half precision stays near the float32 run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.grouping import SeededGrouping
from cap4d_core.diffusion.sampler import sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule
from tests.core.mmdm_models import TINY, random_denoiser, random_frames

SCHEDULE = NoiseSchedule()
STEPS, VIEWS, REFERENCES = 20, 12, 2


def run(dtype: torch.dtype) -> Tensor:
    network = random_denoiser().to(dtype)
    # A bare random network diverges; on top of the denoiser of N(0, 1/4) it stays O(1).
    alphas = torch.from_numpy(SCHEDULE.alphas_cumprod)

    def denoiser(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = alphas[timesteps][..., None, None, None].to(torch.float32)
        anchor = (1 - a).sqrt() * latents / (0.25 * a + 1 - a)
        return anchor + (a * (1 - a)).sqrt() * network(latents, timesteps, c)

    _, _, many = random_frames(TINY, 4, 4, seed=1)
    flat = FrameConditioning(
        *(t.flatten(0, 1) for t in (many.pos_enc, many.z_input, many.ref_mask))
    )
    references, views = flat.index(range(REFERENCES)), flat.index(range(4, 4 + VIEWS))
    views = FrameConditioning(views.pos_enc, views.z_input, torch.zeros_like(views.ref_mask))
    shape = (VIEWS, TINY.in_channels, TINY.latent_size, TINY.latent_size)
    return sample_stochastic_io(
        denoiser,
        SCHEDULE,
        references,
        views,
        STEPS,
        2.0,
        TINY.views_per_call,
        REFERENCES,
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        SeededGrouping(REFERENCES, VIEWS, REFERENCES, TINY.views_per_call - REFERENCES, ("k",)),
    )


# Relative rounding is 2^-9 in bfloat16 and 2^-12 in float16 per operation; measured deviations are
# about a third of these bounds. A wrong norm or softmax in half precision is an order above them.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
def test_half_precision_run_stays_near_float32(dtype: torch.dtype, bound: float) -> None:
    exact, half = run(torch.float32), run(dtype)
    assert half.dtype == torch.float32
    deviation = float((half - exact).norm() / exact.norm())
    print(f"relative deviation {deviation:.2e}")
    assert 0 < deviation < bound
