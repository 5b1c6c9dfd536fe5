"""Surface colours, agreement of views, and the split of their error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cap4d_core.evaluation.consistency import cross_view_consistency, error_parts
from cap4d_core.evaluation.surface import (
    SurfaceColors,
    posed_vertices,
    project_to_crops,
    sample_surface,
    surface_colors,
)
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.geometry.mesh_rasterizer import interpolate, rasterize, screen_to_ndc
from tests.core.sampling_fixtures import head, template

SIZE = 64


def _view(yaw_deg: float, jaw: float = 0.0) -> ViewParameters:
    """The head 1.1 m in front of the camera, filling most of the crop."""
    expr = np.zeros(65, np.float32)
    expr[0] = jaw
    return ViewParameters(
        shape=np.zeros(150, np.float32), expr=expr,
        rot=np.array([0, np.radians(yaw_deg), 0], np.float32),
        tra=np.array([0, 0, -1.1], np.float32), eye_rot=np.zeros(3, np.float32),
        fx=350.0, fy=350.0, cx=60.0, cy=50.0, extr=np.eye(4, dtype=np.float32),
        resolution=(100, 120), crop_box=(10, 0, 110, 100),
    )  # fmt: skip


def _painted(views: list[ViewParameters]) -> torch.Tensor:
    """Pictures of the head, every place painted by where it is at rest; (N, S, S, 3)."""
    rest = torch.from_numpy(template().vertices).float()
    low, high = rest.amin(0), rest.amax(0)
    colors = (rest - low) / (high - low)
    vertices = posed_vertices(head(), views)
    screen = screen_to_ndc(project_to_crops(vertices, views, SIZE), (SIZE, SIZE))
    fragments = rasterize(
        torch.cat([screen, vertices[..., 2:]], -1), head().faces, (SIZE, SIZE), perspective=True
    )
    picture = interpolate(fragments, head().faces, colors)
    return torch.where(fragments.covered[..., None], picture, torch.ones(3))


VIEWS = [_view(yaw, jaw) for yaw, jaw in ((-40, 0), (-15, 2), (0, 0), (10, -1), (25, 1), (50, 2))]


def test_places_keep_their_colour_in_all_views() -> None:
    points = sample_surface(template(), num_points=800)
    surface = surface_colors(head(), VIEWS, _painted(VIEWS), points)
    rest = torch.from_numpy(template().vertices).float()
    expected = points.of(rest[None])[0]
    low, high = rest.amin(0), rest.amax(0)
    expected = (expected - low) / (high - low)
    assert float(surface.visible.float().mean()) > 0.2
    error = (surface.colors - expected).abs()[surface.visible]
    # Bilinear sampling of 64 pixels; the outline, where white shines in, is rare.
    assert float(error.median()) < 0.004 and float((error > 0.05).float().mean()) < 0.03


def test_the_far_side_is_not_visible() -> None:
    points = sample_surface(template(), num_points=800)
    surface = surface_colors(head(), [_view(0), _view(60), _view(-60)], _painted(VIEWS[:3]), points)
    x = points.of(torch.from_numpy(template().vertices).float()[None])[0, :, 0]
    left, right = x < -0.04, x > 0.04
    # rot turns the face to +x: what shows then is its -x side.
    assert surface.visible[1][left].float().mean() > 3 * surface.visible[1][right].float().mean()
    assert surface.visible[2][right].float().mean() > 3 * surface.visible[2][left].float().mean()


def test_consistency_of_known_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 500, 3, generator=generator)
    noise = 0.05 * torch.randn(12, 500, 3, generator=generator)
    visible = torch.rand(12, 500, generator=generator) < 0.7
    found = cross_view_consistency(SurfaceColors(base + noise, visible))
    assert found is not None and found.num_points == 500
    assert found.mean_std == pytest.approx(0.05, rel=0.05)
    assert found.psnr == pytest.approx(-20 * np.log10(0.05), abs=0.15)
    assert found.views_per_point == pytest.approx(8.4, abs=0.2)
    # What is not visible does not count.
    other = torch.where(visible[..., None], base + noise, torch.rand(12, 500, 3))
    assert cross_view_consistency(SurfaceColors(other, visible)) == found
    same = cross_view_consistency(SurfaceColors(base.expand(12, -1, -1), visible))
    assert same is not None and same.psnr == 100 and same.mean_std < 1e-7


def test_errors_are_split_into_shared_and_differing() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(10, 400, 3, generator=generator)
    visible = torch.ones(10, 400, dtype=torch.bool)
    shared = 0.2 * torch.randn(1, 400, 3, generator=generator)
    own = 0.1 * torch.randn(10, 400, 3, generator=generator)
    found = error_parts(SurfaceColors(truth + shared + own, visible), SurfaceColors(truth, visible))
    assert found is not None
    assert found.shared == pytest.approx(0.04, rel=0.1)
    assert found.differing == pytest.approx(0.01, rel=0.05)
    wrong = error_parts(SurfaceColors(truth + shared, visible), SurfaceColors(truth, visible))
    assert wrong is not None and wrong.differing < 1e-12
    own_only = error_parts(SurfaceColors(truth + own, visible), SurfaceColors(truth, visible))
    assert own_only is not None and own_only.shared < 2e-4


def test_too_few_views_say_nothing() -> None:
    surface = SurfaceColors(torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))
    assert cross_view_consistency(surface) is None
    assert error_parts(surface, surface) is None
    with pytest.raises(ValueError, match="at least 2"):
        cross_view_consistency(surface, min_views=1)
