"""A training run of seconds, here or in a process that is killed in the middle.

python -m tests.core.training_runs OUTPUT STEP    # dies after that step of the denoiser
    python -m tests.core.training_runs wait FOLDER  # two processes that do nothing
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from cap4d_core.avatar.lpips import Lpips
from cap4d_core.demo.family import subject_pool
from cap4d_core.diffusion.training.launch import launch
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.train import train_mmdm
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.training_settings import TrainingSettings

STEPS, CHECKPOINT_EVERY = 7, 3
PACE = {
    "batch_size": 2,
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every": CHECKPOINT_EVERY,
    "sample_every": 4,
}
# Two people at 32 pixels, everything from scratch.
SETTINGS = TrainingSettings.model_validate(
    {
        "name": "tiny",
        "data": {
            "demo_subjects": 2, "demo_views": 5, "demo_validation": 0, "demo_supersample": 1,
        },
        "model": {
            "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1,
            "attention_levels": [1], "head_channels": 8, "norm_groups": 8, "views_per_call": 4,
            "latent_size": 16,
            "autoencoder": {
                "base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4,
            },
        },
        "train_autoencoder": True,
        "autoencoder": {**PACE, "steps": 3, "perceptual_weight": 0.5, "ema_decay": 0.9},
        "denoiser": {
            **PACE, "steps": STEPS, "reference_weights": [1, 1], "ema_decay": 0.9,
            "learning_rate": 1e-3, "sample_steps": 2, "sample_guidance": 1.0, "accumulate": 2,
        },
    }
)  # fmt: skip


def random_lpips() -> Lpips:
    """The network without its published weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Lpips()
        with torch.no_grad():
            for head in network.heads:
                head.uniform_(0.0, 1.0)
    return network


def train(output: Path, callback: ProgressCallback | None = None) -> None:
    """Trains into a folder, or goes on in it."""
    train_mmdm(
        SETTINGS,
        output / "no_head_model",  # procedural people bring their own
        output,
        make_perceptual=random_lpips,
        callback=callback,
    )


def wait_for_ever(group: Group, device: torch.device, folder: Path) -> None:
    """Says who it is and who makes people for it, as in training."""
    with subject_pool(1) as pool:
        worker = pool.submit(os.getpid).result()
        (folder / f"{group.rank}.part").write_text(f"{os.getpid()} {worker}")
        os.replace(folder / f"{group.rank}.part", folder / f"{group.rank}.txt")
        time.sleep(600)


def main() -> None:
    if sys.argv[1] == "wait":
        launch(wait_for_ever, (Path(sys.argv[2]),), 2, torch.device("cpu"), 2)
        return
    output, last = Path(sys.argv[1]), int(sys.argv[2])

    def die(progress: Progress) -> None:
        if progress.total == STEPS and progress.done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    train(output, die)


if __name__ == "__main__":
    main()
