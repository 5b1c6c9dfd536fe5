"""The denoiser as a list of operations, and what of it references need.

A U-Net's order of operations does not depend on data, so it can be decided once which of them can
change the noise predicted for generated views:

- before the first attention across views, the features of a reference depend on nothing but the
  reference and the timestep;
- in the last one, references are keys and values only; nothing after it needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn

from cap4d_core.diffusion.denoiser import MMDMDenoiser


class Kind(Enum):
    """What an operation does to the features of a view."""

    RESNET = "resnet"
    TRANSFORMER = "transformer"
    DOWN = "down"
    UP = "up"
    PUSH = "push"  # stores the features as a skip connection
    POP = "pop"  # concatenates the last one stored


@dataclass(frozen=True)
class Operation:
    """One step of the U-Net between its first and its last convolution.

    Attributes:
        kind: what is done.
        level: resolution of its input, 0 = finest.
        module: the denoiser's module, None for PUSH and POP.
        across_views: of a TRANSFORMER, whether the views of a sample attend to each other.
        resnet: of a RESNET, its number in order.
    """

    kind: Kind
    level: int
    module: nn.Module | None = None
    across_views: bool = False
    resnet: int = -1


@dataclass(frozen=True)
class Savings:
    """Work left out; each can be switched off to check it against the plain denoiser.

    Attributes:
        share_prefix: references' features before the first attention across views are computed
            once per step.
        drop_outputs: references end at the last attention across views.
        merge_unconditional: unconditional references, being equal, are computed once.
    """

    share_prefix: bool = True
    drop_outputs: bool = True
    merge_unconditional: bool = True


@dataclass(frozen=True)
class Program:
    """Operations of a denoiser and the range that references take part in.

    Attributes:
        operations: in order.
        first: references join before this operation; len(operations) if they never do.
        last: they leave within this one, as keys and values of its last attention; with
            `drop_outputs` off it is len(operations): they stay to the end.
        reference_skips: positions of PUSH operations before `first` whose features of references
            are popped while they take part.
    """

    operations: tuple[Operation, ...]
    first: int
    last: int
    reference_skips: tuple[int, ...]

    @property
    def uses_references(self) -> bool:
        """False if no attention spans views, so that references change nothing."""
        return self.first < len(self.operations)

    def has_references(self, position: int) -> bool:
        """Whether references take part in the operation at `position`."""
        return self.first <= position <= self.last


def plan_program(denoiser: MMDMDenoiser, savings: Savings | None = None) -> Program:
    """Program of a denoiser."""
    savings = savings or Savings()
    operations = tuple(_operations(denoiser))
    across = [i for i, operation in enumerate(operations) if operation.across_views]
    if not across:
        return Program(operations, len(operations), -1, ())
    first = across[0] if savings.share_prefix else 0
    last = across[-1] if savings.drop_outputs else len(operations)
    popped_at: dict[int, int] = {}
    stack: list[int] = []
    for position, operation in enumerate(operations):
        if operation.kind is Kind.PUSH:
            stack.append(position)
        elif operation.kind is Kind.POP:
            popped_at[stack.pop()] = position
    skips = [push for push, pop in popped_at.items() if push < first <= pop <= last]
    return Program(operations, first, last, tuple(sorted(skips)))


def _operations(denoiser: MMDMDenoiser) -> list[Operation]:
    config = denoiser.config
    operations: list[Operation] = [Operation(Kind.PUSH, 0)]
    resnets = 0

    def add_pair(level: int, resnet: nn.Module, attention: nn.Module | None, across: bool) -> None:
        nonlocal resnets
        operations.append(Operation(Kind.RESNET, level, resnet, resnet=resnets))
        resnets += 1
        if attention is not None:
            operations.append(Operation(Kind.TRANSFORMER, level, attention, across_views=across))

    levels = len(config.channel_mult)
    for level, block in enumerate(denoiser.down_blocks):
        for resnet, attention in _pairs(block):
            add_pair(level, resnet, attention, config.is_multi_view(level))
            operations.append(Operation(Kind.PUSH, level))
        for down in getattr(block, "downsamplers", None) or ():
            operations.append(Operation(Kind.DOWN, level, down))
            operations.append(Operation(Kind.PUSH, level + 1))
    middle = denoiser.mid_block
    attentions = [*middle.attentions, None]
    for resnet, attention in zip(middle.resnets, attentions, strict=True):
        add_pair(levels - 1, resnet, attention, config.is_multi_view(-1))
    for level, block in zip(reversed(range(levels)), denoiser.up_blocks, strict=True):
        for resnet, attention in _pairs(block):
            operations.append(Operation(Kind.POP, level))
            add_pair(level, resnet, attention, config.is_multi_view(level))
        for up in getattr(block, "upsamplers", None) or ():
            operations.append(Operation(Kind.UP, level, up))
    return operations


def _pairs(block: nn.Module) -> Sequence[tuple[nn.Module, nn.Module | None]]:
    resnets: Sequence[nn.Module] = list(block.resnets)  # type: ignore[arg-type]
    found = getattr(block, "attentions", None)
    attentions: Sequence[nn.Module | None] = list(found) if found else [None] * len(resnets)
    return list(zip(resnets, attentions, strict=True))
