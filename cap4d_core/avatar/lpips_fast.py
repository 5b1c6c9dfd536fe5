"""LPIPS for thousands of comparisons with the same targets: half precision, features kept.

The network is a fixed ruler, so bfloat16 changes it by less than 1 %, and what it sees in a target
never changes: features of the deeper taps, which cost most per byte, are computed once per view.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.avatar.lpips import STAGES, Lpips

# Share of the free device memory that features of targets may take.
MEMORY_SHARE = 0.25
VIEWS_AT_A_TIME = 8


class FastLpips(nn.Module):
    """`Lpips` in bfloat16 with channels last; not for its parity mode.

    Args:
        lpips: whose weights are copied.
    """

    def __init__(self, lpips: Lpips) -> None:
        super().__init__()
        if lpips.parity:
            raise ValueError("FastLpips: the parity mode of LPIPS is defined in float32")
        half, last = torch.bfloat16, torch.channels_last
        layers = list(lpips.convolutions.parameters())
        self.weights = _frozen(p.to(half, memory_format=last) for p in layers if p.ndim == 4)
        self.biases = _frozen(p.to(half) for p in layers if p.ndim == 1)
        self.heads = _frozen(lpips.heads)
        self.blurs = _frozen(blur.to(half) for blur in lpips.blurs)
        self.register_buffer("shift", lpips.shift)
        self.register_buffer("scale", lpips.scale)

    shift: Tensor
    scale: Tensor

    def taps(self, images: Tensor, count: int = len(STAGES)) -> list[Tensor]:
        """Raw features of (B, 3, H, W) images in 0..1 at the first `count` taps, (B, C, h, w)."""
        x = ((2 * images - 1 - self.shift) / self.scale).to(torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        layers = zip(self.weights, self.biases, strict=True)
        taps: list[Tensor] = []
        for stage, widths in enumerate(STAGES[:count]):
            if stage:
                x = self._pool(x, stage - 1)
            for weight, bias in itertools.islice(layers, len(widths)):
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            taps.append(x)
        return taps

    def _pool(self, x: Tensor, stage: int) -> Tensor:
        if not len(self.blurs):
            return F.max_pool2d(x, 2)
        x = F.pad(F.max_pool2d(x, 2, 1), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.blurs[stage], stride=2, groups=x.shape[1])

    def forward(self, image: Tensor, target: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """Distance per image, (B,) float32. Gradients flow to `image` only.

        Args:
            image: (B, 3, H, W) in 0..1.
            target: likewise.
            kept: raw features of `target` at the last taps, (B, h, w, C) each.
        """
        with torch.no_grad():
            wanted = self.taps(target, len(STAGES) - len(kept))
            wanted += [features.permute(0, 3, 1, 2) for features in kept]
        total = torch.zeros((), device=image.device)
        for have, want, head in zip(self.taps(image), wanted, self.heads, strict=True):
            difference = (_unit_length(have) - _unit_length(want)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total


def _frozen(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in tensors)


def _unit_length(x: Tensor) -> Tensor:
    x = x.float()
    # As in Lpips._normalise.
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


class TargetFeatures:
    """Raw features of N targets at the deepest taps that fit into memory.

    Args:
        lpips: the network.
        target: gives targets by index, (B, 3, H, W) masked images.
        count: N.
        budget: bytes to use; default: a share of what the device has free.

    Attributes:
        maps: (N, h, w, C) per kept tap, from shallow to deep.
    """

    @torch.no_grad()
    def __init__(
        self,
        lpips: FastLpips,
        target: Callable[[Tensor], Tensor],
        count: int,
        budget: float | None = None,
    ) -> None:
        device = lpips.shift.device
        if budget is None:
            budget = (
                MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            )
        self.maps: list[Tensor] = []
        for first in range(0, count, VIEWS_AT_A_TIME):
            rows = torch.arange(first, min(first + VIEWS_AT_A_TIME, count), device=device)
            taps = [tap.permute(0, 2, 3, 1) for tap in lpips.taps(target(rows))]
            if first == 0:
                self._allocate(taps, count, budget)
            for kept, tap in zip(self.maps, taps[len(taps) - len(self.maps) :], strict=True):
                kept[first : first + len(rows)] = tap
            if not self.maps:
                return

    def _allocate(self, taps: Sequence[Tensor], count: int, budget: float) -> None:
        for tap in reversed(taps):
            budget -= count * tap[0].numel() * tap.element_size()
            if budget < 0:
                return
            self.maps.insert(0, tap.new_empty(count, *tap.shape[1:]))

    def of(self, rows: Tensor) -> list[Tensor]:
        """Features of some targets, (B, h, w, C) per kept tap."""
        return [kept.index_select(0, rows) for kept in self.maps]
