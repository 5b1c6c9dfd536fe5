"""Converts the face models of the mediapipe wheel to the graph format of the built-in tracker.

The converted files are committed (cap4d_core/tracking/models), so users never need this. To redo:

    pip install ai-edge-litert==2.3.0
    pip download --no-deps mediapipe==0.10.21 -d wheel
    python tools/convert_face_models.py wheel/mediapipe-0.10.21-*.whl cap4d_core/tracking/models

Other models of the same kind, e.g. a larger one that separates people from the background, make a
folder that tracking.networks can name, and, with --zip, a file that tracking.networks_url can:

    python tools/convert_face_models.py --model selfie_segmentation=larger.tflite my_networks --zip

A model becomes `<name>.json` (operations in order) and `<name>.safetensors` (its constants, float16
where the original has float16, sparse ones made dense, convolution kernels in torch's layout).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers
from safetensors.torch import save_file

FOLDER = "mediapipe/modules/"
MODELS = {
    "face_detection_short_range": "face_detection/face_detection_short_range",
    "face_detection_full_range": "face_detection/face_detection_full_range_sparse",
    "face_landmarks": "face_landmark/face_landmark_with_attention",
    "selfie_segmentation": "selfie_segmentation/selfie_segmentation",
}
_DTYPES = {0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_}
_OPERATORS = {
    value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)
}
_ACTIVATIONS = {0: "none", 1: "relu", 2: "relu_n1_to_1", 3: "relu6"}
_PADDINGS = {0: "same", 1: "valid"}


def densify(values: np.ndarray, tensor: Any) -> np.ndarray:
    """Expands a tensor in TFLite's block-sparse storage (traversal order, blocks, CSR levels)."""
    sparsity = tensor.sparsity
    order = list(sparsity.traversalOrder)
    rank = len(tensor.shape)
    blocks = [] if sparsity.blockMap is None else list(sparsity.blockMap)
    levels = sparsity.dimMetadata
    sizes = [levels[rank + k].denseSize for k in range(len(blocks))]
    dense = np.zeros(tensor.shape, values.dtype)
    position = 0

    def visit(level: int, parent: int, index: list[int]) -> None:
        nonlocal position
        if level == len(levels):
            full = [0] * rank
            for place in range(rank):
                full[order[place]] = index[place]
            for k, dimension in enumerate(blocks):
                full[dimension] = full[dimension] * sizes[k] + index[rank + k]
            dense[tuple(full)] = values[position]
            position += 1
            return
        metadata = levels[level]
        if metadata.format == 0:
            for j in range(metadata.denseSize):
                visit(level + 1, parent * metadata.denseSize + j, [*index, j])
        else:
            segments, indices = metadata.arraySegments.values, metadata.arrayIndices.values
            for j in range(segments[parent], segments[parent + 1]):
                visit(level + 1, j, [*index, int(indices[j])])

    visit(0, 0, [])
    if position != len(values):
        raise ValueError(f"{position} of {len(values)} sparse values placed")
    return dense


def options_of(name: str, operator: Any) -> dict[str, Any]:
    """The attributes of an operator that the executor needs, by plain names."""
    options = operator.builtinOptions
    if name == "Convolution2DTransposeBias":
        _, width, height = np.frombuffer(bytes(operator.customOptions)[:12], np.int32).tolist()
        return {"stride": [height, width]}
    if operator.customOptions is not None and len(operator.customOptions):
        return dict(flexbuffers.Loads(bytes(operator.customOptions)))
    found: dict[str, Any] = {}
    if hasattr(options, "strideH"):
        found["stride"] = [options.strideH, options.strideW]
    if hasattr(options, "padding"):
        found["padding"] = _PADDINGS[options.padding]
    if hasattr(options, "dilationHFactor"):
        found["dilation"] = [options.dilationHFactor, options.dilationWFactor]
    if hasattr(options, "filterHeight"):
        found["kernel"] = [options.filterHeight, options.filterWidth]
    if hasattr(options, "fusedActivationFunction"):
        found["activation"] = _ACTIVATIONS[options.fusedActivationFunction]
    if name == "RESIZE_BILINEAR":
        found["align_corners"] = bool(options.alignCorners)
        found["half_pixel_centers"] = bool(options.halfPixelCenters)
    if name == "DEPTH_TO_SPACE":
        found["block_size"] = options.blockSize
    if name == "CONCATENATION":
        found["axis"] = options.axis
    if name == "STRIDED_SLICE":
        found["begin_mask"], found["end_mask"] = options.beginMask, options.endMask
    return found


