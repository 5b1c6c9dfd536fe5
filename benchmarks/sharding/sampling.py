"""All shards of several people in one process, as the jobs of the workflow would sample them.

Sharding is nothing but a rule about who may share a network call. So one run of the sampler with a
grouping that obeys the rule does what all the jobs do, and a GPU gets batches worth its while.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.checkpoint import MMDM
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.dealing import deal_views, initial_noise
from cap4d_core.diffusion.grouping import SeededGrouping, shard_key
from cap4d_core.diffusion.round_plan import round_steps
from cap4d_core.diffusion.sampler import Denoiser, sample_stochastic_io
from cap4d_core.diffusion.step_grid import ddim_step_count
from cap4d_core.progress import ProgressCallback


class ShardedGrouping:
    """Batches of every step for several people, each with so many shards and rounds.

    Args:
        names: of the people; each has the next `num_views` views and `num_references` references.
        num_views: N of each.
        num_references: of each.
        references_per_batch: R. views_per_batch: G.
        seed: base seed of the sampling.
        num_shards: of each.
        sync_steps: where views are dealt anew.
        num_steps: that are run in all.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_views: int,
        num_references: int,
        references_per_batch: int,
        views_per_batch: int,
        seed: int,
        num_shards: int,
        sync_steps: Sequence[float],
        num_steps: int,
    ) -> None:
        self.names, self.num_views, self.num_references = tuple(names), num_views, num_references
        self.sizes = (references_per_batch, views_per_batch)
        self.seed, self.num_shards = seed, num_shards
        self.rounds = round_steps(sync_steps, num_steps, num_shards)

    def step(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """References (n, R) and views (n, G) of every network call of a step."""
        number = next(i for i, (start, stop) in enumerate(self.rounds) if start <= index < stop)
        references, views = [], []
        for person, name in enumerate(self.names):
            dealt = deal_views(self.num_views, self.num_shards, self.seed, name, number)
            for shard, ids in enumerate(dealt):
                key = shard_key(self.seed, name, self.num_shards, number, shard)
                grouping = SeededGrouping(self.num_references, len(ids), *self.sizes, key)
                chosen, local = grouping.step(index)
                references.append(chosen + person * self.num_references)
                views.append(ids[local] + person * self.num_views)
        return np.concatenate(references), np.concatenate(views)


@torch.no_grad()
def sample(
    model: MMDM,
    names: Sequence[str],
    references: FrameConditioning,
    generated: FrameConditioning,
    *,
    num_steps: int,
    guidance_scale: float,
    max_references: int,
    seed: int,
    num_shards: int,
    sync_steps: Sequence[float],
    batches_per_call: int,
    solver: str = "ddim",
    guidance_interval: Sequence[float] = (0.0, 1.0),
    denoiser: Denoiser | None = None,
    callback: ProgressCallback | None = None,
) -> Tensor:
    """Latents (people x N, 4, h, w) of all views after the last step.

    Args:
        model: on the device to compute on.
        names: of the people.
        references: of all people, one after the other, as many of each.
        generated: likewise.
        num_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        max_references: R is the smaller of this and the references of a person.
        seed: base seed.
        num_shards: shards of each person.
        sync_steps: where views are dealt anew.
        batches_per_call: batches in one network call.
        solver: of the denoising steps.
        guidance_interval: part of the steps that is guided.
        denoiser: a faster form of the model's; default: that itself.
        callback: called after every step.
    """
    config = model.config
    num_views, num_references = len(generated) // len(names), len(references) // len(names)
    used = min(num_references, max_references)
    grouping = ShardedGrouping(
        names, num_views, num_references, used, config.views_per_call - used, seed, num_shards,
        sync_steps, ddim_step_count(num_steps),
    )  # fmt: skip
    shape = (config.in_channels, config.latent_size, config.latent_size)
    noise = torch.cat([initial_noise(range(num_views), shape, seed, name) for name in names])
    extra = {} if solver == "ddim" else {"solver": solver}
    return sample_stochastic_io(
        model.denoiser if denoiser is None else denoiser,
        model.schedule,
        references,
        generated,
        num_steps,
        guidance_scale,
        config.views_per_call,
        used,
        noise.to(references.pos_enc.device),
        grouping,
        callback=callback,
        batches_per_call=batches_per_call,
        guidance_interval=guidance_interval,
        **extra,
    )
