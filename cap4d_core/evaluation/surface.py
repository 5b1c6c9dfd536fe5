"""Colours of the same places of a head in many pictures of it.

Points are fixed to the surface of the head model, so they follow pose and expression, and every
picture that shows one of them says which colour it has there.

Frames and units as in `cap4d_core.files.tracking`. Pictures are (N, H, W, 3) in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate
from cap4d_core.geometry.cameras import flip_head_opencv
from cap4d_core.geometry.crops import crop_intrinsics
from cap4d_core.geometry.mesh_rasterizer import rasterize, screen_to_ndc

# A point counts as seen when it lies no deeper than this behind what the picture shows (metres).
DEPTH_TOLERANCE = 0.005
# Surfaces seen at a flatter angle than this change colour within a pixel.
MIN_COSINE = 0.4
VIEW_BATCH = 32


@dataclass(frozen=True)
class SurfacePoints:
    """P places on a mesh: corners (P, 3) vertex indices, barycentrics (P, 3)."""

    corners: Tensor
    barycentrics: Tensor

    def __len__(self) -> int:
        """P."""
        return len(self.corners)

    def to(self, device: torch.device | str) -> SurfacePoints:
        """The same on a device."""
        return SurfacePoints(self.corners.to(device), self.barycentrics.to(device))

    def of(self, values: Tensor) -> Tensor:
        """Values at the points from values at vertices: (B, V, C) -> (B, P, C)."""
        weights = self.barycentrics.to(values)
        return (values[:, self.corners] * weights[..., None]).sum(2)


@dataclass(frozen=True)
class SurfaceColors:
    """colors (N, P, 3) of P points in N pictures, 0..1; visible (N, P) bool: valid there."""

    colors: Tensor
    visible: Tensor


def sample_surface(
    template: HeadTemplate,
    vertex_ids: NDArray[np.int64] | None = None,
    num_points: int = 4000,
    seed: int = 0,
) -> SurfacePoints:
    """Random places on the head, as many per area everywhere.

    Args:
        template: its rest pose says what area means.
        vertex_ids: faces all of whose corners are among these count; default: the head without
            neck and mouth interior (`head_vertex_ids`).
        num_points: P.
        seed: of the draws.
    """
    chosen = template.head_vertex_ids if vertex_ids is None else vertex_ids
    inside = np.zeros(template.num_vertices, bool)
    inside[chosen] = True
    faces = template.faces[inside[template.faces].all(axis=1)]
    if not len(faces):
        raise ValueError("sample_surface: no face has all its corners among the vertices")
    a, b, c = (template.vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    rng = np.random.default_rng([seed, 41])
    picked = rng.choice(len(faces), num_points, p=area / area.sum())
    # Uniform in the triangle (Osada et al. 2002).
    root, other = np.sqrt(rng.uniform(size=num_points)), rng.uniform(size=num_points)
    weights = np.stack([1 - root, root * (1 - other), root * other], -1)
    return SurfacePoints(torch.from_numpy(faces[picked]), torch.from_numpy(weights).float())


@torch.no_grad()
def posed_vertices(head: HeadModel, views: Sequence[ViewParameters]) -> Tensor:
    """Head vertices (N, V, 3) in the axes of each view's camera, metres, z forward."""
    device = head.faces.device

    def stacked(name: str) -> Tensor:
        values = np.stack([np.asarray(getattr(view, name), np.float32) for view in views])
        return torch.from_numpy(values).to(device)

    if len({np.asarray(view.shape, np.float32).tobytes() for view in views}) != 1:
        raise ValueError("views of different heads in one batch")
    shape = torch.from_numpy(np.asarray(views[0].shape, np.float32).copy()).to(device)
    output = head(
        shape, stacked("expr"), stacked("rot"), stacked("tra"), eye_rot=stacked("eye_rot")
    )
    extr = stacked("extr")
    world = flip_head_opencv(output.vertices)
    return world @ extr[:, :3, :3].transpose(1, 2) + extr[:, None, :3, 3]