def convert(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Graph description and constants of one TFLite model with a single input."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    graph = model.subgraphs[0]
    constants: dict[int, torch.Tensor] = {}
    for number, tensor in enumerate(graph.tensors):
        content = model.buffers[tensor.buffer].data
        if content is None or not len(content):
            continue
        values = np.frombuffer(bytes(content), _DTYPES[tensor.type])
        if tensor.sparsity is None:
            values = values.reshape(tensor.shape if len(tensor.shape) else ())
        else:
            values = densify(values, tensor)
        constants[number] = torch.from_numpy(values.copy())

    operations = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        name = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if name == "CUSTOM":
            name = code.customCode.decode()
        inputs = [int(i) for i in operator.inputs]
        outputs = [int(i) for i in operator.outputs]
        if name in ("DEQUANTIZE", "DENSIFY") and inputs[0] in constants:
            constants[outputs[0]] = constants[inputs[0]]
            continue
        entry = {"op": name, "inputs": inputs, "outputs": outputs, **options_of(name, operator)}
        if name == "RESHAPE":
            entry["shape"] = [int(s) for s in graph.tensors[outputs[0]].shape]
            entry["inputs"] = inputs[:1]
        operations.append(entry)

    # Small integer constants (paddings, slices, sizes) are attributes rather than tensors.
    for entry in operations:
        if entry["op"] == "PAD":
            entry["paddings"] = constants[entry["inputs"].pop(1)].tolist()
        elif entry["op"] == "RESIZE_BILINEAR":
            entry["size"] = constants[entry["inputs"].pop(1)].tolist()
        elif entry["op"] == "STRIDED_SLICE":
            begin, end, stride = (constants[i].tolist() for i in entry["inputs"][1:])
            entry.update(begin=begin, end=end, strides=stride, inputs=entry["inputs"][:1])
    kernels: dict[int, tuple[int, ...]] = {}
    for entry in operations:
        if entry["op"] == "CONV_2D":
            kernels[entry["inputs"][1]] = (0, 3, 1, 2)
        elif entry["op"] in ("DEPTHWISE_CONV_2D", "Convolution2DTransposeBias"):
            kernels[entry["inputs"][1]] = (3, 0, 1, 2)
    for number, order in kernels.items():
        constants[number] = constants[number].permute(*order).contiguous()
    used = {i for entry in operations for i in entry["inputs"]}
    description = {
        "input": int(graph.inputs[0]),
        "input_shape": [int(s) for s in graph.tensors[graph.inputs[0]].shape],
        "outputs": {graph.tensors[i].name.decode(): int(i) for i in graph.outputs},
        "operations": operations,
    }
    return description, {str(i): constants[i] for i in sorted(used & set(constants))}


def write_model(name: str, source: str, data: bytes, output: Path) -> dict[str, str]:
    """Converts one model into a folder; returns its entry in provenance.json."""
    description, constants = convert(data)
    weights = output / f"{name}.safetensors"
    save_file(constants, weights)
    text = json.dumps(description, separators=(",", ":")) + "\n"
    (output / f"{name}.json").write_text(text, "utf-8")
    return {
        "source": source,
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "graph_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Converts the models of a wheel, or single files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?", help="mediapipe 0.10.21")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE.tflite")
    parser.add_argument("--zip", action="store_true", help="also write OUTPUT.zip")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    models = {}
    for entry in arguments.model:
        name, _, file = entry.partition("=")
        if name not in MODELS:
            parser.error(f"{name} is none of {', '.join(MODELS)}")
        models[name] = write_model(name, Path(file).name, Path(file).read_bytes(), output)
    provenance = {"models": models}
    if arguments.wheel is not None:
        provenance = {"package": arguments.wheel.name, "licence": "Apache-2.0", **provenance}
        with zipfile.ZipFile(arguments.wheel) as wheel:
            for name, member in MODELS.items():
                path = FOLDER + member + ".tflite"
                if name not in models:
                    models[name] = write_model(name, path, wheel.read(path), output)
            licence = wheel.read("mediapipe-0.10.21.dist-info/LICENSE")
            (output / "LICENSE").write_bytes(licence)
    (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    if arguments.zip:
        archive = output.with_name(output.name + ".zip")
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
            for path in sorted(output.iterdir()):
                content.write(path, path.name)
        print(f"{archive}: SHA-256 {hashlib.sha256(archive.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
