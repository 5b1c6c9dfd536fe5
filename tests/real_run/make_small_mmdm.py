"""A small checkpoint in the layout of the released one, from the reference weights of the tests.

The weights are random: images made with them mean nothing. What a run with them shows is that the
import of checkpoints, real fits and the whole chain of stages work together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from cap4d_core.diffusion.released_layout import write_released_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens" / "mmdm"
PARTS = (
    ("network", "C_unet_small_weights.npz", "model.diffusion_model."),
    ("autoencoder", "D_vae_small_weights.npz", "first_stage_model."),
)


def write_small_checkpoint(folder: Path) -> Path:
    """Writes `config_dump.yaml` and `checkpoints/small.ckpt`; returns the folder."""
    manifest = json.loads((GOLDENS / "manifest.json").read_text())
    notes = {entry["file"]: entry["notes"] for entry in manifest["files"]}
    # The network takes any size; small images, so that a CPU is enough: 16 x 8 = 128 pixels.
    notes["C_unet_small_weights.npz"]["image_size"] = 16
    state, config = {}, {}
    for part, name, prefix in PARTS:
        with np.load(GOLDENS / name) as arrays:
            for key in arrays:
                state[prefix + key] = torch.from_numpy(arrays[key].astype(np.float32))
        config[part] = {"params": notes[name]}
    # No tables of the conditioning renderer: those of the head model are then taken.
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config_dump.yaml").write_text(yaml.safe_dump(config))
    write_released_checkpoint(folder / "checkpoints" / "small.ckpt", state)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/small_mmdm"))
    arguments = parser.parse_args()
    if not (arguments.folder / "checkpoints" / "small.ckpt").exists():
        write_small_checkpoint(arguments.folder)
    print(arguments.folder)
