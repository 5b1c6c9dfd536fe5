"""Deformation network: offsets of the UV mesh per pixel, predicted from the head's expression.

A pix2pix U-Net (Isola et al. 2017) on UV maps. Input: expression offsets divided by OFFSET_UNIT and
a positional encoding of the pixel; output: offsets divided by OFFSET_UNIT. Parameter names and
shapes are those of the released avatar checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Metres per unit of the network's input and output (published constant).
OFFSET_UNIT = 0.0108
NUM_FREQUENCIES = 6
POSITION_CHANNELS = 4 * NUM_FREQUENCIES


def positional_encoding(resolution: int, device: torch.device | str | None = None) -> Tensor:
    """Sine/cosine encoding of the pixel position.

    Coordinates are index/resolution*2-1 (no half pixel, no factor pi), frequencies 2^0..2^5.

    Returns:
        (24, R, R): sines then cosines of the row coordinate, then of the column coordinate.
    """
    coordinate = torch.arange(resolution, dtype=torch.float32, device=device) / resolution * 2 - 1
    frequencies = 2.0 ** torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=device)
    phase = frequencies[:, None] * coordinate
    waves = torch.cat([phase.sin(), phase.cos()])
    rows = waves[:, :, None].expand(-1, -1, resolution)
    columns = waves[:, None, :].expand(-1, resolution, -1)
    return torch.cat([rows, columns]).contiguous()


class _SkipBlock(nn.Module):
    """One level of the U-Net: down, inner level, up; concatenates its input unless outermost."""

    def __init__(
        self,
        outer_channels: int,
        inner_channels: int,
        inner: nn.Module | None,
        input_channels: int | None = None,
    ) -> None:
        super().__init__()
        outermost = input_channels is not None
        down = nn.Conv2d(input_channels or outer_channels, inner_channels, 4, 2, 1)
        up_channels = inner_channels if inner is None else 2 * inner_channels
        up = nn.ConvTranspose2d(up_channels, outer_channels, 4, 2, 1)
        # The order of modules gives the released parameter names (model.1, model.3, ...).
        layers: list[nn.Module] = []
        if not outermost:
            layers.append(nn.LeakyReLU(0.2))
        layers.append(down)
        if inner is not None:
            if not outermost:
                layers.append(nn.InstanceNorm2d(inner_channels))
            layers.append(inner)
        layers += [nn.ReLU(), up]
        if not outermost:
            layers.append(nn.InstanceNorm2d(outer_channels))
        self.model = nn.Sequential(*layers)
        self.outermost = outermost

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y if self.outermost else torch.cat([x, y], dim=1)


class DeformationUNet(nn.Module):
    """U-Net from expression offsets and positional encoding to mesh offsets.

    Args:
        channels: width of the first level; doubles up to 8 times that.
        num_layers: down-samplings; the UV resolution must be at least 2^num_layers.
        in_channels: offsets (3) and positional encoding (24).
        out_channels: offsets (3).
    """

    def __init__(
        self,
        channels: int = 64,
        num_layers: int = 6,
        in_channels: int = 3 + POSITION_CHANNELS,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"deformation U-Net: num_layers {num_layers}, expected 2 or more")
        widths = [channels * min(2**level, 8) for level in range(num_layers)]
        block: _SkipBlock | None = None
        for level in range(num_layers - 1, 0, -1):
            block = _SkipBlock(widths[level - 1], widths[level], block)
        self.channels, self.num_layers = channels, num_layers
        self.model = _SkipBlock(out_channels, widths[0], block, input_channels=in_channels)

    @property
    def last_layer(self) -> nn.ConvTranspose2d:
        """The layer whose zero weights make the initial deformation zero."""
        layer = self.model.model[-1]
        assert isinstance(layer, nn.ConvTranspose2d)
        return layer

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, 0.02), biases 0, last layer 0: the initial deformation is zero."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.copy_(noise)
                else:
                    parameter.zero_()
            self.last_layer.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 27, R, R) -> (B, 3, R, R)."""
        smallest = 2**self.num_layers
        if min(x.shape[-2:]) < smallest:
            raise ValueError(
                f"UV maps of {tuple(x.shape[-2:])} pixels are too small for "
                f"{self.num_layers} U-Net layers (at least {smallest})"
            )
        y: Tensor = self.model(x)
        return y


def network_size(state: dict[str, Tensor]) -> tuple[int, int]:
    """(channels, layers) of a state dict in the released naming."""
    channels = state["model.model.0.weight"].shape[0]
    convolutions = sum(1 for tensor in state.values() if tensor.ndim == 4)
    return int(channels), convolutions // 2


def max_layers(resolution: int) -> int:
    """Largest number of down-samplings that a UV resolution allows."""
    return int(math.log2(resolution))
