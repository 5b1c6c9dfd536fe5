"""The face networks of the built-in tracker: where they come from, and loading them.

They are shipped with the package (`models/`), converted from mediapipe 0.10.21 (Apache-2.0; see
models/LICENSE and models/provenance.json, which lists the source files and all checksums). Nothing
is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, require_file, sha256_file
from cap4d_core.tracking.tflite_graph import GraphNetwork

ModelName = Literal[
    "face_detection_short_range",
    "face_detection_full_range",
    "face_landmarks",
    "selfie_segmentation",
]

MODEL_FOLDER = Path(__file__).parent / "models"


def load_face_model(
    name: ModelName, device: str | torch.device = "cpu", folder: Path = MODEL_FOLDER
) -> GraphNetwork:
    """Loads one of the shipped networks after checking its files against their checksums.

    Raises:
        InputFileError: a file is missing, damaged or unknown.
    """
    hint = "Install the package again (pip install --force-reinstall)."
    provenance = read_json(folder / "provenance.json", "the list of the face networks")
    entry = provenance.get("models", {}).get(name)
    if entry is None:
        raise InputFileError(folder / "provenance.json", f"no entry '{name}'", f"'{name}'", hint)
    for suffix, key in ((".json", "graph_sha256"), (".safetensors", "weights_sha256")):
        path = require_file(folder / (name + suffix), "a face network", hint)
        found = sha256_file(path)
        if found != entry[key]:
            raise InputFileError(
                path, f"SHA-256 {found[:16]}...", f"{entry[key][:16]}... (provenance.json)", hint
            )
    return GraphNetwork.load(folder, name).to(device).eval()
