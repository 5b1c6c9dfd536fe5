"""Parity of conditioning maps, stochastic I/O sampling and the geometry of reference and views."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.grouping import RecordedGrouping
from cap4d_core.diffusion.sampler import SamplingProgress, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule, ScheduleConfig
from cap4d_core.progress import Progress
from tests.parity.adapters_mmdm_network import load_denoiser
from tests.parity.goldens import Golden, adapter

# manifest: "1e-4 relative to the peak of each step's latents"
SAMPLER_TOLERANCE = {"rel_to_peak": 1e-4}

SCHEDULE_NAMES = {
    "n_frames": "num_frames",
    "shift_schedule": "shift_snr",
    "zero_snr_shift": "zero_snr",
}


def schedule_of(g: Golden) -> NoiseSchedule:
    """The released schedule with the overrides that the manifest notes."""
    found = re.search(r"sched overrides: (\{.*?\})", str(g.entry.get("notes", "")))
    overrides: dict[str, Any] = ast.literal_eval(found[1]) if found else {}
    return NoiseSchedule.from_config(
        ScheduleConfig(**{SCHEDULE_NAMES.get(k, k): v for k, v in overrides.items()})
    )


def toy_network(schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Closed-form noise model that depends on slots, references and poses (mmdm.md, F)."""
    table = torch.from_numpy(schedule.alphas_cumprod)

    def predict(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = table[timesteps][..., None, None, None]
        m, x, z = c.ref_mask, latents, c.z_input
        free = 1 - m
        xr = z * m + x * free
        p = c.pos_enc[..., :4].movedim(-1, -3)
        rm = (xr * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
        gm = (xr * free).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp(min=1)
        w = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None, None, None]
        signal = 0.3 * rm + 0.2 * p + 0.1 * torch.tanh(gm) + 0.02 * w * rm
        eps = (1 - a).sqrt() * x / (0.25 * a + 1 - a) - (a * (1 - a)).sqrt() * signal
        return free * eps + m * (x - z)

    return predict


def blended(network: Callable[..., Tensor], schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """The network's output mixed into the noise of a Gaussian prior, which keeps latents O(1)."""
    table = torch.from_numpy(schedule.alphas_cumprod)

    def predict(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = table[timesteps][..., None, None, None]
        prior = (1 - a).sqrt() * latents / (0.25 * a + 1 - a)
        return prior + (a * (1 - a)).sqrt() * network(latents, timesteps, c)

    return predict


def frames(g: Golden, prefix: str, mask: float) -> FrameConditioning:
    pos_enc = torch.from_numpy(g.input(f"{prefix}_pos_enc"))
    z = torch.from_numpy(g.input(f"{prefix}_z"))
    return FrameConditioning(pos_enc, z, torch.full_like(z[:, :1], mask))


class SamplerRun:
    """One run of the sampler on a golden's inputs; `batches_per_call` must not matter."""

    def __init__(self, g: Golden) -> None:
        self.schedule = schedule_of(g)
        self.num_steps = int(g.input("S"))
        self.views_per_call = int(g.input("V"))
        self.max_references = int(g.input("R_max"))
        self.guidance_scale = float(g.input("cfg_scale"))
        self.noise = torch.from_numpy(g.input("x_T"))
        self.references, self.views = frames(g, "ref", 1.0), frames(g, "gen", 0.0)
        self.grouping = RecordedGrouping(g.input("ref_batches"), g.input("gen_batches"))
        g.ignore("torch_seed|numpy_seed", "the draws themselves are in the file")
        self.first_timesteps: Tensor | None = None

    def __call__(
        self, network: Callable[..., Tensor], batches_per_call: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """Final latents and the latents after every step; the first call is remembered."""
        after: list[Tensor] = []

        def recorded(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
            if self.first_timesteps is None:
                self.first_timesteps = timesteps
            return network(latents, timesteps, c)

        def keep(progress: Progress) -> None:
            assert isinstance(progress, SamplingProgress) and progress.latents is not None
            after.append(progress.latents)

        final = sample_stochastic_io(
            recorded, self.schedule, self.references, self.views, self.num_steps,
            self.guidance_scale, self.views_per_call, self.max_references, self.noise,
            self.grouping, callback=keep, batches_per_call=batches_per_call,
        )  # fmt: skip
        return final, after


def compare_run(
    g: Golden, run: SamplerRun, network: Callable[..., Tensor], prefix: str = ""
) -> None:
    """Checks final latents and each stored step against its own peak."""
    final, after = run(network)
    g.compare(f"{prefix}final", final, **SAMPLER_TOLERANCE)
    name = f"{prefix}latents_after_step"
    expected = g.input(name)
    which = f"{name}_which"
    steps = g.input(which).tolist() if which in g else range(len(expected))
    for row, step in enumerate(steps):
        g.compare_with(f"{name}[{step}]", expected[row], after[step], **SAMPLER_TOLERANCE)


@adapter("F_sampler_toy", "F_sampler_toy_R1", "F_sampler_toy_Rmax1")
def check_sampler_toy(g: Golden) -> None:
    run = SamplerRun(g)
    grid = run.schedule.ddim(run.num_steps)
    g.compare("timesteps_in_order", grid.timesteps[::-1])
    compare_run(g, run, toy_network(run.schedule))
    g.compare("first_call_t", run.first_timesteps)
    together, _ = run(toy_network(run.schedule), batches_per_call=3)
    g.compare_with(
        "final, 3 batches per call", g.peek("final"), together, **SAMPLER_TOLERANCE
    )


@adapter("F_sampler_unet", "F_sampler_unet_R1")
def check_sampler_unet(g: Golden) -> None:
    run = SamplerRun(g)
    weights = g.sibling("C_unet_small_weights")
    network = load_denoiser(weights, weights.entry["notes"])
    g.compare("timesteps_in_order", run.schedule.ddim(run.num_steps).timesteps[::-1])
    compare_run(g, run, network)
    compare_run(g, run, blended(network, run.schedule), "blend_")
    g.compare("first_call_t", run.first_timesteps)


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
