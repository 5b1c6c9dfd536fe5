"""3 x 3 convolutions of 8-bit numbers, for inference.

Numbers are e4m3, see `float8_linear`. Inputs are what follows group norm and SiLU, whose size is
known beforehand, so one scale serves all of them; every output channel of the weights has its own.
On CUDA by Triton (`triton_kernels`); elsewhere the same numbers are multiplied in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.diffusion.float8_linear import LARGEST, MULTIPLE, TYPE, quantise
from cap4d_core.diffusion.fused_pointwise import factors

# Inputs are multiplied by this: up to 28 before they saturate, 0.001 before they lose digits.
INPUT_SCALE = 16.0
# CUDA devices with the tensor memory accelerator, which the kernel needs: from Hopper on.
LEAST_CAPABILITY = (9, 0)
# Sides of pictures must be multiples of this: tiles of the kernel.
_TILE = 8


class Float8Convolution(nn.Module):
    """A 3 x 3 convolution with padding.

    Args:
        weight: (N, C, 3, 3), N and C multiples of 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantised, scale = quantise(weight.detach().flatten(1))
        taps = quantised.float().unflatten(1, weight.shape[1:]).permute(2, 3, 0, 1).flatten(0, 1)
        self.register_buffer("weight", taps.contiguous().to(TYPE), persistent=False)
        self.register_buffer("scale", scale.squeeze(-1) / INPUT_SCALE, persistent=False)

    def forward(self, features: Tensor, norm: nn.GroupNorm, bias: Tensor) -> Tensor:
        """(B, N, H, W) of `norm` and SiLU of (B, C, H, W), both channels last; `bias` (N,)."""
        factor, offset = factors(features, norm)
        pixels = features.permute(0, 2, 3, 1).contiguous()
        activated = activate(pixels, factor, offset)
        return convolve(activated, self.weight, self.scale, bias).permute(0, 3, 1, 2)


def is_possible(layer: nn.Conv2d) -> bool:
    """Whether a layer's weights can be 8-bit ones where they are."""
    weight = layer.weight
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < LEAST_CAPABILITY:
        return False
    return _are_multiples(weight)


def fits(layer: nn.Conv2d, features: Tensor) -> bool:
    """Whether a layer can be one in 8 bits for such inputs.

    Asked within the network, which is compiled: by sizes alone, the device is asked beforehand.
    """
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding == (1, 1)
        and _are_multiples(layer.weight)
        and all(side % _TILE == 0 for side in features.shape[-2:])
    )


def _are_multiples(weight: Tensor) -> bool:
    return all(n % MULTIPLE == 0 for n in weight.shape[:2])


@torch.library.custom_op("cap4d_core::activate_float8", mutates_args=())
def activate(pixels: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """8-bit SiLU of (B, H, W, C) times `factor` plus `offset`, both (B, C) float32."""
    if pixels.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.activate(pixels, factor, offset, INPUT_SCALE)
    values = F.silu(pixels.float() * factor[:, None, None] + offset[:, None, None])
    return (values * INPUT_SCALE).clamp(-LARGEST, LARGEST).to(TYPE)


@activate.register_fake
def _(pixels: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(pixels, dtype=TYPE)


@torch.library.custom_op("cap4d_core::convolve_float8", mutates_args=())
def convolve(pixels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, N) in the type of `bias` from 8-bit (B, H, W, C) and (9, N, C), scale (N,)."""
    if pixels.is_cuda:
        from cap4d_core.diffusion import triton_kernels

        return triton_kernels.convolve(pixels, weight, scale, bias)
    kernel = weight.float().unflatten(0, (3, 3)).permute(2, 3, 0, 1)
    product = F.conv2d(pixels.float().permute(0, 3, 1, 2), kernel, padding=1)
    return (product.permute(0, 2, 3, 1) * scale + bias.float()).to(bias.dtype).contiguous()


@convolve.register_fake
def _(pixels: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return pixels.new_empty((*pixels.shape[:3], weight.shape[1]), dtype=bias.dtype)
