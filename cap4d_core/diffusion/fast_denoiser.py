"""The multi-view denoiser for sampling: the same function without work that cannot change it.

Of a network call only the noise of generated views is used, guided from an unconditional and a
conditional prediction. Left out against `MMDMDenoiser` (see `denoiser_program` and `Savings`):
reference features before the first attention across views (computed once per step instead of once
per call), reference features after the last one, and all unconditional references but one, which
stands for all R as repeated keys and values.

Layouts: n batches of R references and G generated views. Features are flat over views: the
unconditional samples first, then the conditional ones; within a sample references come first.
Weights are the denoiser's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.diffusion import float8_convolution, fused_pointwise
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.denoiser_program import Kind, Operation, Program, Savings, plan_program
from cap4d_core.diffusion.float8_convolution import Float8Convolution
from cap4d_core.diffusion.float8_linear import Float8Product, fits, gate
from cap4d_core.diffusion.fused_pointwise import geglu, group_norm

# Products of tokens with (a part of) a layer's weights, without its bias.
Product = Callable[..., Tensor]
# Features of references at the start of an operation or at a skip: (views, h, w, C) per branch.
Branches = tuple[Tensor, ...]


class ReferenceFeatures(NamedTuple):
    """What calls need of references: `hidden` where they join, and `skips` by order of PUSH.

    Each is a tuple over branches (unconditional, conditional; or conditional only) of (r, h, w, C).
    """

    hidden: Branches
    skips: tuple[Branches, ...]

    def gather(self, ids: Tensor, batches: int) -> ReferenceFeatures:
        """Features of one call: rows `ids` (n * R) of the last branch; others n times over."""

        def pick(branches: Branches) -> Branches:
            *shared, conditional = branches
            expanded = [s.expand(batches, *s.shape[1:]) for s in shared]
            return (*expanded, conditional.index_select(0, ids))

        return ReferenceFeatures(pick(self.hidden), tuple(pick(skip) for skip in self.skips))


@dataclass(frozen=True)
class ViewLayout:
    """How views lie in flat features.

    Attributes:
        batches: n.
        references: R, references that attention sees per sample.
        generated: G.
        stored: references stored per sample of each branch; 1 instead of R where one stands for
            all. Empty without references.
    """

    batches: int
    references: int
    generated: int
    stored: tuple[int, ...]

    def join(self, generated: Tensor, references: Branches) -> Tensor:
        """Puts references before the generated views of their sample."""
        parts = []
        for views, refs, count in zip(
            generated.chunk(len(self.stored)), references, self.stored, strict=True
        ):
            pair = [
                refs.permute(0, 3, 1, 2).unflatten(0, (self.batches, count)),
                views.unflatten(0, (self.batches, self.generated)),
            ]
            parts.append(torch.cat(pair, dim=1).flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def samples(self, joined: Tensor) -> list[Tensor]:
        """(n, stored + G, ...) of each branch."""
        sizes = [self.batches * (count + self.generated) for count in self.stored]
        return [part.unflatten(0, (self.batches, -1)) for part in joined.split(sizes)]

    def without_references(self, joined: Tensor) -> Tensor:
        """The generated views, flat."""
        parts = [
            part[:, count:].flatten(0, 1)
            for part, count in zip(self.samples(joined), self.stored, strict=True)
        ]
        return torch.cat(parts)


class FastDenoiser(nn.Module):
    """Noise of generated views from latents, conditioning maps and features of references.

    Queries, keys and values are one matrix product: their weights are moved into one tensor that
    the denoiser's parameters become views of, so it must have its final type and device before.

    Args:
        denoiser: whose weights are used.
        savings: work left out.
        merge_upsampling: fold nearest-neighbour enlargement into the convolution after it (a
            transposed convolution with summed weights): 4 instead of 9 products per pixel. Exact in
            real arithmetic, but sums are rounded to the weights' type.
        memory_format: of features and convolutions.
        fused: group norms and gates by `fused_pointwise`, the same but for rounding; for channels
            last.
        float8: linear layers of the transformers and convolutions of the resnets multiply 8-bit
            numbers where that gains time, see `float8_linear`, `float8_convolution`; not the same
            function any more.
    """

    def __init__(
        self,
        denoiser: MMDMDenoiser,
        savings: Savings | None = None,
        merge_upsampling: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        float8: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.savings = savings or Savings()
        self.program: Program = plan_program(denoiser, self.savings)
        self.memory_format = memory_format
        self.merge_upsampling = merge_upsampling
        self.float8 = float8
        self.fused = fused
        self.float8_products = nn.ModuleDict()
        for position, operation in enumerate(self.program.operations):
            module: Any = operation.module
            if operation.kind is Kind.TRANSFORMER:
                for index, block in enumerate(module.transformer_blocks):
                    self._keep(f"attention_{position}_{index}", _joined_weights(block.attn1))
                if float8:
                    self._add_float8(position, module)
            elif operation.kind is Kind.RESNET and float8:
                for name in ("conv1", "conv2"):
                    layer = getattr(module, name)
                    if float8_convolution.is_possible(layer):
                        convolution = Float8Convolution(layer.weight)
                        self.float8_products[f"{name}_{position}"] = convolution
            elif operation.kind is Kind.UP and merge_upsampling:
                folded = _transposed_weight(module.conv.weight)
                self._keep(f"up_{position}", folded.to(memory_format=memory_format))

    def _keep(self, name: str, weight: Tensor) -> None:
        # Buffers, because compiled graphs take their addresses as fixed.
        self.register_buffer(name, weight, persistent=False)

    def _add_float8(self, position: int, transformer: Any) -> None:
        weights = {
            f"in_{position}": transformer.proj_in.weight,
            f"out_{position}": transformer.proj_out.weight,
        }
        for index, block in enumerate(transformer.transformer_blocks):
            at = f"{position}_{index}"
            weights |= {
                f"attention_{at}": getattr(self, f"attention_{at}"),
                f"attended_{at}": block.attn1.to_out[0].weight,
                f"widen_{at}": block.ff.net[0].proj.weight,
                f"narrow_{at}": block.ff.net[2].weight,
            }
        for name, weight in weights.items():
            if fits(weight):
                self.float8_products[name] = Float8Product(weight)

    def _product(self, name: str) -> Product:
        if name in self.float8_products:
            return self.float8_products[name]
        return functools.partial(_multiply, getattr(self, name))

    def _linear(self, name: str, layer: nn.Linear, tokens: Tensor) -> Tensor:
        """A linear layer, in 8 bits if it has such weights."""
        if name not in self.float8_products:
            return layer(tokens)
        return self.float8_products[name](tokens, bias=layer.bias)

    def _feed_forward(self, at: str, block: Any, tokens: Tensor) -> Tensor:
        if f"narrow_{at}" not in self.float8_products:
            if not self.fused:
                return block.ff(tokens)
            gated = geglu(block.ff.net[0].proj(tokens).flatten(0, -2))
            return block.ff.net[2](gated).unflatten(0, tokens.shape[:-1])
        widen, narrow = block.ff.net[0].proj, block.ff.net[2]
        product = self._linear(f"widen_{at}", widen, tokens)
        gated, scale = gate(product.flatten(0, -2))
        last: Any = self.float8_products[f"narrow_{at}"]
        result: Tensor = last.multiply(gated, scale, tokens.dtype, bias=narrow.bias)
        return result.unflatten(0, tokens.shape[:-1])

    @torch.no_grad()
    def time_biases(self, timestep: int | Tensor) -> Tensor:
        """(1, sum of widths) what every resnet adds to its features at a timestep."""
        d = self.denoiser
        times = torch.as_tensor(timestep, device=d.device).reshape(1)
        embedding = F.silu(d.time_embedding(d.time_proj(times).to(d.dtype)))
        resnets: list[Any] = [
            operation.module
            for operation in self.program.operations
            if operation.kind is Kind.RESNET
        ]
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in resnets], dim=1)

    @torch.no_grad()
    def reference_features(
        self, latents: Tensor, maps: Tensor, time_biases: Tensor, guided: bool, at_a_time: int = 8
    ) -> ReferenceFeatures | None:
        """Features of references that all calls of a step share.

        Args:
            latents: (r, 4, h, w) clean latents.
            maps: (r, h, w, C) conditioning maps.
            time_biases: of the step.
            guided: also of the unconditional branch, where all references are the same zeros.
            at_a_time: references per network call.

        Returns:
            None if references change nothing.
        """
        if not self.program.uses_references:
            return None
        if guided:
            zeros = torch.zeros_like(latents[:1]), torch.zeros_like(maps[:1])
            latents, maps = torch.cat([zeros[0], latents]), torch.cat([zeros[1], maps])
        collected: list[list[Tensor]] = []
        for part, part_maps in zip(latents.split(at_a_time), maps.split(at_a_time), strict=True):
            hidden = self._first_layer(part) + self._conditioning(part_maps)
            skips = []
            biases = self._split(time_biases)
            stack: list[Tensor] = []
            for position in range(self.program.first):
                hidden = self._run(position, hidden, stack, biases)
                if position in self.program.reference_skips:
                    skips.append(hidden)
            collected.append([t.permute(0, 2, 3, 1).contiguous() for t in (hidden, *skips)])
        whole = [torch.cat(parts) for parts in zip(*collected, strict=True)]
        branches: list[Branches] = [(t[:1], t[1:]) if guided else (t,) for t in whole]
        return ReferenceFeatures(branches[0], tuple(branches[1:]))

    def forward(
        self,
        latents: Tensor,
        maps: Tensor,
        time_biases: Tensor,
        references: ReferenceFeatures | None,
        num_references: int,
        guided: bool,
    ) -> Tensor:
        """Noise of generated views.

        Args:
            latents: (n, G, 4, h, w) noisy latents.
            maps: (n, G, h, w, C) their conditioning maps.
            time_biases: of the step.
            references: features of this call's references: n rows of the unconditional branch and
                n * R of the conditional one.
            num_references: R.
            guided: predict without conditions too.

        Returns:
            (n, G, 4, h, w), or (2, n, G, 4, h, w) with the unconditional prediction first, in the
            type of `latents`.
        """
        batches, generated = latents.shape[:2]
        branches = 2 if guided else 1
        stored = self._stored(num_references, guided)
        layout = ViewLayout(batches, num_references, generated, stored)
        features = self._first_layer(latents.flatten(0, 1))
        hidden = features + self._conditioning(maps.flatten(0, 1))
        if guided:
            # Maps of the unconditional branch are zero, which leaves the bias of their layer.
            bias = self.denoiser.cond_linear.bias.view(1, -1, 1, 1)
            hidden = torch.cat([features + bias, hidden])
        noise = self._unet(hidden, self._split(time_biases), references, layout)
        noise = noise.to(latents.dtype)
        if guided:
            return noise.unflatten(0, (branches, batches, generated))
        return noise.unflatten(0, (batches, generated))

    def _unet(
        self,
        hidden: Tensor,
        biases: list[Tensor],
        references: ReferenceFeatures | None,
        layout: ViewLayout,
    ) -> Tensor:
        program = self.program
        stack: list[Tensor] = []
        # Of each skip on the stack: features of references to join, or whether they are in it.
        joined: list[Branches | bool] = []
        for position, operation in enumerate(program.operations):
            takes_part = program.has_references(position)
            if takes_part:
                assert references is not None
                if position == program.first:
                    hidden = layout.join(hidden, self._with_stored(references.hidden, layout))
            if operation.kind is Kind.PUSH:
                if position in program.reference_skips:
                    assert references is not None
                    which = program.reference_skips.index(position)
                    joined.append(self._with_stored(references.skips[which], layout))
                else:
                    joined.append(takes_part)
            elif operation.kind is Kind.POP:
                of_references = joined.pop()
                if takes_part and isinstance(of_references, tuple):
                    stack[-1] = layout.join(stack[-1], of_references)
                elif not takes_part and of_references is True:
                    stack[-1] = layout.without_references(stack[-1])
            hidden = self._run(
                position, hidden, stack, biases, layout if takes_part else None,
                drop_references=position == program.last,
            )  # fmt: skip
        if program.uses_references and program.last == len(program.operations):
            hidden = layout.without_references(hidden)
        d = self.denoiser
        return d.conv_out(self._norm(d.conv_norm_out, hidden, silu=True))

    def _run(
        self,
        position: int,
        hidden: Tensor,
        stack: list[Tensor],
        biases: list[Tensor],
        layout: ViewLayout | None = None,
        drop_references: bool = False,
    ) -> Tensor:
        operation = self.program.operations[position]
        module: Any = operation.module
        if operation.kind is Kind.RESNET:
            return self._resnet(position, module, hidden, biases[operation.resnet])
        if operation.kind is Kind.TRANSFORMER:
            return self._transformer(position, operation, hidden, layout, drop_references)
        if operation.kind is Kind.DOWN:
            return module.conv(hidden)
        if operation.kind is Kind.UP:
            if self.merge_upsampling:
                weight = getattr(self, f"up_{position}")
                return F.conv_transpose2d(hidden, weight, module.conv.bias, stride=2, padding=1)
            return module.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        if operation.kind is Kind.PUSH:
            stack.append(hidden)
            return hidden
        return torch.cat([hidden, stack.pop()], dim=1)

    def _transformer(
        self,
        position: int,
        operation: Operation,
        hidden: Tensor,
        layout: ViewLayout | None,
        drop_references: bool,
    ) -> Tensor:
        module: Any = operation.module
        across = layout if operation.across_views else None
        normed = self._norm(module.norm, hidden).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self._linear(f"in_{position}", module.proj_in, normed)
        last = len(module.transformer_blocks) - 1
        for index, block in enumerate(module.transformer_blocks):
            at = f"{position}_{index}"
            product = self._product(f"attention_{at}")
            normed = block.norm1(tokens)
            drop = drop_references and index == last
            if across is None:
                # No attention across views: without references every view is its own sample.
                attended = _attend(block.attn1, product(normed))
            else:
                attended = _attend_across(block.attn1, normed, product, across, drop)
                if drop:
                    tokens = across.without_references(tokens)
                    hidden = across.without_references(hidden)
            tokens = self._linear(f"attended_{at}", block.attn1.to_out[0], attended) + tokens
            tokens = self._feed_forward(at, block, block.norm3(tokens)) + tokens
        flat = self._linear(f"out_{position}", module.proj_out, tokens)
        image = flat.unflatten(1, hidden.shape[-2:]).permute(0, 3, 1, 2)
        return image.contiguous(memory_format=self.memory_format) + hidden

    def _resnet(self, position: int, module: Any, hidden: Tensor, time_bias: Tensor) -> Tensor:
        inner = self._convolve(
            f"conv1_{position}", module.norm1, module.conv1, hidden, time_bias[0]
        )
        inner = self._convolve(f"conv2_{position}", module.norm2, module.conv2, inner)
        if module.conv_shortcut is not None:
            hidden = module.conv_shortcut(hidden)
        return hidden + inner

    def _norm(self, norm: nn.GroupNorm, features: Tensor, silu: bool = False) -> Tensor:
        if self.fused and fused_pointwise.fits(norm):
            return group_norm(features, norm, silu)
        normed: Tensor = norm(features)
        return F.silu(normed) if silu else normed

    def _convolve(
        self,
        name: str,
        norm: nn.GroupNorm,
        layer: nn.Conv2d,
        features: Tensor,
        more_bias: Tensor | None = None,
    ) -> Tensor:
        """Norm, SiLU and convolution, in 8 bits if it has such weights; `more_bias` (N,)."""
        if name in self.float8_products and float8_convolution.fits(layer, features):
            assert layer.bias is not None
            bias = layer.bias if more_bias is None else layer.bias + more_bias
            return self.float8_products[name](features, norm, bias)
        result = layer(self._norm(norm, features, silu=True))
        return result if more_bias is None else result + more_bias[None, :, None, None]

    def _first_layer(self, latents: Tensor) -> Tensor:
        d = self.denoiser
        return d.conv_in(latents.to(d.dtype).contiguous(memory_format=self.memory_format))

    def _conditioning(self, maps: Tensor) -> Tensor:
        d = self.denoiser
        image = d.cond_linear(maps.to(d.dtype)).permute(0, 3, 1, 2)
        return image.contiguous(memory_format=self.memory_format)

    def _split(self, time_biases: Tensor) -> list[Tensor]:
        widths = [
            operation.module.out_channels  # type: ignore[union-attr]
            for operation in self.program.operations
            if operation.kind is Kind.RESNET
        ]
        return list(time_biases.split(widths, dim=1))

    def _stored(self, num_references: int, guided: bool) -> tuple[int, ...]:
        if not guided:
            return (num_references,)
        merged = self.savings.merge_unconditional
        return (1 if merged else num_references, num_references)

    def _with_stored(self, branches: Branches, layout: ViewLayout) -> Branches:
        """Repeats the unconditional reference where it does not stand for all."""
        repeated = []
        for branch, count in zip(branches, layout.stored, strict=True):
            times = layout.batches * count // len(branch)
            repeated.append(branch.repeat_interleave(times, 0) if times > 1 else branch)
        return tuple(repeated)


def _attend(attention: Any, packed: Tensor) -> Tensor:
    """Self-attention of (samples, tokens, 3 C) queries, keys and values before the last layer."""
    query, keys_values = packed.tensor_split([packed.shape[-1] // 3], dim=-1)
    return _attend_to(attention, query, keys_values)


def _attend_to(attention: Any, query: Tensor, keys_values: Tensor) -> Tensor:
    key, value = keys_values.chunk(2, dim=-1)
    heads = [t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (query, key, value)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _attend_across(
    attention: Any, tokens: Tensor, product: Product, layout: ViewLayout, drop_references: bool
) -> Tensor:
    """Attention over all tokens of each sample, (views, tokens, C) in and out.

    With `drop_references` references are no queries, and the result is that of generated views.
    """
    width = tokens.shape[-1]
    per_view = tokens.shape[1]
    if drop_references:
        queries = product(layout.without_references(tokens), slice(width))
        keys_values = layout.samples(product(tokens, slice(width, None)))
        per_sample = list(
            queries.unflatten(0, (len(layout.stored), layout.batches, layout.generated))
        )
    else:
        parts = layout.samples(product(tokens))
        per_sample = [part[..., :width] for part in parts]
        keys_values = [part[..., width:] for part in parts]
    seen = []
    for part, count in zip(keys_values, layout.stored, strict=True):
        if count != layout.references:
            others = part[:, :1].expand(-1, layout.references - 1, -1, -1)
            part = torch.cat([others, part], dim=1)
        seen.append(part.flatten(1, 2))
    questions = [part.flatten(1, 2) for part in per_sample]
    if len(seen) == 2 and questions[0].shape == questions[1].shape:
        questions, seen = [torch.cat(questions)], [torch.cat(seen)]
    attended = [_attend_to(attention, q, kv) for q, kv in zip(questions, seen, strict=True)]
    return torch.cat([part.reshape(-1, per_view, width) for part in attended])


def _multiply(weight: Tensor, tokens: Tensor, rows: slice = slice(None)) -> Tensor:
    return F.linear(tokens, weight[rows])


@torch.no_grad()
def _joined_weights(attention: Any) -> Tensor:
    """(3 C, C) weights of queries, keys and values, of which the layers' own become views."""
    layers = [attention.to_q, attention.to_k, attention.to_v]
    joined = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, joined.chunk(3), strict=True):
        layer.weight.data = part
    return joined


def _transposed_weight(weight: Tensor) -> Tensor:
    """(in, out, 4, 4) weights: transposed convolution equal to enlarging and convolving.

    Along an axis, enlarged pixel 2 m sees x[m-1], x[m], x[m] and 2 m + 1 sees x[m], x[m], x[m+1].
    """

    def fold(w: Tensor) -> Tensor:
        first, middle, last = w.unbind(-1)
        return torch.stack([last, middle + last, first + middle, first], dim=-1)

    folded = fold(fold(weight.double()).transpose(-1, -2)).transpose(-1, -2)
    return folded.transpose(0, 1).to(weight.dtype).contiguous()


def even_batches(total: int, limit: int) -> int:
    """Batches per call, at most `limit`, that fill the calls of a step best.

    Calls have one shape, so the last one is filled up: as few batches too many as possible, then as
    many per call as possible; never less than half of `limit`.
    """
    choices: Iterable[int] = range(min(limit, total), max((limit + 1) // 2, 1) - 1, -1)
    return min(choices, key=lambda count: -total % count, default=min(limit, total))
