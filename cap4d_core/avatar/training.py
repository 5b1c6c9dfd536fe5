"""One optimisation step of the avatar: pose, render, losses, backward, density control.

Iterations count views: a step of B views takes iteration i to i + B, so that schedules and numbers
of settings mean the same for every B.

`settings.parity` reproduces the published order and arithmetic (one view per step; density control
before the optimiser, so that splats are not stepped when they were just replaced). Nothing here
waits for the device except density control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cap4d_core.avatar import densification, losses
from cap4d_core.avatar.compiled import Compiler
from cap4d_core.avatar.fit_functions import (
    REGULARISERS,
    MeshFunction,
    MeshTensors,
    Recorded,
    image_terms,
    place_splats,
    pose_on,
    regulariser_function,
    regulariser_inputs,
)
from cap4d_core.avatar.gaussians import GaussianAvatar, HeadMaps, PosedGaussians
from cap4d_core.avatar.image_data import ImageData, Split, ViewBatch, split_views
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.lpips_fast import FastLpips, TargetFeatures
from cap4d_core.avatar.optimizers import NECK_EPS, RowAdam, batch_betas, make_adam, set_rates
from cap4d_core.avatar.renderer import RenderOutput, render_gaussians
from cap4d_core.avatar.schedules import is_due, loss_weights, sh_degree_at
from cap4d_core.compiling import can_compile
from cap4d_core.errors import UserError
from cap4d_core.settings import FittingSettings

LOSS_NAMES = ("lpips", "l1", "ssim", "xyz", "scale", "lap", "deform", "rot", "neck", "total")
# The published threshold and screen limit are meant for images of this width.
REFERENCE_WIDTH = 512
MAX_SCREEN_RADIUS = 20.0
# The published test of screen sizes never fires; now that it does, 20 px would prune hair, clothes.
FIXED_SCREEN_FACTOR = 2.0
# Views from which compiling the step (less than a minute, seconds when kept) saves time on a GPU.
ITERATIONS_WORTH_COMPILING = 10_000
# Head maps of all views are kept when they fit into this many bytes.
MAP_CACHE_BYTES = 2 * 1024**3


class RenderFunction(Protocol):
    """Signature of `render_gaussians`, which tests replace."""

    def __call__(
        self,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        sh: Tensor,
        world_to_camera: Tensor,
        intrinsics: Tensor,
        width: int,
        height: int,
        *,
        sh_degree: int,
        background: Any,
        backend: str,
    ) -> RenderOutput:
        """Renders B views."""
        ...


class ViewOrder:
    """Endless sequence of training views: a fresh permutation per epoch.

    The permutation of an epoch depends on (seed, epoch) only, so a resumed run goes on with the
    same views without stored random state.
    """

    def __init__(self, views: Iterable[int], seed: int, device: torch.device | str) -> None:
        self.views = torch.tensor(list(views), dtype=torch.int64)
        self.seed, self.device = seed, device
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, number: int) -> Tensor:
        if number not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = self.views[torch.randperm(len(self.views), generator=generator)]
            self._epochs = {k: v for k, v in self._epochs.items() if k == number - 1}
            self._epochs[number] = order.to(self.device)
        return self._epochs[number]

    def rows(self, step: int, batch_size: int) -> Tensor:
        """Views of a step (counted from 0), (B,) on the device."""
        count = len(self.views)
        start, parts = step * batch_size, []
        while batch_size > 0:
            epoch, offset = divmod(start, count)
            taken = min(batch_size, count - offset)
            parts.append(self._epoch(epoch)[offset : offset + taken])
            start, batch_size = start + taken, batch_size - taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class AvatarTrainer:
    """State of a fit: avatar, neck table, optimisers, statistics.

    Args:
        avatar: changed in place.
        data: all views, on the avatar's device.
        settings: of the fit.
        lpips: perceptual distance, None = without.
        render_fn: renderer.
        view_order: views of a step, `(step, batch_size) -> (B,)`; default: seeded permutations.
        split_noise: standard normal draws of a split, `(call, rows) -> (rows, 3)`; default: seeded
            by the iteration.
    """

    def __init__(
        self,
        avatar: GaussianAvatar,
        data: ImageData,
        settings: FittingSettings,
        *,
        lpips: Lpips | None = None,
        render_fn: RenderFunction = render_gaussians,
        view_order: Callable[[int, int], Tensor] | None = None,
        split_noise: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.avatar, self.data, self.settings = avatar, data, settings
        self.lpips, self.render_fn, self.split_noise = lpips, render_fn, split_noise
        device = avatar.shape.device
        self.device = device
        self.split: Split = split_views(len(data), settings.parity)
        train = self.split.train or list(range(len(data)))
        order = ViewOrder(train, settings.seed, device)
        self.view_order = order.rows if view_order is None else view_order
        self.batch_size = settings.views_per_step
        self.neck_offsets = nn.Parameter(torch.zeros(len(data), 3, device=device))
        self.adam = make_adam(avatar.splats.groups(), avatar.deformation, settings)
        self.neck_adam: RowAdam | None = None
        if not settings.static_neck:
            factor = self.batch_size**0.5
            self.neck_adam = RowAdam(
                self.neck_offsets, 0.0, batch_betas(self.batch_size), NECK_EPS / factor
            )
        self.statistics = densification.SplatStatistics.zeros(len(avatar.splats), device)
        self.background = torch.ones(3, device=device)
        self.num_splits = 0
        self._maps = self._cache_maps() if settings.static_neck else None
        # Compiled kernels take a minute to make; the CPU renderer is the larger part there.
        worth_it = device.type == "cuda" and settings.iterations >= ITERATIONS_WORTH_COMPILING
        # Compiled arithmetic rounds otherwise than the published one: in parity on request only.
        unasked = worth_it and not settings.parity
        wanted = unasked if settings.compile == "auto" else settings.compile == "on"
        self.compiler = Compiler(wanted and can_compile(device))
        mesh = MeshFunction(avatar, from_maps=self._maps is not None)
        self._mesh = Recorded(mesh, device.type == "cuda")
        self._place = self.compiler.wrap(place_splats)
        self._regularisers = self.compiler.wrap(regulariser_function(settings))
        self._image_terms = self.compiler.wrap(image_terms, dynamic=False)
        self._fast_lpips: FastLpips | None = None
        self._targets: TargetFeatures | None = None

    @torch.no_grad()
    def _cache_maps(self) -> HeadMaps | None:
        """Head maps of all views: without learned necks they never change."""
        count, size = len(self.data), self.avatar.uv_resolution
        if count * size * size * 6 * 4 > MAP_CACHE_BYTES:
            return None
        parts = [
            self.avatar.head_maps(expr, eyes)
            for expr, eyes in zip(
                self.data.expr.split(16), self.data.eye_rot.split(16), strict=True
            )
        ]
        return HeadMaps(
            torch.cat([p.positions for p in parts]), torch.cat([p.offsets for p in parts])
        )

    def pose(self, rows: Tensor, with_regularisers: bool, neck: Tensor | None) -> PosedGaussians:
        """The avatar in the expressions of some views."""
        if with_regularisers:
            mesh = MeshTensors(*self._mesh(*self._mesh_inputs(rows, neck)))
            return pose_on(mesh, self.avatar.splats, self._place)
        if self._maps is not None:
            return self.avatar.pose_maps(self._maps.index(rows))
        return self.avatar.pose_maps(
            self.avatar.head_maps(self.data.expr[rows], self.data.eye_rot[rows], neck)
        )

    def _mesh_inputs(self, rows: Tensor, neck: Tensor | None) -> tuple[Tensor, ...]:
        if self._maps is not None:
            maps = self._maps.index(rows)
            return maps.positions, maps.offsets
        expr, eye_rot = self.data.expr[rows], self.data.eye_rot[rows]
        return expr, eye_rot, torch.zeros_like(eye_rot) if neck is None else neck

    def render(self, posed: PosedGaussians, batch: ViewBatch, sh_degree: int) -> RenderOutput:
        """Renders posed splats into the cameras of a batch."""
        height, width = self.data.size
        return self.render_fn(
            posed.means,
            posed.quats,
            posed.scales,
            posed.opacities,
            posed.sh,
            batch.world_to_camera,
            batch.intrinsics,
            width,
            height,
            sh_degree=sh_degree,
            background=self.background,
            backend=self.settings.renderer,
        )

    def step(self, iteration: int) -> Tensor:
        """One step up to an iteration, which counts views: the first one is `batch_size`.

        Returns:
            The weighted losses (LOSS_NAMES), detached.
        """
        settings = self.settings
        set_rates(iteration, settings, self.adam, self.neck_adam)
        self.avatar.active_sh_degree = sh_degree_at(iteration, settings)
        rows = self.view_order(iteration // self.batch_size - 1, self.batch_size)
        try:
            posed, output, terms = self._backward(iteration, rows)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # compilers fail in many ways
            if not self.compiler.enabled:
                raise
            self.compiler.disable(error)
            self._drop_gradients()
            posed, output, terms = self._backward(iteration, rows)
        if not settings.parity:
            self._optimise(rows)
        if iteration < settings.densify_until:
            visible, radii = screen_radii(output.radii, settings.parity)
            self._control_density(iteration, posed, output.means2d, radii, visible)
        if settings.parity and iteration < settings.iterations:
            self._optimise(rows)
        self._drop_gradients()
        return torch.stack([terms[name].detach() for name in LOSS_NAMES])

    def _backward(
        self, iteration: int, rows: Tensor
    ) -> tuple[PosedGaussians, RenderOutput, dict[str, Tensor]]:
        """Leaves the gradients of a batch in the parameters."""
        batch = self.data.batch(rows)
        neck = None if self.settings.static_neck else self.neck_offsets.index_select(0, rows)
        posed = self.pose(rows, True, neck)
        output = self.render(posed, batch, self.avatar.active_sh_degree)
        if iteration < self.settings.densify_until:
            output.means2d.retain_grad()
        visible, _ = screen_radii(output.radii, self.settings.parity)
        terms = self.losses(iteration, posed, output.image, batch, visible, neck)
        terms["total"].backward()
        return posed, output, terms

    def _drop_gradients(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        self.neck_offsets.grad = None

    def _optimise(self, rows: Tensor) -> None:
        self.adam.step()
        if self.neck_adam is not None:
            self.neck_adam.step(rows)

    def losses(
        self,
        iteration: int,
        posed: PosedGaussians,
        image: Tensor,
        batch: ViewBatch,
        visible: Tensor,
        neck: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weighted loss terms by LOSS_NAMES; switched-off terms are zero."""
        s = self.settings
        weights = loss_weights(iteration, s, self.lpips is not None)
        lpips, kept = self._perceptual(batch) if weights.lpips > 0 else (None, [])
        blur: losses.Blur = "window" if s.parity else losses.fast_blur(batch.image)
        if self.compiler.enabled and self.device.type == "cuda":
            blur = "shifts"
        l1, dssim, distance = self._image_terms(
            image, batch.image, batch.mask, lpips, kept, blur
        ).unbind()
        terms = dict.fromkeys(LOSS_NAMES, image.new_zeros(()))
        terms |= {"l1": weights.l1 * l1, "ssim": weights.ssim * dssim}
        if lpips is not None:
            terms["lpips"] = weights.lpips * distance
        inputs = regulariser_inputs(self.avatar.splats, posed, visible)
        terms |= dict(zip(REGULARISERS, self._regularisers(inputs).unbind(), strict=True))
        if neck is not None and s.lambda_neck > 0:
            terms["neck"] = s.lambda_neck * losses.neck_loss(neck)
        terms["total"] = torch.stack([terms[name] for name in LOSS_NAMES[:-1]]).sum()
        return terms

    def _perceptual(self, batch: ViewBatch) -> tuple[Lpips | FastLpips | None, list[Tensor]]:
        """The perceptual distance to use, and what it keeps of the targets of a batch."""
        if self.lpips is None or self.settings.parity or self.device.type != "cuda":
            return self.lpips, []
        if self._fast_lpips is None:
            self._fast_lpips = FastLpips(self.lpips)
            count = len(self.data)
            try:
                self._targets = TargetFeatures(self._fast_lpips, self._masked_target, count)
            except torch.OutOfMemoryError:  # others use the device too
                self._targets = TargetFeatures(self._fast_lpips, self._masked_target, count, 0)
        assert self._targets is not None
        return self._fast_lpips, self._targets.of(batch.rows)

    def _masked_target(self, rows: Tensor) -> Tensor:
        batch = self.data.batch(rows)
        return batch.image * batch.mask

    @torch.no_grad()
    def _control_density(
        self,
        iteration: int,
        posed: PosedGaussians,
        means2d: Tensor,
        radii: Tensor,
        visible: Tensor,
    ) -> None:
        s = self.settings
        assert means2d.grad is not None
        # The loss is a mean over the batch; the criterion is about single views.
        self.statistics.add(means2d.grad * len(radii), radii, visible)
        count = self.batch_size
        if iteration > s.densify_from and is_due(iteration, s.densification_interval, count):
            relative_width = self.data.size[1] / REFERENCE_WIDTH
            limit = MAX_SCREEN_RADIUS
            threshold = s.densify_grad_threshold
            if not s.parity:
                # Gradients per pixel grow with the size of a pixel, radii shrink.
                threshold /= relative_width
                limit *= relative_width * FIXED_SCREEN_FACTOR
            densification.densify_and_prune(
                self.avatar.splats,
                self.adam,
                self.statistics,
                posed.frames.scale.mean(0),
                threshold=threshold,
                dense_size=s.percent_dense,
                max_screen_radius=limit if iteration > s.opacity_reset_interval else None,
                noise=self._noise(),
                generator=torch.Generator().manual_seed(s.seed * 1_000_003 + iteration),
                parity=s.parity,
            )
            self.num_splits += 1
        first = iteration - count < s.densify_from <= iteration
        if is_due(iteration, s.opacity_reset_interval, count) or first:
            densification.reset_opacity(self.avatar.splats, self.adam)

    def _noise(self) -> Callable[[int], Tensor] | None:
        if self.split_noise is None:
            return None
        call, draw = self.num_splits, self.split_noise
        return lambda rows: draw(call, rows)

    @torch.no_grad()
    def finish(self) -> None:
        """Keeps the mean learned neck rotation as the avatar's rest pose."""
        rows = self.split.train or list(range(len(self.data)))
        self.avatar.rest_neck.copy_(self.neck_offsets[rows].mean(0))


def screen_radii(radii: Tensor, parity: bool) -> tuple[Tensor, Tensor]:
    """Visibility (B, N) and radius in pixels (B, N) from (B, N, 2) half sizes or (B, N) radii.

    Published: the norm of both half sizes; here the larger one.
    """
    radii = radii.detach()
    if radii.ndim == 2:
        return radii > 0, radii.float()
    visible = (radii > 0).all(-1)
    sizes = radii.float()
    radius = torch.linalg.vector_norm(sizes, dim=-1) if parity else sizes.amax(-1)
    return visible, radius
