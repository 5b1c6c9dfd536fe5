"""The face networks of the built-in tracker: where they come from, and loading them.

They are shipped with the package (`models/`), converted from mediapipe 0.10.21 (Apache-2.0; see
models/LICENSE and models/provenance.json, which lists the source files and all checksums). Other
ones, e.g. larger, can take their places: a folder of the same kind (tracking.networks), made by
tools/convert_face_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

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


MODEL_NAMES: tuple[ModelName, ...] = get_args(ModelName)
# Side of the input of the detectors, whose anchors belong to it.
_FIXED_INPUTS = {"face_detection_short_range": 128, "face_detection_full_range": 192}
_OUTPUTS = {
    "face_detection_short_range": {"classificators", "regressors"},
    "face_detection_full_range": {"Identity", "Identity_1"},
    "face_landmarks": {
        "output_mesh_identity", "output_lips", "output_left_eye", "output_right_eye",
        "output_left_iris", "output_right_iris", "conv_faceflag",
    },
}  # fmt: skip


def listed_models(folder: Path) -> dict[str, dict[str, str]]:
    """Names and checksums of the networks in a folder.

    Raises:
        InputFileError: no provenance.json, or none that lists networks.
    """
    path = folder / "provenance.json"
    content = read_json(path, "the list of the face networks")
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict):
        raise InputFileError(path, "no 'models'", "a list made by tools/convert_face_models.py")
    return models


def load_face_model(
    name: ModelName, device: str | torch.device = "cpu", networks: str | Path | None = None
) -> GraphNetwork:
    """Loads a network after checking its files against their checksums.

    Args:
        name: what it does.
        device: where it runs.
        networks: folder with networks that replace shipped ones of the same name.

    Raises:
        InputFileError: a file is missing, damaged or unknown, or no network for this purpose.
    """
    own = None if networks is None else Path(networks)
    if own is not None and name in listed_models(own):
        network = _load(name, own, "Convert it again with tools/convert_face_models.py.")
        _check_interface(name, network, own / f"{name}.json")
        return network.to(device).eval()
    hint = "Install the package again (pip install --force-reinstall)."
    return _load(name, MODEL_FOLDER, hint).to(device).eval()


def _check_interface(name: str, network: GraphNetwork, path: Path) -> None:
    side = _FIXED_INPUTS.get(name)
    if side is not None and network.input_size != (side, side):
        raise InputFileError(path, f"input {network.input_size}", f"({side}, {side})")
    missing = _OUTPUTS.get(name, set()) - set(network.outputs)
    if missing:
        raise InputFileError(
            path, f"outputs {', '.join(network.outputs)}", f"also {', '.join(sorted(missing))}"
        )
    if name == "selfie_segmentation" and len(network.outputs) != 1:
        raise InputFileError(path, f"{len(network.outputs)} outputs", "one: (1, H, W, classes)")


def _load(name: str, folder: Path, hint: str) -> GraphNetwork:
    entry = listed_models(folder).get(name)
    if entry is None:
        raise InputFileError(folder / "provenance.json", f"no entry '{name}'", f"'{name}'", hint)
    for suffix, key in ((".json", "graph_sha256"), (".safetensors", "weights_sha256")):
        path = require_file(folder / (name + suffix), "a face network", hint)
        found = sha256_file(path)
        if found != entry[key]:
            raise InputFileError(
                path, f"SHA-256 {found[:16]}...", f"{entry[key][:16]}... (provenance.json)", hint
            )
    return GraphNetwork.load(folder, name)
