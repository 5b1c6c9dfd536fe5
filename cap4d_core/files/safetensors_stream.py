"""Writing safetensors one tensor at a time, so that memory does not grow with the file.

The library's writer takes all tensors at once, and leaves files of random names where a job is
killed; here only names, types and shapes are needed beforehand. Format: 8-byte little-endian header
length, JSON header with byte offsets, raw data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cap4d_core.files.basic import atomic_path

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors_stream(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `tensors` atomically; they must come in the order and with the shapes of `layout`.

    Args:
        path: the file.
        layout: name -> (type, shape) of all tensors. Tensors are converted to that type.
        tensors: (name, tensor) pairs, consumed one at a time.
        metadata: strings for the header.

    Raises:
        ValueError: a tensor that does not fit the layout.
    """
    # In order, so that equal results have equal bytes.
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # data must start at a multiple of 8

    expected = iter(layout.items())
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little"))
        handle.write(encoded)
        for name, tensor in tensors:
            wanted, (dtype, shape) = next(expected, ("nothing more", (torch.float32, ())))
            if name != wanted or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"got {name} {tuple(tensor.shape)}, expected {wanted} {shape}")
            flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            if flat.numel():
                handle.write(flat.view(torch.uint8).numpy().data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"tensor {missing[0]} was not given")
