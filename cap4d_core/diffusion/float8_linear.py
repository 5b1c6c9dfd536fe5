"""Linear layers that multiply 8-bit numbers: half the bytes, up to twice the rate of 16 bits.

Numbers are e4m3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022): 4 bits of exponent, 3
of mantissa, up to 448. Every row of activations and every output channel of the weights has a scale
of its own, so outliers of one do not coarsen the others; sums are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
# Of rows that are zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Compute capability of CUDA devices that multiply them, from Ada on.
LEAST_CAPABILITY = (8, 9)
# What the hardware's kernels ask of both sides of a weight.
MULTIPLE = 16
# From so many inputs on products gain more than the making of the numbers costs, as measured on an
# H200; see benchmarks/README.md.
_WORTH_INPUTS = 512


class Float8Product(nn.Module):
    """Products of tokens with the weights of one linear layer, or of several joined.

    Args:
        weight: (N, K), both multiples of 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantised, scale = quantise(weight.detach())
        self.register_buffer("weight", quantised, persistent=False)
        self.register_buffer("scale", scale.squeeze(-1), persistent=False)

    def forward(
        self, tokens: Tensor, rows: slice = slice(None), bias: Tensor | None = None
    ) -> Tensor:
        """(..., n) in the type of `tokens` (..., K); `rows` takes a part of the N channels."""
        flat, scale = quantise(tokens.flatten(0, -2))
        product = self.multiply(flat, scale, tokens.dtype, rows, bias)
        return product.unflatten(0, tokens.shape[:-1])

    def multiply(
        self,
        quantised: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        rows: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """(M, n) from 8-bit (M, K) and their (M, 1) scales; `bias` (n,) is added."""
        weight, weight_scale = self.weight[rows], self.scale[rows]
        if quantised.is_cuda:
            return torch._scaled_mm(
                quantised, weight.t(), scale, weight_scale[None], bias=bias, out_dtype=dtype,
                use_fast_accum=True,
            )  # fmt: skip
        # The same numbers, multiplied in float32.
        product = quantised.float() @ weight.float().t() * scale * weight_scale
        return (product if bias is None else product + bias.float()).to(dtype)


def fits(weight: Tensor) -> bool:
    """Whether a layer's (N, K) weight can be multiplied in 8 bits, and on a GPU gains by it.

    Small and square layers lose more to the making of the numbers than their product gains.
    """
    if weight.ndim != 2:
        return False
    outputs, inputs = weight.shape
    possible = outputs % MULTIPLE == inputs % MULTIPLE == 0
    worth_it = inputs >= _WORTH_INPUTS and max(outputs, inputs) >= 3 * min(outputs, inputs)
    return possible and (worth_it or not weight.is_cuda)


@torch.library.custom_op("cap4d_core::gate_float8", mutates_args=())
def gate(product: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit GEGLU (Shazeer, GLU Variants Improve Transformer, 2020), as `quantise` would give.

    Args:
        product: (M, 2 K), values before gates.

    Returns:
        (M, K) numbers and (M, 1) scales.
    """
    if product.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.gate(product)
    values, gates = product.chunk(2, dim=-1)
    return quantise(values * F.gelu(gates))


@gate.register_fake
def _(product: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = product.shape
    scale = product.new_empty((rows, 1), dtype=torch.float32)
    return product.new_empty((rows, width // 2), dtype=TYPE), scale


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers (n, K) and the float32 scales (n, 1) that they are to be multiplied by."""
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    scale = largest.clamp(min=SMALLEST_SCALE * LARGEST) / LARGEST
    return (values / scale).to(TYPE), scale
