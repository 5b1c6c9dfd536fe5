"""Floating-point operations of the denoiser by level and kind, counted from its shapes.

Two operations per multiply-add; norms, activations and the time embedding (under 0.1 % at the
released size) are left out. Tells what leaving work out must gain before it is measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.denoiser_program import Kind, Operation, Savings, plan_program
from cap4d_core.diffusion.model_config import MMDMConfig

KINDS = ("convolution", "matrix product", "attention")


@dataclass
class DenoiserCost:
    """Attributes: floating-point operations by (level, kind)."""

    parts: Counter[tuple[int, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    def rows(self) -> list[tuple[int, str, int]]:
        """(level, kind, operations), by level."""
        return [(level, kind, self.parts[level, kind]) for level, kind in sorted(self.parts)]


@dataclass(frozen=True)
class _Views:
    """Views stored, and query and key views of each sample, in one operation."""

    stored: int
    samples: tuple[tuple[int, int], ...]


def plain_cost(config: MMDMConfig, samples: int) -> DenoiserCost:
    """One call of MMDMDenoiser with `samples` samples (2 for one guided batch)."""
    views = config.views_per_call
    everywhere = _Views(samples * views, ((views, views),) * samples)
    return _count(config, lambda _: everywhere, samples * views)


def sampling_cost(
    config: MMDMConfig,
    num_references: int,
    batches: int = 1,
    guided: bool = True,
    savings: Savings | None = None,
    merge_upsampling: bool = False,
) -> DenoiserCost:
    """One call of FastDenoiser, without what is computed once per step."""
    savings = savings or Savings()
    with torch.device("meta"):
        program = plan_program(MMDMDenoiser(config), savings)
    generated = config.views_per_call - num_references
    stored = [1 if savings.merge_unconditional else num_references, num_references]
    stored = stored if guided else stored[1:]
    alone = _Views(len(stored) * batches * generated, ())
    joint = _Views(
        sum(batches * (count + generated) for count in stored),
        tuple((count + generated, config.views_per_call) for count in stored) * batches,
    )

    def views(position: int) -> _Views:
        return joint if program.has_references(position) else alone

    leaving = program.last if program.last < len(program.operations) else -1
    cost = _count(config, views, batches * generated, savings, leaving, alone, merge_upsampling)
    # The first convolution and the maps serve both branches; the last convolution needs each.
    pixels, width = config.latent_size**2, config.level_channels[0]
    last = 2 * 9 * pixels * width * config.out_channels
    cost.parts[0, "convolution"] += last * (alone.stored - batches * generated)
    return cost


def _count(
    config: MMDMConfig,
    views_at: object,
    ends: int,
    savings: Savings | None = None,
    leaving: int = -1,
    generated: _Views | None = None,
    merge_upsampling: bool = False,
) -> DenoiserCost:
    with torch.device("meta"):
        program = plan_program(MMDMDenoiser(config), savings)
    cost = DenoiserCost()
    pixels, width = config.latent_size**2, config.level_channels[0]
    both_ends = config.in_channels + config.out_channels
    cost.parts[0, "convolution"] += ends * 2 * 9 * pixels * width * both_ends
    cost.parts[0, "matrix product"] += ends * 2 * pixels * width * config.condition_channels
    for position, operation in enumerate(program.operations):
        views: _Views = views_at(position)  # type: ignore[operator]
        after = generated if position == leaving and generated is not None else views
        tokens = (config.latent_size >> operation.level) ** 2
        if operation.kind is Kind.TRANSFORMER:
            _count_transformer(cost, operation, tokens, views, after)
        elif operation.module is not None:
            amount = _convolutions(operation, tokens, merge_upsampling)
            cost.parts[operation.level, "convolution"] += amount * views.stored
    return cost


def _convolutions(operation: Operation, pixels: int, merge_upsampling: bool) -> int:
    """Operations of a view in a resnet or between levels, with `pixels` at its input."""
    module = operation.module
    amount = 0
    for name, layer in module.named_modules() if module is not None else ():
        if isinstance(layer, torch.nn.Conv2d) and not name.endswith("Conv2d_0"):
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            if operation.kind is Kind.DOWN:
                taps /= 4  # type: ignore[assignment]
            elif operation.kind is Kind.UP:
                taps = 16 if merge_upsampling else taps * 4
            amount += int(2 * taps * layer.in_channels * layer.out_channels * pixels)
    return amount


def _count_transformer(
    cost: DenoiserCost, operation: Operation, tokens: int, views: _Views, after: _Views
) -> None:
    """References that leave in it (`after`) have keys and values in its last block, no more."""
    module = operation.module
    assert module is not None
    width: int = module.in_channels  # type: ignore[assignment]
    blocks = len(module.transformer_blocks)  # type: ignore[arg-type]
    square = 2 * tokens * width**2
    products = square * views.stored  # into tokens
    attention = 0
    for index in range(blocks):
        rest = after if index == blocks - 1 else views
        # Keys and values, queries, output, and the gated feed-forward of four times the width.
        products += square * (2 * views.stored + (1 + 1 + 12) * rest.stored)
        if operation.across_views:
            for queries, keys in views.samples:
                left = queries if rest is views else _generated_of(views, rest)
                attention += 4 * left * keys * tokens**2 * width
        else:
            attention += 4 * views.stored * tokens**2 * width
    products += square * after.stored
    cost.parts[operation.level, "matrix product"] += products
    cost.parts[operation.level, "attention"] += attention


def _generated_of(views: _Views, rest: _Views) -> int:
    """Views per sample that stay."""
    return rest.stored // len(views.samples)
