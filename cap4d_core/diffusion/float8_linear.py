"""Linear layers that multiply 8-bit numbers: half the bytes, up to twice the rate of 16 bits.

Numbers are e4m3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022): 4 bits of exponent, 3
of mantissa, up to 448. Every row of activations and every output channel of the weights has a scale
of its own, so outliers of one do not coarsen the others; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
# Compute capability of CUDA devices that multiply them, from Ada on.
LEAST_CAPABILITY = (8, 9)
# What the hardware's kernels ask of both sides of a weight.
_MULTIPLE = 16


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

    def forward(self, tokens: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., n) in the type of `tokens` (..., K); `rows` takes a part of the N channels."""
        flat, scale = quantise(tokens.flatten(0, -2))
        weight, weight_scale = self.weight[rows], self.scale[rows]
        if tokens.is_cuda:
            product = torch._scaled_mm(
                flat, weight.t(), scale, weight_scale[None], out_dtype=tokens.dtype,
                use_fast_accum=True,
            )  # fmt: skip
        else:  # the same numbers, multiplied in float32
            product = flat.float() @ weight.float().t() * scale * weight_scale
        return product.to(tokens.dtype).unflatten(0, tokens.shape[:-1])


def fits(weight: Tensor) -> bool:
    """Whether a layer's (N, K) weight can be multiplied in 8 bits."""
    return weight.ndim == 2 and all(side % _MULTIPLE == 0 for side in weight.shape)


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers (n, K) and the float32 scales (n, 1) that they are to be multiplied by."""
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (values / scale).to(TYPE), scale
