"""Differentiable Gaussian splat renderer: the interface, and the one place that picks a backend.

Conventions:
    World and camera axes are OpenCV's: +x right, +y down, +z forward; metres.
    `world_to_camera` maps world points to camera points; `intrinsics` maps those to pixels.
    Pixel (column u, row v) has its centre at (u + 0.5, v + 0.5).
    Quaternions are wxyz and need not be normalised.
    Colours are linear red, green, blue; 0.5 is added to the harmonics and the sum cut off at 0.

Backends: "gsplat" (CUDA), "cpu" (compiled, built in), "torch" (plain tensor operations, slow, any
device). All follow gsplat 1.5.3's classic mode: pixel blur 0.3, alpha between 1/255 and 0.999,
pixels finished at transmittance 1e-4, expected depth "ED".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cap4d_core.errors import UserError

Backend = Literal["auto", "gsplat", "cpu", "torch"]


@dataclass
class RenderOutput:
    """Rendered views.

    Attributes:
        image: (B, H, W, 3) linear RGB over the background, not clamped.
        alpha: (B, H, W, 1) coverage 0..1.
        depth: (B, H, W, 1) expected depth of what covers the pixel, metres, 0 where nothing does;
            None unless asked for.
        means2d: (B, N, 2) image positions, pixels, 0 for splats that are not visible. After
            `means2d.retain_grad()` the backward pass leaves its gradient in `means2d.grad`.
        radii: (B, N, 2) int32 half sizes of the footprint, pixels. Visible = both above 0.
    """

    image: Tensor
    alpha: Tensor
    depth: Tensor | None
    means2d: Tensor
    radii: Tensor


def choose_backend(backend: str, device: torch.device) -> Literal["gsplat", "cpu", "torch"]:
    """Resolve "auto" by where the tensors live, and check that the choice can work there.

    Raises:
        UserError: Unknown name, or a backend that cannot render on this device.
    """
    from cap4d_core.avatar import renderer_gsplat

    if backend not in get_args(Backend):
        raise UserError(
            f"Unknown renderer {backend!r}; expected one of {', '.join(get_args(Backend))}."
        )
    if backend == "torch":
        return "torch"
    if backend == "cpu" or (backend == "auto" and device.type == "cpu"):
        if device.type != "cpu":
            raise UserError(
                f"The renderer 'cpu' cannot render tensors on {device}; run on the CPU, or set "
                "the renderer to 'auto'."
            )
        return "cpu"
    if device.type != "cuda":
        raise UserError(
            f"The renderer 'gsplat' needs a CUDA device, the tensors are on {device}; set the "
            "renderer to 'auto' or 'torch'."
        )
    if not renderer_gsplat.is_installed():
        raise UserError(
            "Rendering on CUDA needs gsplat, which is not installed; install gsplat>=1.5.3, or run "
            "on the CPU."
        )
    return "gsplat"


def _check_shapes(named: dict[str, tuple[Tensor, tuple[tuple[int, ...], ...]]]) -> None:
    for name, (tensor, shapes) in named.items():
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")


def render_gaussians(
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
    sh_degree: int = 3,
    background: Tensor | Sequence[float] = (1.0, 1.0, 1.0),
    with_depth: bool = False,
    backend: str = "auto",
    near: float = 0.01,
    far: float = 1000.0,
) -> RenderOutput:
    """Render a batch of views; every view has splats of its own.

    Gradients flow to means, quats, scales, opacities and sh; cameras and background are constants.

    Args:
        means: (B, N, 3) splat centres, world, metres; float32 (float64 with "cpu" and "torch").
        quats: (B, N, 4) rotations of the splat axes, wxyz.
        scales: (B, N, 3) standard deviations along the splat axes, metres.
        opacities: (N,) or (B, N), 0..1.
        sh: (N, K, 3) or (B, N, K, 3) spherical harmonics coefficients, K >= (sh_degree + 1)^2.
        world_to_camera: (B, 4, 4).
        intrinsics: (B, 3, 3), pixels; skew is ignored.
        width: Image width, pixels.
        height: Image height, pixels.
        sh_degree: Highest degree in use, 0 to 3.
        background: Colour (3,) or (B, 3).
        with_depth: Also return the expected depth.
        backend: "auto", "gsplat", "cpu" or "torch".
        near: Splats with centres nearer than this are dropped, metres.
        far: Splats with centres farther than this are dropped, metres.

    Returns:
        The views.

    Raises:
        UserError: The backend cannot render here.
        ValueError: Shapes, types or the degree do not fit.
    """
    chosen = choose_backend(backend, means.device)
    batch, count = means.shape[0], means.shape[1]
    bases = sh.shape[-2]
    _check_shapes(
        {
            "means": (means, ((batch, count, 3),)),
            "quats": (quats, ((batch, count, 4),)),
            "scales": (scales, ((batch, count, 3),)),
            "opacities": (opacities, ((count,), (batch, count))),
            "sh": (sh, ((count, bases, 3), (batch, count, bases, 3))),
            "world_to_camera": (world_to_camera, ((batch, 4, 4),)),
            "intrinsics": (intrinsics, ((batch, 3, 3),)),
        }
    )
    if not 0 <= sh_degree <= 3 or bases < (sh_degree + 1) ** 2:
        raise ValueError(f"sh_degree {sh_degree} does not fit {bases} coefficients (degree 0 to 3)")
    tensors = (means, quats, scales, opacities, sh)
    if any(t.dtype != means.dtype or t.device != means.device for t in tensors):
        raise ValueError("means, quats, scales, opacities and sh differ in dtype or device")
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"splats are {means.dtype}, expected float32 or float64")
    if chosen == "gsplat" and means.dtype != torch.float32:
        raise ValueError(f"splats are {means.dtype}, gsplat renders float32")
    backdrop = torch.as_tensor(background, dtype=means.dtype, device=means.device).detach()
    backdrop = backdrop.expand(batch, 3)
    if count == 0 or batch == 0:
        return _empty_output(means, backdrop, width, height, with_depth)

    splats = (
        means,
        quats,
        scales,
        opacities.expand(batch, count),
        sh if sh.dim() == 4 else sh[None],
        world_to_camera.detach().to(means),
        intrinsics.detach().to(means),
        width,
        height,
    )
    if chosen == "gsplat":
        from cap4d_core.avatar import renderer_gsplat

        image, alpha, expected, means2d, radii = renderer_gsplat.rasterize(
            *splats, sh_degree=sh_degree, background=backdrop, near=near, far=far,
            with_depth=with_depth,
        )  # fmt: skip
        return RenderOutput(image, alpha, expected, means2d, radii)
    if chosen == "cpu":
        from cap4d_core.avatar.renderer_cpu import rasterize
    else:
        from cap4d_core.avatar.renderer_torch import rasterize
    image, alpha, depth, means2d, radii = rasterize(
        *splats, sh_degree=sh_degree, background=backdrop, near=near, far=far
    )
    expected = depth / alpha.clamp(min=1e-10) if with_depth else None
    return RenderOutput(image, alpha, expected, means2d, radii)


def _empty_output(
    means: Tensor, background: Tensor, width: int, height: int, with_depth: bool
) -> RenderOutput:
    """Views without splats: the background."""
    batch = means.shape[0]
    # Adding an empty sum keeps the image in the graph, so that backward() works here too.
    nothing = means.sum() * 0.0
    image = background[:, None, None, :].expand(batch, height, width, 3) + nothing
    alpha = means.new_zeros(batch, height, width, 1) + nothing
    return RenderOutput(
        image=image,
        alpha=alpha,
        depth=torch.zeros_like(alpha) if with_depth else None,
        means2d=means[..., :2] * 1.0,
        radii=torch.zeros(*means.shape[:2], 2, dtype=torch.int32, device=means.device),
    )
