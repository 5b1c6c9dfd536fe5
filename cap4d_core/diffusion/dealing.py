"""How views, their initial noise and their number are shared out between shards.

Everything depends on (seed, subject) and on indices only, so any job can recompute it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.seeding import derived_generator, derived_normal
from cap4d_core.errors import UserError

IndexArray = NDArray[np.int64]


def views_per_iteration(num_references: int, max_references: int, views_per_call: int) -> int:
    """G, the generated views of one network call: V - R with R = min(references, max_references).

    Raises:
        UserError: the references leave no room.
    """
    generated = views_per_call - min(num_references, max_references)
    if generated < 1:
        raise UserError(
            f"sampling.max_references = {max_references} with sampling.views_per_call = "
            f"{views_per_call} leaves no place for views to generate; "
            f"set max_references to {views_per_call - 1} or less."
        )
    return generated


def padded_view_count(requested: int, num_shards: int, views_per_iteration: int) -> int:
    """The smallest multiple of num_shards * G that is at least `requested`."""
    unit = num_shards * views_per_iteration
    return -(-requested // unit) * unit


def deal_views(
    num_views: int, num_shards: int, seed: int, subject: str, round_index: int
) -> list[IndexArray]:
    """View ids of every shard in a round: a random partition into equal parts.

    Ids are sorted within a shard. That loses nothing, as batches are drawn at random, and gives a
    single shard the same order in every round.

    Raises:
        ValueError: `num_views` is no multiple of `num_shards`.
    """
    if num_views % num_shards:
        raise ValueError(f"{num_views} views cannot be dealt evenly to {num_shards} shards")
    permutation = derived_generator("deal", seed, subject, round_index).permutation(num_views)
    return [np.sort(part) for part in permutation.reshape(num_shards, -1).astype(np.int64)]


def initial_noise(
    view_ids: Sequence[int] | IndexArray, shape: tuple[int, int, int], seed: int, subject: str
) -> Tensor:
    """(n, 4, h, w) starting latents; those of a view depend on (seed, subject, view id) only."""
    return torch.stack([derived_normal(shape, "noise", seed, subject, int(v)) for v in view_ids])
