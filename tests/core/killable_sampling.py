"""Runs one shard once per line of standard input, each time in a forked child that may be killed.

Forking after the imports saves most of the time that a fresh process would take.
"""

from __future__ import annotations

import os
import sys

import torch

import cap4d_core.diffusion.sampling as sampling
from cap4d_core.progress import Progress
from cap4d_core.settings import SamplingSettings


def run_child(arguments: list[str]) -> None:
    """Samples round 1, shard 0, telling every step."""
    plan, latents, mmdm, head_model, output, settings, *previous = arguments

    def tell(progress: Progress) -> None:
        print(f"step {progress.done}", flush=True)

    torch.set_num_threads(int(os.environ["CAP4D_TEST_THREADS"]))
    sampling.sample_views(
        plan, latents, mmdm, head_model, previous, output, 1, 0,
        SamplingSettings.model_validate_json(settings), callback=tell,
    )  # fmt: skip


def main() -> None:
    """Serves until standard input ends."""
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_child(sys.argv[1:])
                status = 0
            finally:
                os._exit(status)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"end {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
