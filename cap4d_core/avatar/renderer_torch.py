"""Plain PyTorch twin of the compiled Gaussian renderer: slow, on any device, gradients by autograd.

It shares the mathematics (gsplat 1.5.3, classic mode) but no code with `renderer_cpu`, which makes
it the reference of the tests and of the benchmark. Conventions as in `renderer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
ALPHA_MIN = 1.0 / 255.0
ALPHA_MAX = 0.999
TRANSMITTANCE_MIN = 1e-4
EPS2D = 0.3
EXTENT_MAX = 3.33


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of wxyz quaternions (..., 4) of any length."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def spherical_harmonics(degree: int, directions: Tensor, sh: Tensor) -> Tensor:
    """Real spherical harmonics up to degree 3: directions (..., 3), sh (..., K, 3) -> (..., 3)."""
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    basis = [torch.full_like(x, 0.2820947917738781)]
    if degree >= 1:
        basis += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    if degree >= 2:
        basis += [
            1.0925484305920792 * x * y,
            -1.092548430592079 * y * z,
            0.9461746957575601 * z * z - 0.3153915652525201,
            -1.092548430592079 * x * z,
            0.5462742152960395 * (x * x - y * y),
        ]
    if degree >= 3:
        middle = 0.4570457994644658 - 2.285228997322329 * z * z
        basis += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            middle * y,
            z * (1.865881662950577 * z * z - 1.119528997770346),
            middle * x,
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return (torch.stack(basis, -1)[..., None] * sh[..., : len(basis), :]).sum(-2)


def project(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, camera: Tensor,
    intrinsics: Tensor, width: int, height: int, near: float, far: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """EWA projection of one view.

    Args:
        means: (N, 3) world.
        quats: (N, 4).
        scales: (N, 3).
        opacities: (N,).
        camera: (4, 4) world to camera.
        intrinsics: (3, 3).
        width: Pixels.
        height: Pixels.
        near: Metres.
        far: Metres.

    Returns:
        means2d (N, 2), conics (N, 3), depths (N,), radii (N, 2) int32. Invisible splats have
        means2d and radii 0 and harmless values elsewhere.
    """
    points = means @ camera[:3, :3].T + camera[:3, 3]
    depths = points[:, 2]
    in_range = (depths >= near) & (depths <= far) & (opacities >= ALPHA_MIN)
    # Points on the camera plane would put NaN into the gradients of all others.
    points = torch.where(in_range[:, None], points, points.new_tensor([0.0, 0.0, 1.0]))
    x, y, z = points.unbind(-1)
    focal = intrinsics[[0, 1], [0, 1]]
    centre = intrinsics[:2, 2]
    size = torch.tensor([width, height], dtype=means.dtype, device=means.device)
    slopes = torch.stack([x, y], -1) / z[:, None]
    margin = 0.3 * 0.5 * size / focal
    clamped = slopes.clamp(min=-(centre / focal + margin), max=(size - centre) / focal + margin)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [
            torch.stack([focal[0] / z, zero, -focal[0] * clamped[:, 0] / z], -1),
            torch.stack([zero, focal[1] / z, -focal[1] * clamped[:, 1] / z], -1),
        ],
        -2,
    )
    axes = jacobian @ camera[:3, :3] @ (rotation_matrices(quats) * scales[:, None, :])
    covariance = axes @ axes.transpose(-1, -2) + EPS2D * torch.eye(2).to(means)
    xx, xy, yy = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    determinant = xx * yy - xy * xy
    conics = torch.stack([yy, -xy, xx], -1) / determinant[:, None]
    means2d = slopes * focal + centre
    with torch.no_grad():
        extent = torch.sqrt(2 * torch.log((opacities / ALPHA_MIN).clamp(min=1))).clamp(
            max=EXTENT_MAX
        )
        radii = torch.ceil(extent[:, None] * torch.stack([xx, yy], -1).sqrt())
        visible = in_range & (determinant > 0) & (radii > 0).all(-1)
        visible &= ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
        radii = torch.where(visible[:, None], radii, 0.0).to(torch.int32)
    return torch.where(visible[:, None], means2d, 0.0), conics, depths, radii


def _touched_tiles(means2d: Tensor, radii: Tensor, across: int, down: int) -> Tensor:
    """(tiles, N) bool: does the splat's bounding box touch the tile."""
    low = torch.floor((means2d - radii) / TILE)
    high = torch.ceil((means2d + radii) / TILE)
    column = torch.arange(across, device=means2d.device)[:, None]
    row = torch.arange(down, device=means2d.device)[:, None]
    in_column = (column >= low[:, 0]) & (column < high[:, 0])
    in_row = (row >= low[:, 1]) & (row < high[:, 1])
    return ((radii > 0).all(-1) & in_row[:, None] & in_column[None]).flatten(0, 1)


