"""Single layers of the denoiser in 16 and in 8 bits, without the making of 8-bit numbers.

    python -m benchmarks.float8_layers [--size released|small] [--json FILE]

Sizes are those of four batches of views with one reference: convolutions of the resnets and
products of the transformers. On a CPU, where 8 bits are imitated in float32, only `--size small`
makes sense, and only to see that it runs. Where nvidia-cudnn-frontend (1.27) is installed,
attention as well, which the denoiser computes in 16 bits: torch gives no access to cuDNN's in 8.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.denoiser import measure
from cap4d_core.diffusion.float8_convolution import Float8Convolution, convolve
from cap4d_core.diffusion.float8_linear import TYPE, Float8Product, quantise

# Images, their side, channels in and out.
CONVOLUTIONS = (
    (56, 64, 320, 320), (56, 64, 640, 320), (64, 32, 640, 640), (64, 32, 1280, 640),
    (64, 16, 1280, 1280), (64, 16, 2560, 1280), (64, 8, 1280, 1280),
)  # fmt: skip
# Tokens and channels of a level; inputs and outputs of its layers as multiples of them.
LEVELS = ((229376, 320), (65536, 640), (16384, 1280), (4096, 1280))
PRODUCTS = ((1, 3), (1, 1), (1, 8), (4, 1))
# Samples, heads and tokens of each.
ATTENTION = ((56, 5, 4096), (8, 10, 8192), (8, 20, 2048), (8, 20, 512))
HEAD_CHANNELS = 64
# Calls that are timed at once.
AT_ONCE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["released", "small"], default="released")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = arguments.size == "small"
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for images, side, inputs, outputs in CONVOLUTIONS[-1:] if small else CONVOLUTIONS:
            sizes = (2, side, 64, 48) if small else (images, side, inputs, outputs)
            rows.append(report("convolution", sizes, *convolution(*sizes, device), device))
        for tokens, channels in LEVELS[-1:] if small else LEVELS:
            for inputs, outputs in PRODUCTS:
                sizes = (tokens, inputs * channels, outputs * channels)
                if small:
                    sizes = (64, 32 * inputs, 32 * outputs)
                rows.append(report("product", sizes, *product(*sizes, device), device))
        if device.type == "cuda" and importlib.util.find_spec("cudnn"):
            for sizes in ATTENTION:
                rows.append(report("attention", sizes, *attention(*sizes, device), device))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def convolution(
    images: int, side: int, inputs: int, outputs: int, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    features = torch.randn(images, inputs, side, side, device=device, dtype=torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3, device=device) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, device=device, dtype=torch.bfloat16)
    coarse, pixels = Float8Convolution(weight), features.permute(0, 2, 3, 1).to(TYPE)
    half = weight.bfloat16().contiguous(memory_format=torch.channels_last)
    return (
        lambda: F.conv2d(features, half, bias, padding=1),
        lambda: convolve(pixels, coarse.weight, coarse.scale, bias),
    )


def product(
    tokens: int, inputs: int, outputs: int, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    values = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    coarse, (numbers, scale) = Float8Product(weight), quantise(values)
    return (
        lambda: F.linear(values, weight),
        lambda: coarse.multiply(numbers, scale, torch.bfloat16),
    )


def attention(
    samples: int, heads: int, tokens: int, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Torch's in 16 bits, and cuDNN's with everything in 8 bits and of scale 1."""
    import cudnn

    shape = (samples, tokens, 3, heads, HEAD_CHANNELS)
    packed = torch.randn(shape, device=device, dtype=torch.bfloat16)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    coarse = [part.transpose(1, 2) for part in packed.to(TYPE).unbind(2)]
    attended = torch.empty_like(coarse[0])
    one = torch.ones(1, 1, 1, 1, device=device)
    sizes = [torch.empty_like(one) for _ in range(2)]

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kinds = {TYPE: cudnn.data_type.FP8_E4M3, torch.float32: cudnn.data_type.FLOAT}
    graph = cudnn.pygraph(
        handle=handle, io_data_type=kinds[TYPE], intermediate_data_type=kinds[torch.float32],
        compute_data_type=kinds[torch.float32],
    )  # fmt: skip
    inputs = [
        graph.tensor(
            name=str(i), dim=list(t.shape), stride=list(t.stride()), data_type=kinds[t.dtype]
        )
        for i, t in enumerate([*coarse, *[one] * 6])
    ]
    out, _, *largest = graph.sdpa_fp8(*inputs, generate_stats=False, attn_scale=HEAD_CHANNELS**-0.5)
    outputs = list(zip((out, *largest), (attended, *sizes), strict=True))
    for node, t in outputs:
        node.set_output(True).set_dim(list(t.shape)).set_stride(list(t.stride()))
        node.set_data_type(kinds[t.dtype])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    tensors = dict(zip(inputs, [*coarse, *[one] * 6], strict=True)) | dict(outputs)
    space = torch.empty(max(1, graph.get_workspace_size()), device=device, dtype=torch.uint8)

    def eight() -> Tensor:
        graph.execute(tensors, space, handle=handle)
        return attended

    exact = F.scaled_dot_product_attention(q, k, v).float()
    error = (eight().float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.1, f"attention in 8 bits differs by {error:.3f} of its size"
    return lambda: F.scaled_dot_product_attention(q, k, v), eight


def report(
    kind: str,
    sizes: tuple[int, ...],
    half: Callable[[], Tensor],
    coarse: Callable[[], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Milliseconds of both forms; printed."""
    times = [
        measure(lambda: [call() for _ in range(AT_ONCE)], device) / AT_ONCE  # noqa: B023
        for call in (half, coarse)
    ]
    print(
        f"{kind:12} {' x '.join(map(str, sizes)):26} {times[0]:8.3f} ms in 16 bits "
        f"{times[1]:8.3f} ms in 8 bits",
        flush=True,
    )
    return {"kind": kind, "sizes": sizes, "bf16_ms": times[0], "fp8_ms": times[1]}


if __name__ == "__main__":
    main()
