"""Which references and views share a network call, at every step of stochastic I/O sampling.

A grouping answers `step(i)` for the i-th executed step (0 = noisiest) with two index arrays:
references (n_its, R) and generated views (n_its, G), one row per network call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cap4d_core.diffusion.seeding import derived_generator

IndexArray = NDArray[np.int64]


class Grouping(Protocol):
    """Yields the batches of a step."""

    def step(self, index: int) -> tuple[IndexArray, IndexArray]:
        """Reference batches (n_its, R) and view batches (n_its, G) of step `index`."""
        ...


class SeededGrouping:
    """Fresh random batches at every step, as published, but each step seeded on its own.

    Views are partitioned at random into batches of G. Every batch gets R different references drawn
    anew; with R = 1 it is always reference 0, as published.

    Args:
        num_references: references there are.
        num_views: views of this shard, a multiple of `views_per_batch`.
        references_per_batch: R. views_per_batch: G.
        key: what the draws depend on besides the step, e.g. (seed, subject, round, shard).

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        num_references: int,
        num_views: int,
        references_per_batch: int,
        views_per_batch: int,
        key: Sequence[str | int],
    ) -> None:
        if not 1 <= references_per_batch <= num_references:
            raise ValueError(f"{references_per_batch} of {num_references} references per batch")
        if num_views % views_per_batch:
            raise ValueError(f"{num_views} views are no multiple of {views_per_batch} per batch")
        self.num_references = num_references
        self.num_views = num_views
        self.references_per_batch = references_per_batch
        self.views_per_batch = views_per_batch
        self.key = tuple(key)

    def step(self, index: int) -> tuple[IndexArray, IndexArray]:
        """Batches of step `index`."""
        generator = derived_generator("step", *self.key, index)
        batches = self.num_views // self.views_per_batch
        if self.references_per_batch == 1:
            references = np.zeros((batches, 1), np.int64)
        else:
            references = np.stack(
                [
                    generator.permutation(self.num_references)[: self.references_per_batch]
                    for _ in range(batches)
                ]
            )
        views = generator.permutation(self.num_views).reshape(batches, self.views_per_batch)
        return references.astype(np.int64), views.astype(np.int64)


class RecordedGrouping:
    """Batches from arrays: references (S, n_its, R) and views (S, n_its, G) in executed order."""

    def __init__(self, references: NDArray[Any], views: NDArray[Any]) -> None:
        if len(references) != len(views):
            raise ValueError(f"{len(references)} steps of references, {len(views)} of views")
        self.references = np.asarray(references, np.int64)
        self.views = np.asarray(views, np.int64)

    def step(self, index: int) -> tuple[IndexArray, IndexArray]:
        """Batches of step `index`."""
        return self.references[index], self.views[index]


def shard_key(
    seed: int, subject: str, num_shards: int, round_index: int, shard_index: int
) -> tuple[str | int, ...]:
    """What the groupings of a shard depend on besides the step.

    With one shard rounds must not matter: it is the published algorithm wherever it is cut.
    """
    if num_shards == 1:
        return (seed, subject)
    return (seed, subject, round_index, shard_index)
