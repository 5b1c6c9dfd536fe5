"""Adaptive density of splats: clone, split, prune, opacity reset (Kerbl et al. 2023), with the rule
that no face of the mesh loses its last splat (Qian et al. 2024).

`parity=True` reproduces the published arithmetic: split offsets in metres although coordinates are
relative to the face, screen sizes forgotten before they are tested, faces whose splats are all
flagged keep all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cap4d_core.avatar.optimizers import SPLAT_GROUPS, group_of

MIN_OPACITY = 0.005
RESET_OPACITY = 0.01
SPLIT_SHRINK = 1.6
# Splats larger than this share of the scene (extent 1 m) are pruned after the first reset.
MAX_WORLD_SCALE = 0.1


@dataclass
class SplatStatistics:
    """What the densification criterion accumulates over steps.

    gradient_sum, count (N, 1): screen-space gradient norms (loss per pixel) and how often seen;
    max_radius (N,): largest screen radius in pixels.
    """

    gradient_sum: Tensor
    count: Tensor
    max_radius: Tensor

    @classmethod
    def zeros(cls, num: int, device: torch.device | str = "cpu") -> SplatStatistics:
        """Nothing seen yet."""
        zero = torch.zeros(num, 1, device=device)
        return cls(zero, zero.clone(), torch.zeros(num, device=device))

    @torch.no_grad()
    def add(self, gradients: Tensor, radii: Tensor, visible: Tensor) -> None:
        """Adds B views.

        Args:
            gradients: (B, N, 2) gradient of one view's loss with respect to pixel positions.
            radii: (B, N) pixels.
            visible: (B, N) bool.
        """
        norms = torch.linalg.vector_norm(gradients, dim=-1) * visible
        self.gradient_sum += norms.sum(0)[:, None]
        self.count += visible.sum(0)[:, None]
        seen = torch.where(visible, radii.to(self.max_radius.dtype), 0.0)
        torch.maximum(self.max_radius, seen.amax(0), out=self.max_radius)

    def mean_gradient(self) -> Tensor:
        """Mean gradient norm (N,), 0 where never seen."""
        return torch.nan_to_num(self.gradient_sum / self.count, nan=0.0)[:, 0]

    def keep(self, mask: Tensor) -> None:
        """Drops the rows outside the mask."""
        self.gradient_sum = self.gradient_sum[mask]
        self.count = self.count[mask]
        self.max_radius = self.max_radius[mask]

    def grow(self, num_new: int, parity: bool) -> None:
        """Starts anew with rows for new splats; screen sizes of old rows are kept.

        The published code forgets them too, so its screen-size test never fires.
        """
        device = self.max_radius.device
        old = self.max_radius
        fresh = SplatStatistics.zeros(len(old) + num_new, device)
        self.gradient_sum, self.count, self.max_radius = (
            fresh.gradient_sum,
            fresh.count,
            fresh.max_radius,
        )
        if not parity:
            self.max_radius[: len(old)] = old


class SplatTensors(nn.Module):
    """Local parameters of N splats bound to F faces.

    xyz (N, 3) in units of the face; f_dc (N, 1, 3) and f_rest (N, 15, 3) spherical harmonics;
    opacity (N, 1) logits; scaling (N, 3) logarithms, relative to the face; rotation (N, 4) wxyz,
    not normalised; binding (N,) face of each splat; binding_counter (F,) int32 splats of each face.
    """

    xyz: nn.Parameter
    f_dc: nn.Parameter
    f_rest: nn.Parameter
    opacity: nn.Parameter
    scaling: nn.Parameter
    rotation: nn.Parameter
    binding: Tensor
    binding_counter: Tensor

    def __init__(self, tensors: dict[str, Tensor], binding: Tensor, num_faces: int) -> None:
        super().__init__()
        for name in SPLAT_GROUPS:
            self.register_parameter(name, nn.Parameter(tensors[name].detach().clone()))
        self.register_buffer("binding", binding.clone())
        counter = torch.bincount(binding, minlength=num_faces).to(torch.int32)
        self.register_buffer("binding_counter", counter)

    def __len__(self) -> int:
        return self.xyz.shape[0]

    def groups(self) -> dict[str, nn.Parameter]:
        """Parameters by name, in the order of the optimiser's groups."""
        return {name: getattr(self, name) for name in SPLAT_GROUPS}

    def recount(self) -> None:
        """Recomputes binding_counter."""
        count = torch.bincount(self.binding, minlength=len(self.binding_counter))
        self.binding_counter = count.to(torch.int32)


