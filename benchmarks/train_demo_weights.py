"""Trains the demo weights in slices of time: people, autoencoder, latents, denoiser, evaluation.

    python benchmarks/train_demo_weights.py --state /tmp/state --out out --seconds 580
    python benchmarks/train_demo_weights.py --state /tmp/state --out out --seconds 580 --last
    python benchmarks/train_demo_weights.py --assemble out cap4d_core/demo/weights

Every call goes on where the one before it stopped and leaves in --out the averaged weights
(bfloat16), metrics, curve and pictures, from which --warm-start can go on where the state is lost.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Inside the guard: worker processes import this file and need nothing of it.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    from demo_weights.recipe import main

    main()
