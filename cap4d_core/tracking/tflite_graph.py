"""Runs the small face networks, stored as a list of operations and their constants, with torch.

The files come from TFLite models (tools/convert_face_models.py). Running them on torch costs no
further dependency, takes batches, and works on every device.

Conventions: tensors are (B, H, W, C) as in TFLite. They are kept so that the channel is contiguous,
which makes the change to torch's (B, C, H, W) around convolutions free of charge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, read_safetensors

Attributes = dict[str, Any]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu_n1_to_1": lambda x: x.clamp(-1.0, 1.0),
    "relu6": lambda x: x.clamp(0.0, 6.0),
}


class GraphNetwork(nn.Module):
    """A converted network with one input and named outputs.

    Attributes:
        input_size: (height, width) it takes.
    """

    def __init__(self, description: dict[str, Any], constants: dict[str, Tensor]) -> None:
        """Builds the network; `load` is the usual way.

        Args:
            description: content of the .json file.
            constants: content of the .safetensors file.

        Raises:
            ValueError: an operation is unknown or a tensor is used before it exists.
        """
        super().__init__()
        self.input_id = int(description["input"])
        self.outputs: dict[str, int] = dict(description["outputs"])
        self.operations: list[Attributes] = description["operations"]
        _, height, width, _ = description["input_shape"]
        self.input_size = (int(height), int(width))
        for name, values in constants.items():
            values = values.float() if values.is_floating_point() else values
            self.register_buffer(f"constant_{name}", values, persistent=False)
        known = {self.input_id, *(int(name) for name in constants)}
        for operation in self.operations:
            if operation["op"] not in _OPERATIONS:
                raise ValueError(f"unknown operation {operation['op']}")
            missing = set(operation["inputs"]) - known
            if missing:
                raise ValueError(f"{operation['op']} uses tensor {min(missing)} before it exists")
            known.update(operation["outputs"])
        self._last_use = self._last_uses()

    @classmethod
    def load(cls, folder: str | Path, name: str) -> GraphNetwork:
        """Loads `<name>.json` and `<name>.safetensors`.

        Raises:
            InputFileError: a file is missing or not what it should be.
        """
        path = Path(folder) / f"{name}.json"
        description = read_json(path, "the graph of a face network")
        constants, _ = read_safetensors(
            Path(folder) / f"{name}.safetensors", "weights of a face network"
        )
        try:
            return cls(description, constants)
        except (KeyError, ValueError, TypeError) as error:
            raise InputFileError(
                path, f"a graph that cannot be run ({error})", "a converted face network"
            ) from None

    def _last_uses(self) -> dict[int, int]:
        """Step after which a tensor is not needed any more."""
        last = {}
        for step, operation in enumerate(self.operations):
            for tensor in operation["inputs"]:
                last[tensor] = step
        for tensor in self.outputs.values():
            last[tensor] = len(self.operations)
        return last

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Runs a batch.

        Args:
            images: (B, H, W, 3) of `input_size`, scaled as the network expects.

        Returns:
            Outputs by name, each with the batch as first axis.
        """
        if tuple(images.shape[1:3]) != self.input_size:
            raise ValueError(f"images of {tuple(images.shape[1:3])}, expected {self.input_size}")
        tensors: dict[int, Tensor] = {self.input_id: images}
        for step, operation in enumerate(self.operations):
            inputs = [
                tensors[i] if i in tensors else self.get_buffer(f"constant_{i}")
                for i in operation["inputs"]
            ]
            result = _OPERATIONS[operation["op"]](inputs, operation)
            tensors[operation["outputs"][0]] = result
            for i in operation["inputs"]:
                if self._last_use[i] == step:
                    tensors.pop(i, None)
        return {name: tensors[i] for name, i in self.outputs.items()}