def project_to_crops(points: Tensor, views: Sequence[ViewParameters], size: int) -> Tensor:
    """Pixels (N, P, 2) in crops of size x size of points (N, P, 3) in camera axes.

    (0, 0) is the outer corner of the first pixel.
    """
    intrinsics = [crop_intrinsics(v.fx, v.fy, v.cx, v.cy, v.crop_box, size) for v in views]
    fx, fy, cx, cy = points.new_tensor(intrinsics).T[..., None].unbind(0)
    x, y, z = points.unbind(-1)
    return torch.stack([x / z * fx + cx, y / z * fy + cy], -1)


@torch.no_grad()
def surface_colors(
    head: HeadModel,
    views: Sequence[ViewParameters],
    images: Tensor,
    points: SurfacePoints,
    min_cosine: float = MIN_COSINE,
) -> SurfaceColors:
    """Reads the colours of surface points off pictures.

    A point is visible where it lies in the picture, is not hidden by the head itself, and is seen
    at no flatter angle than `min_cosine`. Hair and glasses are not part of the head model: what
    they hide shows their colour.

    Args:
        head: head model; everything is computed on its device.
        views: N, with crop boxes; one identity.
        images: (N, H, H, 3) the crops.
        points: on the same mesh as `head.faces`.
        min_cosine: of the angle between the surface's normal and the direction to the camera.
    """
    device = head.faces.device
    points = points.to(device)
    size = images.shape[1]
    if images.shape != (len(views), size, size, 3):
        raise ValueError(f"{len(views)} views, pictures of shape {tuple(images.shape)}")
    colors, visible = [], []
    for first in range(0, len(views), VIEW_BATCH):
        part = views[first : first + VIEW_BATCH]
        pictures = images[first : first + VIEW_BATCH].to(device, torch.float32)
        vertices = posed_vertices(head, part)
        place = points.of(vertices)
        pixels = project_to_crops(place, part, size)
        grid = 2 * pixels[:, :, None] / size - 1
        sampled = torch.nn.functional.grid_sample(
            pictures.movedim(-1, 1), grid, mode="bilinear", align_corners=False
        )
        colors.append(sampled[..., 0].movedim(1, -1))
        seen = _facing(vertices, points) > min_cosine
        # Bilinear sampling needs all four neighbours inside.
        seen &= ((pixels > 0.5) & (pixels < size - 0.5)).all(-1)
        seen &= place[..., 2] < _depth_at(head, vertices, part, pixels, size) + DEPTH_TOLERANCE
        visible.append(seen)
    return SurfaceColors(torch.cat(colors), torch.cat(visible))


def _facing(vertices: Tensor, points: SurfacePoints) -> Tensor:
    """(N, P) cosine between the normal of a point's face and the direction to the camera."""
    a, b, c = (vertices[:, points.corners[:, k]] for k in range(3))
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-12)
    to_camera = -torch.nn.functional.normalize(points.of(vertices), dim=-1)
    return (normal * to_camera).sum(-1)


def _depth_at(
    head: HeadModel, vertices: Tensor, views: Sequence[ViewParameters], pixels: Tensor, size: int
) -> Tensor:
    """(N, P) depth in metres of what the head model shows at pixels; 0 where it shows nothing."""
    screen = project_to_crops(vertices, views, size)
    ndc = torch.cat([screen_to_ndc(screen, (size, size)), vertices[..., 2:]], -1)
    fragments = rasterize(ndc, head.faces, (size, size), perspective=True)
    column = pixels[..., 0].floor().long().clamp(0, size - 1)
    row = pixels[..., 1].floor().long().clamp(0, size - 1)
    frame = torch.arange(len(views), device=vertices.device)[:, None]
    depth = fragments.depth[frame, row, column]
    return torch.where(fragments.covered[frame, row, column], depth, torch.zeros_like(depth))
