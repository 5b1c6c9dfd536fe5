"""A shard of sampling that tests kill, see `killable`."""

from __future__ import annotations

import cap4d_core.diffusion.sampling as sampling
from cap4d_core.settings import SamplingSettings
from tests.core.killable import serve, tell


def run(arguments: list[str]) -> None:
    """Samples round 1, shard 0, telling every step."""
    plan, latents, mmdm, head_model, output, settings, *previous = arguments
    sampling.sample_views(
        plan, latents, mmdm, head_model, previous, output, 1, 0,
        SamplingSettings.model_validate_json(settings), callback=tell,
    )  # fmt: skip


if __name__ == "__main__":
    serve(run)