def replace_parameter(
    splats: SplatTensors,
    adam: torch.optim.Optimizer | None,
    name: str,
    value: Tensor,
    moments: tuple[Tensor, Tensor] | None,
) -> None:
    """Replaces one splat tensor and its Adam moments; the step counter is kept."""
    old: nn.Parameter = getattr(splats, name)
    new = nn.Parameter(value.detach())
    setattr(splats, name, new)
    if adam is None:
        return
    group_of(adam, name)["params"] = [new]
    state = adam.state.pop(old, None)
    # Before the first step of a tensor there is no state to carry over.
    if state is not None and moments is not None:
        state["exp_avg"], state["exp_avg_sq"] = moments
        adam.state[new] = state


def _moments(
    splats: SplatTensors, adam: torch.optim.Optimizer | None, name: str
) -> dict[str, Tensor]:
    return adam.state.get(getattr(splats, name), {}) if adam is not None else {}


def append_splats(
    splats: SplatTensors,
    adam: torch.optim.Optimizer | None,
    statistics: SplatStatistics,
    new: dict[str, Tensor],
    binding: Tensor,
    parity: bool = False,
) -> None:
    """Adds splats with zero moments."""
    for name in SPLAT_GROUPS:
        old: Tensor = getattr(splats, name)
        state = _moments(splats, adam, name)
        moments = None
        if "exp_avg" in state:
            zeros = torch.zeros_like(new[name])
            moments = (
                torch.cat([state["exp_avg"], zeros]),
                torch.cat([state["exp_avg_sq"], zeros]),
            )
        replace_parameter(splats, adam, name, torch.cat([old.detach(), new[name]]), moments)
    splats.binding = torch.cat([splats.binding, binding])
    splats.recount()
    statistics.grow(len(binding), parity)


def keep_splats(
    splats: SplatTensors,
    adam: torch.optim.Optimizer | None,
    statistics: SplatStatistics,
    mask: Tensor,
) -> None:
    """Drops the splats outside the mask."""
    for name in SPLAT_GROUPS:
        state = _moments(splats, adam, name)
        moments = None
        if "exp_avg" in state:
            moments = (state["exp_avg"][mask], state["exp_avg_sq"][mask])
        replace_parameter(splats, adam, name, getattr(splats, name).detach()[mask], moments)
    splats.binding = splats.binding[mask]
    splats.recount()
    statistics.keep(mask)


def prunable(splats: SplatTensors, flagged: Tensor, parity: bool = False) -> Tensor:
    """Restricts a mask of splats to remove, so that every face keeps at least one.

    Of a face whose splats are all flagged the most opaque one stays (parity: all stay).
    """
    binding = splats.binding
    num_faces = len(splats.binding_counter)
    flagged_count = torch.bincount(binding[flagged], minlength=num_faces)
    emptied = (flagged_count == splats.binding_counter) & (flagged_count > 0)
    if parity:
        return flagged & ~emptied[binding]
    opacity = splats.opacity.detach()[:, 0]
    best = torch.full((num_faces,), -math.inf, device=opacity.device)
    best = best.scatter_reduce(0, binding, opacity, "amax")
    is_best = opacity == best[binding]
    # Equal opacities (copies): the first of the face stays.
    order = torch.arange(len(binding), device=binding.device)
    candidates = torch.where(is_best, order, len(binding))
    first = torch.full((num_faces,), len(binding), device=binding.device)
    first = first.scatter_reduce(0, binding, candidates, "amin")
    keeper = order == first[binding]
    return flagged & ~(emptied[binding] & keeper)