def _render_view(
    means2d: Tensor, conics: Tensor, features: Tensor, opacities: Tensor, radii: Tensor,
    width: int, height: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Composite features (N, C) of one view: sums (H, W, C), transmittance (H, W, 1)."""
    across, down = -(-width // TILE), -(-height // TILE)
    with torch.no_grad():
        # float32 keys and a stable sort: the order gsplat's radix sort gives.
        order = torch.argsort(features[:, -1].float(), stable=True)
        touched = _touched_tiles(means2d[order], radii[order], across, down)
    steps = torch.arange(TILE, dtype=means2d.dtype, device=means2d.device) + 0.5
    pixel = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 1, 2)
    sums, rests = [], []
    for tile in range(across * down):
        ids = order[touched[tile]]
        corner = torch.tensor([tile % across, tile // across], device=means2d.device) * TILE
        delta = pixel + corner - means2d[ids]
        xx, xy, yy = conics[ids].unbind(-1)
        dx, dy = delta.unbind(-1)
        sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
        alpha = (opacities[ids] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
        alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)
        with torch.no_grad():
            kept = torch.cumprod(1 - alpha, 1) > TRANSMITTANCE_MIN
        alpha = torch.where(kept, alpha, 0.0)
        after = torch.cumprod(1 - alpha, 1)
        before = torch.cat([after.new_ones(len(after), 1), after], 1)
        sums.append((alpha * before[:, :-1]) @ features[ids])
        rests.append(before[:, -1:])

    def assemble(parts: list[Tensor]) -> Tensor:
        grid = torch.stack(parts).reshape(down, across, TILE, TILE, -1)
        return grid.transpose(1, 2).reshape(down * TILE, across * TILE, -1)[:height, :width]

    return assemble(sums), assemble(rests)


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, sh: Tensor,
    world_to_camera: Tensor, intrinsics: Tensor, width: int, height: int, *,
    sh_degree: int, background: Tensor, near: float, far: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Render with plain tensor operations; arguments and results as `renderer_cpu.rasterize`."""
    batch = means.shape[0]
    centres = torch.linalg.inv(world_to_camera)[:, :3, 3]
    colors = spherical_harmonics(sh_degree, means - centres[:, None], sh)
    colors = torch.clamp_min(colors + 0.5, 0.0)
    views = [
        project(
            means[b], quats[b], scales[b], opacities[b], world_to_camera[b], intrinsics[b],
            width, height, near, far,
        )
        for b in range(batch)
    ]  # fmt: skip
    means2d, conics, depths, radii = (torch.stack(parts) for parts in zip(*views, strict=True))
    features = torch.cat([colors, depths[..., None]], -1)
    rendered = [
        _render_view(means2d[b], conics[b], features[b], opacities[b], radii[b], width, height)
        for b in range(batch)
    ]
    sums, rests = (torch.stack(parts) for parts in zip(*rendered, strict=True))
    image = sums[..., :3] + rests * background[:, None, None, :]
    return image, 1.0 - rests, sums[..., 3:], means2d, radii
