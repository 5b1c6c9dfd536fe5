"""Where the denoising steps are cut into rounds.

Standard library only: the workflow needs the number of rounds before anything heavy is imported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from cap4d_core.errors import UserError


def round_boundaries(
    sync_steps: Sequence[float], steps_run: int, num_shards: int | None = None
) -> list[int]:
    """Steps at which a new round starts, the first round (step 0) left out.

    There is one round more than there are boundaries.

    Args:
        sync_steps: whole numbers are step indices, counted from the noisiest step 0; numbers
            between 0 and 1 are fractions of `steps_run`, rounded to the nearest step.
        steps_run: steps that are really run (`step_grid.ddim_step_count`).
        num_shards: with 1 there is nothing to exchange between shards, hence a single round.

    Returns:
        Sorted, without duplicates, without 0; fractions that round to the end are dropped.

    Raises:
        UserError: negative, neither whole nor a fraction, or an index past the last step.
    """
    boundaries = set()
    for value in sync_steps:
        if not math.isfinite(value) or value < 0 or (value > 1 and value != int(value)):
            raise UserError(
                f"sampling.sync_steps holds {value}: expected step indices (0, 1, 2, ...) or "
                "fractions of the steps between 0 and 1."
            )
        if value < 1:
            boundary = math.floor(value * steps_run + 0.5)
            boundary = 0 if boundary >= steps_run else boundary
        else:
            boundary = int(value)
            if boundary >= steps_run:
                raise UserError(
                    f"sampling.sync_steps holds step {boundary}, but only {steps_run} steps are "
                    f"run (0 to {steps_run - 1}). Leave it out or write fractions of the steps."
                )
        boundaries.add(boundary)
    boundaries.discard(0)
    return [] if num_shards == 1 else sorted(boundaries)


def round_steps(
    sync_steps: Sequence[float], steps_run: int, num_shards: int | None = None
) -> list[tuple[int, int]]:
    """(first step, step after the last) of every round."""
    edges = [0, *round_boundaries(sync_steps, steps_run, num_shards), steps_run]
    return list(itertools.pairwise(edges))
