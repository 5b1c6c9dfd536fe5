"""The UV grid: the avatar's mesh is the head model resampled on a square grid in texture space.

Conventions:
    Pixel (row r, column c) of an R x R grid has its centre at v = (r + 0.5) / R and
    u = 1 - (c + 0.5) / R: the map is turned by 180 degrees against pictures with v upwards.
    Grid vertex id = row * R + column. Pixels that no template face covers are "empty": they belong
    to no triangle.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from cap4d_core.errors import UserError
from cap4d_core.flame.template import HeadTemplate
from cap4d_core.geometry.mesh_rasterizer import rasterize


class UVGrid(nn.Module):
    """Lookup tables of the grid (buffers, so that they follow the device).

    Attributes:
        resolution: R.
        face_index: (R, R) int64 template face of each pixel, -1 = empty.
        barycentrics: (R, R, 3); zero at empty pixels (parity: -1).
        corner_ids: (R, R, 3) int64 template vertices of each pixel's face.
        uv_mask: (R, R) bool, covered pixels. deform_mask: (R, R) bool, of them those whose face may
            be refined per expression.
        faces: (F, 3) int64 grid triangles.
    """

    face_index: Tensor
    barycentrics: Tensor
    corner_ids: Tensor
    uv_mask: Tensor
    deform_mask: Tensor
    faces: Tensor

    def __init__(
        self,
        template: HeadTemplate,
        resolution: int,
        *,
        num_vertices: int | None = None,
        separate_islands: bool = True,
        parity: bool = False,
    ) -> None:
        """Rasterizes the template's atlas.

        Args:
            template: mesh with an atlas without overlaps.
            resolution: R, a power of two (the deformation network halves it).
            num_vertices: size of the head model's mesh; template faces that use later vertices (an
                absent lower jaw) are left out.
            separate_islands: no triangle between pixels of different atlas islands, which may lie
                anywhere on the head. False as published.
            parity: published values at empty pixels: minus the sum of face 0's corners.

        Raises:
            UserError: the resolution is no power of two, or hardly a pixel is covered.
        """
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise UserError(
                f"fitting.uv_resolution is {resolution}; expected a power of two, at least 8."
            )
        self.resolution, self.parity = resolution, parity
        self.separate_islands = separate_islands
        faces, uv_faces = template.faces, template.uv_faces
        if num_vertices is not None:
            used = (faces < num_vertices).all(axis=1)
            faces, uv_faces = faces[used], uv_faces[used]

        uvs = torch.from_numpy(template.uvs.astype(np.float32))
        positions = torch.stack(
            [2 * uvs[:, 0] - 1, 1 - 2 * uvs[:, 1], torch.ones(len(uvs))], dim=-1
        )
        fragments = rasterize(positions[None], torch.from_numpy(uv_faces), (resolution, resolution))
        face_index = fragments.face_index[0]
        covered = face_index >= 0
        corner_ids = torch.from_numpy(faces)[face_index.clamp(min=0)]
        deformable = torch.zeros(template.num_vertices, dtype=torch.bool)
        deformable[torch.from_numpy(template.deformable_vertex_ids)] = True
        barycentrics = fragments.barycentrics[0].float()
        if not parity:
            barycentrics = torch.where(covered[..., None], barycentrics, 0.0)
        islands = np.zeros(len(faces), np.int64)
        if separate_islands and not parity:
            islands = atlas_islands(faces, template.uvs, uv_faces)
        pixel_islands = np.where(covered, islands[face_index.clamp(min=0)], -1)
        grid_faces = grid_triangles(covered.numpy(), pixel_islands)
        if len(grid_faces) < 2:
            raise UserError(
                f"The avatar template's atlas covers {int(covered.sum())} of {resolution}^2 "
                "pixels; expected an atlas that fills most of it. Check the template's texture "
                "coordinates."
            )
        self.register_buffer("face_index", face_index)
        self.register_buffer("barycentrics", barycentrics)
        self.register_buffer("corner_ids", corner_ids)
        self.register_buffer("uv_mask", covered)
        self.register_buffer("deform_mask", covered & deformable[corner_ids].all(-1))
        self.register_buffer("faces", torch.from_numpy(grid_faces))

    def interpolate(self, attributes: Tensor) -> Tensor:
        """Vertex attributes (B, V, C) at every pixel, (B, R, R, C)."""
        batch, _, channels = attributes.shape
        size = self.resolution
        corners = attributes.index_select(1, self.corner_ids.reshape(-1))
        corners = corners.view(batch, size, size, 3, channels)
        return (corners * self.barycentrics[..., None]).sum(3)


def atlas_islands(
    faces: NDArray[np.int64], uvs: NDArray[np.float64], uv_faces: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Island of each face: faces are connected where they share a vertex and its uv position."""
    # Some writers repeat equal uv entries, so compare positions instead of indices.
    corners = np.concatenate(
        [faces.reshape(-1, 1), np.round(uvs[uv_faces.reshape(-1)] * 1e6).astype(np.int64)], axis=1
    )
    corner_id = np.unique(corners, axis=0, return_inverse=True)[1].reshape(-1, 3)
    first = corner_id[:, [0, 1]].reshape(-1)
    second = corner_id[:, [1, 2]].reshape(-1)
    size = int(corner_id.max()) + 1
    graph = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(size, size))
    label = connected_components(graph, directed=False)[1]
    return label[corner_id[:, 0]].astype(np.int64)


def grid_triangles(
    covered: NDArray[np.bool_], islands: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Triangles between neighbouring covered pixels, (F, 3).

    Columns in the outer loop, rows in the inner one; per cell [tl, bl, br] then [tl, br, tr].

    Args:
        covered: (R, R).
        islands: (R, R) label per pixel; a triangle needs three equal ones.
    """
    size = covered.shape[0]
    column, row = np.meshgrid(np.arange(size - 1), np.arange(size - 1), indexing="ij")
    top_left = (row * size + column).reshape(-1)
    bottom_left, top_right = top_left + size, top_left + 1
    bottom_right = bottom_left + 1
    triangles = np.stack(
        [
            np.stack([top_left, bottom_left, bottom_right], axis=1),
            np.stack([top_left, bottom_right, top_right], axis=1),
        ],
        axis=1,
    ).reshape(-1, 3)
    keep = covered.reshape(-1)[triangles].all(axis=1)
    if islands is not None:
        label = islands.reshape(-1)[triangles]
        keep &= (label == label[:, :1]).all(axis=1)
    return triangles[keep].astype(np.int64)


def splats_per_face(vertices: Tensor, faces: Tensor, num_splats: int, min_per_face: int) -> Tensor:
    """Number of splats of each triangle, by its share of the area.

    Args:
        vertices: (V, 3) rest positions.
        faces: (F, 3).
        num_splats: splats to distribute (the minimum may add many more).
        min_per_face: lower bound.

    Returns:
        (F,) int64.
    """
    v0, v1, v2 = vertices[faces].unbind(1)
    area = torch.linalg.vector_norm(torch.linalg.cross(v1 - v0, v2 - v0), dim=-1) / 2
    # torch.round halves to even, as the published code does.
    share = torch.round(num_splats * area / area.sum()).long()
    return share.clamp(min=min_per_face)
