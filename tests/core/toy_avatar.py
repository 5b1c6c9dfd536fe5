"""A few splats on a small grid that open a mouth: stands in for a fitted avatar.

Same attributes and `pose` as GaussianAvatar, without a head model, so that tests of what comes
after the fit take milliseconds.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from cap4d_core.files.tracking import Tracking

RESOLUTION = 4


class ToyAvatar(nn.Module):
    """16 grid vertices in a 10 cm square, one splat per face; expr[0] moves the lower half down."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        side = torch.linspace(-0.05, 0.05, RESOLUTION)
        y, x = torch.meshgrid(side, side, indexing="ij")
        rest = torch.stack([x, y, -0.02 * torch.cos(20 * x)], dim=-1).reshape(-1, 3)
        self.register_buffer("rest", rest)
        index = torch.arange(RESOLUTION**2).reshape(RESOLUTION, RESOLUTION)
        tl, bl, br = index[:-1, :-1], index[1:, :-1], index[1:, 1:]
        # The last column stays without faces, like the empty pixels of a real grid.
        self.register_buffer("grid_faces", torch.stack([tl, bl, br], dim=-1)[:, :-1].reshape(-1, 3))
        count = len(self.grid_faces)
        self.register_buffer("binding", torch.arange(count))
        self.uv_resolution = RESOLUTION
        self.active_sh_degree = 1
        splats = self.splats = nn.Module()
        splats.register_buffer("binding", self.binding)
        splats.xyz = nn.Parameter(torch.zeros(count, 3))
        splats.f_dc = nn.Parameter(torch.rand(count, 1, 3, generator=generator) * 2 - 0.5)
        splats.f_rest = nn.Parameter(0.1 * torch.randn(count, 15, 3, generator=generator))
        splats.opacity = nn.Parameter(torch.full((count, 1), 2.0))
        splats.scaling = nn.Parameter(torch.full((count, 3), -1.0))
        splats.rotation = nn.Parameter(torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1))

    def pose(
        self, expr: Tensor, eye_rot: Tensor, neck_rot: Tensor | None = None
    ) -> SimpleNamespace:
        batch = len(expr)
        lower = (self.rest[:, 1] > 0).float()
        vertices = self.rest.repeat(batch, 1, 1)
        vertices[..., 1] += 0.02 * expr[:, :1] * lower
        corners = vertices[:, self.grid_faces.reshape(-1)].reshape(batch, -1, 3, 3)
        size = 1 / 30
        return SimpleNamespace(
            means=corners.mean(2) + size * self.splats.xyz,
            quats=self.splats.rotation.expand(batch, -1, -1),
            scales=(self.splats.scaling.exp() * size).expand(batch, -1, -1),
            opacities=self.splats.opacity.sigmoid()[:, 0],
            sh=torch.cat([self.splats.f_dc, self.splats.f_rest], dim=1),
            vertices=vertices,
        )


def toy_driving(frames: int = 5, size: tuple[int, int] = (48, 40)) -> Tracking:
    """A mouth that opens while the head moves a little, seen from 50 cm."""
    time = np.linspace(0, 1, frames, dtype=np.float32)
    zeros = np.zeros((frames, 3), np.float32)
    expr = np.zeros((frames, 65), np.float32)
    expr[:, 0] = time
    rot, tra = zeros.copy(), zeros.copy()
    rot[:, 1] = 0.2 * time
    tra[:, 0] = 0.01 * time
    extr = np.eye(4, dtype=np.float32)
    extr[2, 3] = 0.5
    height, width = size

    def scalar(value: float) -> np.ndarray:
        return np.array([[value]], np.float32)

    return Tracking(
        shape=np.zeros(150, np.float32), expr=expr, rot=rot, tra=tra, eye_rot=zeros,
        neck_rot=zeros, fx=scalar(2.5 * height), fy=scalar(2.5 * height), cx=scalar(width / 2),
        cy=scalar(height / 2), extr=extr[None], resolutions=np.array([[height, width]]),
        camera_order=("cam0",), fps=25.0,
    )  # fmt: skip
