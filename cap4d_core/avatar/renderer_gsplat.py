"""Gaussian renderer on CUDA: one call of gsplat for a batch of views with splats of their own.

Written against gsplat 1.5 (batch dimensions before the splat axis; radii per axis). Conventions as
in `renderer`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cap4d_core.errors import UserError


def is_installed() -> bool:
    """Whether gsplat can be found (its kernels are compiled on first use)."""
    return importlib.util.find_spec("gsplat") is not None


@lru_cache(maxsize=1)
def _load_rasterization() -> Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]:
    """The renderer of gsplat with its kernels loaded (and compiled, if no build of them exists)."""
    try:
        from gsplat import rasterization
        from gsplat.cuda._backend import _C as kernels
    except (ImportError, OSError, RuntimeError) as error:
        problem = str(error)
    else:
        if kernels is not None:
            return rasterization
        problem = "no compiled kernels, and no CUDA toolkit (nvcc) to compile them"
    raise UserError(
        f"gsplat cannot be used: {problem}. Install gsplat>=1.5.3 built for torch "
        f"{torch.__version__}, or a CUDA toolkit, or set the renderer to 'torch' (slow)."
    )


def _exposed_means2d(projected: Tensor, visible: Tensor) -> Tensor:
    """Image positions (B, N, 2) whose .grad the backward pass fills.

    gsplat rasterizes from its own (B, 1, N, 2) tensor, so anything derived from it would see no
    gradient. The copy handed out is a leaf that a hook serves; it also hides the uninitialised
    memory that gsplat leaves at invisible splats.
    """
    exposed = torch.where(visible, projected.detach().squeeze(1), 0.0)
    if projected.requires_grad:
        exposed.requires_grad_(True)

        def serve(gradient: Tensor) -> None:
            gradient = gradient.detach().squeeze(1)
            exposed.grad = gradient.clone() if exposed.grad is None else exposed.grad + gradient

        projected.register_hook(serve)
    return exposed


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, sh: Tensor,
    world_to_camera: Tensor, intrinsics: Tensor, width: int, height: int, *,
    sh_degree: int, background: Tensor, near: float, far: float, with_depth: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Render with gsplat; arguments as `renderer_cpu.rasterize`.

    Returns:
        image (B, H, W, 3), alpha (B, H, W, 1), expected depth (B, H, W, 1) or None,
        means2d (B, N, 2), radii (B, N, 2).

    Raises:
        UserError: gsplat's kernels cannot be loaded.
    """
    rasterization = _load_rasterization()
    colors, alpha, meta = rasterization(
        means,
        quats,
        scales,
        opacities,
        sh.expand(means.shape[0], -1, -1, -1),
        world_to_camera[:, None],
        intrinsics[:, None],
        width,
        height,
        near_plane=near,
        far_plane=far,
        sh_degree=sh_degree,
        packed=False,
        backgrounds=background[:, None],
        render_mode="RGB+ED" if with_depth else "RGB",
    )
    radii = meta["radii"].squeeze(1)
    if radii.dim() == 2:  # before 1.5 one radius served both axes
        radii = radii[..., None].expand(-1, -1, 2)
    means2d = _exposed_means2d(meta["means2d"], (radii > 0).all(-1, keepdim=True))
    colors, alpha = colors.squeeze(1), alpha.squeeze(1)
    return colors[..., :3], alpha, colors[..., 3:] if with_depth else None, means2d, radii
