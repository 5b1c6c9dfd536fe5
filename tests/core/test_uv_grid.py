"""UV grid: what a pixel sees, which triangles exist, how splats are dealt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cap4d_core.avatar.uv_grid import UVGrid, atlas_islands, grid_triangles, splats_per_face
from cap4d_core.errors import UserError
from cap4d_core.flame.template import HeadTemplate


def _template(gap: float = 0.0) -> HeadTemplate:
    """Two unit quads in 3-D, one above the other in the atlas with a vertical gap between them.

    Quad a: vertices 0..3, v in [0, 0.5 - gap]; quad b: vertices 4..7, v in [0.5 + gap, 1].
    """
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    vertices = np.concatenate([corners, corners + np.array([5.0, 0, 0])])
    low = np.array([[0, 0], [1, 0], [1, 0.5 - gap], [0, 0.5 - gap]])
    high = np.array([[0, 0.5 + gap], [1, 0.5 + gap], [1, 1], [0, 1]])
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    ids = np.arange(8)
    return HeadTemplate(vertices, faces, np.concatenate([low, high]), faces, ids, ids[:4])


def test_pixel_centres_and_orientation() -> None:
    """Interpolating the uv coordinates themselves gives the documented pixel centres."""
    size = 16
    template = _template()
    grid = UVGrid(template, size)
    uv = grid.interpolate(torch.from_numpy(template.uvs).float()[None])[0]
    index = (torch.arange(size) + 0.5) / size
    # A centre on the diagonal of a quad belongs to no face.
    mask = grid.uv_mask
    assert mask.float().mean() > 0.9
    assert torch.allclose(uv[..., 1][mask], index[:, None].expand(size, size)[mask], atol=1e-5)
    assert torch.allclose(uv[..., 0][mask], (1 - index)[None].expand(size, size)[mask], atol=1e-5)


def test_clockwise_faces_are_culled() -> None:
    template = _template()
    flipped = HeadTemplate(
        template.vertices,
        template.faces[:, ::-1].copy(),
        template.uvs,
        np.concatenate([template.uv_faces[:2, ::-1], template.uv_faces[2:]]),
        template.head_vertex_ids,
        template.deformable_vertex_ids,
    )
    covered = UVGrid(flipped, 16).uv_mask
    assert not covered[:8].any() and covered[8:].any()


def test_empty_pixels_are_zero_unless_parity() -> None:
    template = _template(gap=0.2)
    values = torch.from_numpy(template.vertices).float()[None]
    grid, parity = UVGrid(template, 16), UVGrid(template, 16, parity=True)
    empty = ~grid.uv_mask
    assert empty.any()
    assert (grid.interpolate(values)[0][empty] == 0).all()
    corner_sum = values[0, template.faces[0]].sum(0)
    assert torch.allclose(parity.interpolate(values)[0][empty], -corner_sum)


def test_deform_mask_needs_all_corners() -> None:
    grid = UVGrid(_template(), 16)
    # Only quad a (v < 0.5, the upper rows) is listed as deformable.
    assert torch.equal(grid.deform_mask[:8], grid.uv_mask[:8])
    assert not grid.deform_mask[8:].any()


def test_islands_are_not_stitched_by_default() -> None:
    template = _template(gap=0.01)
    vertices = torch.from_numpy(template.vertices).float()[None]

    def longest(grid: UVGrid) -> float:
        corners = grid.interpolate(vertices).view(-1, 3)[grid.faces]
        return float((corners - corners.roll(1, 1)).norm(dim=-1).max())

    # The quads are 5 m apart: an edge that long crosses islands.
    assert longest(UVGrid(template, 16)) < 1
    assert longest(UVGrid(template, 16, separate_islands=False)) > 4


def test_islands_are_found_without_shared_indices() -> None:
    """A writer that repeats every uv entry gives the same islands."""
    template = _template(gap=0.01)
    islands = atlas_islands(template.faces, template.uvs, template.uv_faces)
    repeated = atlas_islands(
        template.faces, template.uvs[template.uv_faces.reshape(-1)], np.arange(12).reshape(4, 3)
    )
    for label in (islands, repeated):
        assert label[0] == label[1] != label[2] == label[3]


def test_triangle_order_of_a_full_grid() -> None:
    faces = grid_triangles(np.ones((3, 3), bool))
    # Column by column; per cell tl, bl, br and tl, br, tr.
    assert faces[:4].tolist() == [[0, 3, 4], [0, 4, 1], [3, 6, 7], [3, 7, 4]]
    assert faces[4].tolist() == [1, 4, 5] and len(faces) == 8


def test_triangles_leave_out_empty_pixels() -> None:
    covered = np.ones((4, 4), bool)
    covered[0, 0] = False
    faces = grid_triangles(covered)
    assert 0 not in faces
    # Only the two triangles of the corner cell touch pixel 0.
    assert len(faces) == 2 * 9 - 2


def test_splats_follow_area_with_a_minimum() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [3, 0, 0], [0, 3, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 3, 4]])  # areas 0.5 and 4.5
    assert splats_per_face(vertices, faces, 100, 2).tolist() == [10, 90]
    assert splats_per_face(vertices, faces, 10, 2).tolist() == [2, 9]


def test_bad_resolution_and_empty_atlas_are_explained() -> None:
    with pytest.raises(UserError, match="power of two"):
        UVGrid(_template(), 48)
    template = _template()
    clockwise = HeadTemplate(
        template.vertices, template.faces, template.uvs, template.uv_faces[:, ::-1].copy(),
        template.head_vertex_ids, template.deformable_vertex_ids,
    )  # fmt: skip
    with pytest.raises(UserError, match="covers 0 of"):
        UVGrid(clockwise, 16)
