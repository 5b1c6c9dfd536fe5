"""Random splat scenes for the renderer tests and benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class SplatScene:
    """Arguments of `render_gaussians`, in its order."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    width: int
    height: int

    def arguments(self) -> tuple:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def leaves(self) -> list[Tensor]:
        return [self.means, self.quats, self.scales, self.opacities, self.sh]

    def with_gradients(self, device: str | None = None) -> SplatScene:
        """Copy (on `device`) whose splats are leaves that collect gradients."""
        names = ("means", "quats", "scales", "opacities", "sh")
        splats = {n: getattr(self, n).detach().to(device).requires_grad_() for n in names}
        splats = {n: t.clone().detach().requires_grad_() for n, t in splats.items()}
        cameras = {n: getattr(self, n).to(device) for n in ("world_to_camera", "intrinsics")}
        return replace(self, **splats, **cameras)


def head_like(
    count: int, batch: int, width: int, height: int, *, seed: int = 0, radius_px: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> SplatScene:  # fmt: skip
    """An egg-shaped shell of splats 24 cm high, filling the image, seen from around it.

    Args:
        count: Splats.
        batch: Views; each has splats and a camera of its own, the harmonics are shared.
        width: Pixels.
        height: Pixels.
        seed: Of the random generator.
        radius_px: Largest standard deviation of a splat, pixels; the smallest is a fifth of it.
        dtype: float32 or float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = torch.nn.functional.normalize(normal(batch, count, 3), dim=-1)
    extent = torch.tensor([0.09, 0.12, 0.10], dtype=torch.float64)
    means = directions * extent * (0.9 + 0.2 * uniform(batch, count, 1))
    focal = 4.0 * min(width, height)
    metres_per_px = 1.0 / focal
    scales = radius_px * metres_per_px * (0.2 + 0.8 * uniform(batch, count, 3))
    cameras = torch.eye(4, dtype=torch.float64).repeat(batch, 1, 1)
    angles = 0.4 * (uniform(batch) - 0.5)
    cameras[:, 0, 0] = cameras[:, 2, 2] = torch.cos(angles)
    cameras[:, 0, 2] = torch.sin(angles)
    cameras[:, 2, 0] = -torch.sin(angles)
    cameras[:, 2, 3] = 1.0
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(batch, 1, 1)
    intrinsics[:, 0, 0] = focal
    intrinsics[:, 1, 1] = focal * 1.1
    intrinsics[:, 0, 2] = width / 2 + 1.3
    intrinsics[:, 1, 2] = height / 2 - 0.7
    tensors = (
        means,
        normal(batch, count, 4),
        scales,
        0.05 + 0.9 * uniform(count),
        0.2 * normal(count, 16, 3),
        cameras,
        intrinsics,
    )
    return SplatScene(*(t.to(dtype) for t in tensors), width, height)