def _to_torch(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _from_torch(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _pad_same(
    x: Tensor, kernel: tuple[int, int], attributes: Attributes, value: float = 0.0
) -> Tensor:
    """TFLite's SAME padding of (B, C, H, W): what is odd goes to the lower right."""
    if attributes["padding"] == "valid":
        return x
    stride = attributes["stride"]
    dilation = attributes.get("dilation", (1, 1))
    amounts: list[int] = []
    for axis in (1, 0):
        size = x.shape[2 + axis]
        extent = (kernel[axis] - 1) * dilation[axis] + 1
        total = max((-(-size // stride[axis]) - 1) * stride[axis] + extent - size, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts, value=value) if any(amounts) else x


def _activate(x: Tensor, attributes: Attributes) -> Tensor:
    return _ACTIVATIONS[attributes.get("activation", "none")](x)


def _convolution(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    x = _to_torch(x)
    groups = x.shape[1] if attributes["op"] == "DEPTHWISE_CONV_2D" else 1
    x = _pad_same(x, (weight.shape[2], weight.shape[3]), attributes)
    y = F.conv2d(x, weight, bias, attributes["stride"], 0, attributes["dilation"], groups)
    return _activate(_from_torch(y), attributes)


def _transposed_convolution(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    y = F.conv_transpose2d(_to_torch(x), weight, bias, attributes["stride"])
    return _from_torch(y)


def _max_pool(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    kernel = tuple(attributes["kernel"])
    x = _pad_same(_to_torch(inputs[0]), kernel, attributes, value=float("-inf"))
    return _activate(_from_torch(F.max_pool2d(x, kernel, attributes["stride"])), attributes)


def _average_pool(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    kernel = tuple(attributes["kernel"])
    x = _pad_same(_to_torch(inputs[0]), kernel, attributes)
    return _activate(_from_torch(F.avg_pool2d(x, kernel, attributes["stride"])), attributes)


def _prelu(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    x, slope = inputs
    return torch.where(x > 0, x, x * slope)


def _pad(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    amounts = [side for axis in reversed(attributes["paddings"]) for side in axis]
    return F.pad(inputs[0], amounts)


def _resize_bilinear(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    if not (attributes["half_pixel_centers"] or attributes["align_corners"]):
        raise ValueError("bilinear resizing without half-pixel centres is not supported")
    y = F.interpolate(
        _to_torch(inputs[0]),
        size=tuple(attributes["size"]),
        mode="bilinear",
        align_corners=attributes["align_corners"],
    )
    return _from_torch(y)


def _depth_to_space(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    x, block = inputs[0], attributes["block_size"]
    batch, height, width, channels = x.shape
    channels //= block * block
    x = x.reshape(batch, height, width, block, block, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * block, width * block, channels)


def _reshape(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    # The stored shape is that of a batch of one.
    return inputs[0].reshape(len(inputs[0]), *attributes["shape"][1:])


def _concatenation(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    return torch.cat(inputs, attributes["axis"])


def _strided_slice(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    slices = [slice(None)]
    for axis in range(1, len(attributes["begin"])):
        begin = None if attributes["begin_mask"] >> axis & 1 else attributes["begin"][axis]
        end = None if attributes["end_mask"] >> axis & 1 else attributes["end"][axis]
        slices.append(slice(begin, end, attributes["strides"][axis]))
    return inputs[0][tuple(slices)]


def _landmarks_to_transform(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    """Affine maps (B, 4, 4) from the cells of an upright box to the picture.

    The box encloses a subset of the landmarks, enlarged, with the line between two of them level.
    """
    points = inputs[0][..., :2]
    line = points[:, attributes["right_rotation_idx"]] - points[:, attributes["left_rotation_idx"]]
    angle = attributes["target_rotation_radians"] + torch.atan2(line[:, 1], line[:, 0])
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    upright = points[:, attributes["subset_idxs"]] @ turn  # turned back: row vectors
    low, high = upright.amin(1), upright.amax(1)
    center = (turn @ ((low + high) / 2).unsqueeze(-1)).squeeze(-1)
    cells = points.new_tensor([attributes["output_width"], attributes["output_height"]])
    scale = (high - low) * points.new_tensor([attributes["scale_x"], attributes["scale_y"]]) / cells
    linear = turn * scale.unsqueeze(1)
    transform = torch.eye(4, device=points.device).repeat(len(points), 1, 1)
    transform[:, :2, :2] = linear
    transform[:, :2, 3] = center - (linear @ (cells / 2))
    return transform


def _transform_tensor(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    """Samples a feature map in the cells of a box, bilinear, zero outside."""
    features, transform = _to_torch(inputs[0]), inputs[1]
    height, width = attributes["output_height"], attributes["output_width"]
    rows = torch.arange(height, device=features.device, dtype=features.dtype)
    columns = torch.arange(width, device=features.device, dtype=features.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    cells = torch.stack([x, y], dim=-1).reshape(1, -1, 2)
    points = cells @ transform[:, :2, :2].transpose(1, 2) + transform[:, None, :2, 3]
    size = points.new_tensor([features.shape[3] - 1, features.shape[2] - 1])
    grid = (2.0 * points / size - 1.0).reshape(-1, height, width, 2)
    sampled = F.grid_sample(
        features, grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return _from_torch(sampled)


def _transform_landmarks(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    points, transform = inputs
    return points @ transform[:, :2, :2].transpose(1, 2) + transform[:, None, :2, 3]


_OPERATIONS: dict[str, Callable[[list[Tensor], Attributes], Tensor]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "Convolution2DTransposeBias": _transposed_convolution,
    "MAX_POOL_2D": _max_pool,
    "AVERAGE_POOL_2D": _average_pool,
    "ADD": lambda x, a: _activate(x[0] + x[1], a),
    "MUL": lambda x, a: _activate(x[0] * x[1], a),
    "RELU": lambda x, a: torch.relu(x[0]),
    "PRELU": _prelu,
    "HARD_SWISH": lambda x, a: F.hardswish(x[0]),
    "LOGISTIC": lambda x, a: torch.sigmoid(x[0]),
    "PAD": _pad,
    "RESIZE_BILINEAR": _resize_bilinear,
    "DEPTH_TO_SPACE": _depth_to_space,
    "RESHAPE": _reshape,
    "CONCATENATION": _concatenation,
    "STRIDED_SLICE": _strided_slice,
    "Landmarks2TransformMatrix": _landmarks_to_transform,
    "TransformTensorBilinear": _transform_tensor,
    "TransformLandmarks": _transform_landmarks,
}
