"""A folder of networks that replace shipped ones, as tools/convert_face_models.py writes it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def own_networks(folder: Path, changes: dict[str, object] | None = None) -> Path:
    """Writes a folder with one segmentation network, which takes bright pixels for people.

    `changes` go into its description.
    """
    description = {
        "input": 0, "input_shape": [1, 64, 48, 3], "outputs": {"out": 2},
        "operations": [
            {"op": "CONV_2D", "inputs": [0, 1, 3], "outputs": [2], "stride": [1, 1],
             "padding": "same", "dilation": [1, 1], "activation": "none"},
        ],
    }  # fmt: skip
    folder.mkdir(parents=True)
    # Two classes, background and person: their logits are minus and plus the brightness.
    kernel = torch.tensor([-20.0, 20.0]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1).contiguous()
    save_file({"1": kernel, "3": torch.zeros(2)}, folder / "selfie_segmentation.safetensors")
    text = json.dumps({**description, **(changes or {})})
    (folder / "selfie_segmentation.json").write_text(text)
    hashes = {
        key: hashlib.sha256((folder / f"selfie_segmentation{end}").read_bytes()).hexdigest()
        for key, end in (("graph_sha256", ".json"), ("weights_sha256", ".safetensors"))
    }
    (folder / "provenance.json").write_text(json.dumps({"models": {"selfie_segmentation": hashes}}))
    return folder