def prune(
    splats: SplatTensors,
    adam: torch.optim.Optimizer | None,
    statistics: SplatStatistics,
    flagged: Tensor,
    parity: bool = False,
) -> Tensor:
    """Removes flagged splats, see `prunable`; returns the mask of those removed."""
    removed = prunable(splats, flagged, parity)
    keep_splats(splats, adam, statistics, ~removed)
    return removed


@torch.no_grad()
def densify_and_prune(
    splats: SplatTensors,
    adam: torch.optim.Optimizer | None,
    statistics: SplatStatistics,
    face_scale: Tensor,
    *,
    threshold: float,
    dense_size: float,
    max_screen_radius: float | None,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
    parity: bool = False,
) -> None:
    """Clones small and splits large splats with large gradients, then prunes faint and huge ones.

    Args:
        splats: changed in place.
        adam: its moments follow.
        statistics: accumulated since the last call; starts anew.
        face_scale: (F, 1) metres.
        threshold: mean screen gradient (loss per pixel) from which a splat is multiplied.
        dense_size: world size in metres that separates cloning from splitting.
        max_screen_radius: prune splats larger than this many pixels (and than MAX_WORLD_SCALE);
            None = off.
        noise: (2 * number of splits, 3) standard normal draws, or a function that makes that many
            rows; drawn from `generator` when None.
        generator: on the CPU, so that results do not depend on the device.
        parity: published arithmetic.
    """
    gradient = statistics.mean_gradient()
    size = splats.scaling.exp().amax(1) * face_scale[splats.binding, 0]
    wanted, large = gradient >= threshold, size > dense_size

    clone = wanted & ~large
    copies = {name: p.detach()[clone] for name, p in splats.groups().items()}
    append_splats(splats, adam, statistics, copies, splats.binding[clone], parity)

    padding = torch.zeros(len(splats) - len(wanted), dtype=torch.bool, device=wanted.device)
    split = torch.cat([wanted & large, padding])
    parents = {name: p.detach()[split] for name, p in splats.groups().items()}
    children = {name: torch.cat([p, p]) for name, p in parents.items()}
    binding = splats.binding[split].repeat(2)
    if noise is None:
        noise = torch.randn(len(binding), 3, generator=generator)
    elif callable(noise):
        noise = noise(len(binding))
    std = children["scaling"].exp()
    if parity:
        std = std * face_scale[binding]
    offset = rotate(children["rotation"], std * noise.to(std))
    children["xyz"] = children["xyz"] + offset
    children["scaling"] = children["scaling"] - math.log(SPLIT_SHRINK)
    append_splats(splats, adam, statistics, children, binding, parity)
    fresh = torch.zeros(len(binding), dtype=torch.bool, device=split.device)
    prune(splats, adam, statistics, torch.cat([split, fresh]), parity)

    flagged = splats.opacity.sigmoid()[:, 0] < MIN_OPACITY
    if max_screen_radius is not None:
        size = splats.scaling.exp().amax(1) * face_scale[splats.binding, 0]
        flagged |= (statistics.max_radius > max_screen_radius) | (size > MAX_WORLD_SCALE)
    prune(splats, adam, statistics, flagged, parity)
    statistics.max_radius.zero_()


def rotate(quaternion: Tensor, vectors: Tensor) -> Tensor:
    """Rotates (N, 3) vectors by (N, 4) wxyz quaternions, normalised here."""
    q = torch.nn.functional.normalize(quaternion, dim=-1)
    w, u = q[:, :1], q[:, 1:]
    t = 2 * torch.linalg.cross(u, vectors)
    return vectors + w * t + torch.linalg.cross(u, t)


@torch.no_grad()
def reset_opacity(splats: SplatTensors, adam: torch.optim.Optimizer | None) -> None:
    """Lowers all opacities to at most 0.01 and clears their moments; the step counter is kept."""
    value = splats.opacity.sigmoid().clamp(max=RESET_OPACITY).logit()
    state = _moments(splats, adam, "opacity")
    moments = None
    if "exp_avg" in state:
        moments = (torch.zeros_like(value), torch.zeros_like(value))
    replace_parameter(splats, adam, "opacity", value, moments)
