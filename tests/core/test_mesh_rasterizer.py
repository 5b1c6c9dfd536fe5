"""Rasterizer: rules of coverage and ties, equality of backends, interpolation."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from cap4d_core.errors import UserError
from cap4d_core.geometry import mesh_rasterizer
from cap4d_core.geometry.mesh_rasterizer import (
    RasterizerBackend,
    interpolate,
    rasterize,
    screen_to_ndc,
)

BACKENDS: list[RasterizerBackend] = ["numba", "torch"]
if importlib.util.find_spec("pytorch3d") is not None:
    BACKENDS.append("pytorch3d")


def _pixels_to_vertices(points: list[tuple[float, float, float]], size: int) -> torch.Tensor:
    """Points in pixels (x right, y down, edges at whole numbers) of a square picture."""
    return screen_to_ndc(torch.tensor(points), (size, size))[None]


def _soup(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random triangles, a part of them on grid points so that edges and ties occur."""
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.rand(2, 300, 3, generator=generator) * 3 - 1.5
    vertices[..., 2] += 3
    snapped = (vertices * 16).round() / 16
    snap = torch.rand(2, 300, 1, generator=generator) < 0.5
    faces = torch.randint(0, 300, (300, 3), generator=generator)
    faces[200:250] = faces[:50]  # equal depth everywhere: the lower index must win
    return torch.where(snap, snapped, vertices), faces


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("size", [(32, 32), (27, 41), (40, 16)])
@pytest.mark.parametrize("perspective", [False, True])
@pytest.mark.parametrize("cull", [False, True])
def test_backends_agree_to_the_bit(
    backend: RasterizerBackend, size: tuple[int, int], perspective: bool, cull: bool
) -> None:
    vertices, faces = _soup(0)
    first, second = (
        rasterize(vertices, faces, size, perspective=perspective, cull_backfaces=cull, backend=name)
        for name in ("numba", backend)
    )
    assert torch.equal(first.face_index, second.face_index)
    assert torch.equal(first.depth, second.depth)
    assert torch.equal(first.barycentrics, second.barycentrics)
    assert not (first.face_index >= 200).logical_and(first.face_index < 250).any()


def test_torch_backend_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = _soup(1)
    whole = rasterize(vertices, faces, (32, 32), backend="torch")
    monkeypatch.setattr(mesh_rasterizer, "_MAX_FRAGMENTS", 5_000)
    parts = rasterize(vertices, faces, (32, 32), backend="torch")
    assert torch.equal(whole.face_index, parts.face_index)
    assert torch.equal(whole.barycentrics, parts.barycentrics)


@pytest.mark.parametrize("backend", BACKENDS)
def test_covered_pixels_are_those_whose_centre_is_strictly_inside(
    backend: RasterizerBackend,
) -> None:
    # Hypotenuse through pixel centres (on the edge: not covered), legs between centres.
    vertices = _pixels_to_vertices([(0.0, 0.0, 1.0), (0.0, 4.0, 1.0), (4.0, 0.0, 1.0)], 4)
    fragments = rasterize(vertices, torch.tensor([[0, 1, 2]]), (4, 4), backend=backend)
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert fragments.covered[0].int().tolist() == expected
    assert fragments.face_index[0, 3, 3] == -1
    assert (fragments.barycentrics[0, 3, 3] == -1).all() and fragments.depth[0, 3, 3] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_counter_clockwise_faces_are_the_front(backend: RasterizerBackend) -> None:
    vertices = _pixels_to_vertices([(0.1, 0.1, 1.0), (0.1, 7.9, 1.0), (7.9, 0.1, 1.0)], 8)
    front, back = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])
    assert rasterize(vertices, front, (8, 8), backend=backend).covered.any()
    assert not rasterize(vertices, back, (8, 8), backend=backend).covered.any()
    both = rasterize(vertices, back, (8, 8), backend=backend, cull_backfaces=False)
    assert torch.equal(both.covered, rasterize(vertices, front, (8, 8), backend=backend).covered)
    assert (both.barycentrics[both.covered] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_face_wins_and_unusable_ones_are_dropped(backend: RasterizerBackend) -> None:
    triangle = [(0.1, 0.1), (0.1, 7.9), (7.9, 0.1)]
    layers = [3.0, 2.0, 2.0, 4.0, 0.0, -1.0, float("nan")]
    points = [(x, y, depth) for depth in layers for x, y in triangle]
    faces = torch.arange(len(points)).view(-1, 3)
    faces = torch.cat([faces, torch.tensor([[0, 0, 1]])])  # degenerate
    fragments = rasterize(_pixels_to_vertices(points, 8), faces, (8, 8), backend=backend)
    assert set(fragments.face_index.unique().tolist()) == {-1, 1}
    # Normalised weights of equal depths; a few float32 roundings.
    assert torch.allclose(fragments.depth[fragments.covered], torch.tensor(2.0), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perspective_interpolates_linearly_in_space(backend: RasterizerBackend) -> None:
    size, focal = 32, 30.0
    corners = torch.tensor([[-0.4, -0.4, 1.0], [-0.4, 0.4, 1.0], [1.2, 0.0, 3.0]])
    pixels = corners.clone()
    pixels[:, :2] = corners[:, :2] / corners[:, 2:] * focal + size / 2
    faces = torch.tensor([[0, 1, 2]])
    fragments = rasterize(
        screen_to_ndc(pixels, (size, size))[None],
        faces,
        (size, size),
        perspective=True,
        cull_backfaces=False,
        backend=backend,
    )
    seen = interpolate(fragments, faces, corners)[0]
    covered = fragments.covered[0]
    assert covered.sum() > 50
    row, column = torch.nonzero(covered, as_tuple=True)
    ray = (torch.stack([column, row], -1) + 0.5 - size / 2) / focal
    # The interpolated point lies on the ray of its pixel (float32 projection of +-1 m).
    assert torch.allclose(seen[covered][:, :2] / seen[covered][:, 2:], ray, atol=1e-5)
    assert torch.allclose(fragments.depth[0][covered], seen[covered][:, 2], atol=1e-5)


def test_interpolation_is_affine_zero_outside_and_differentiable() -> None:
    vertices = _pixels_to_vertices([(1.0, 1.0, 1.0), (2.0, 14.0, 2.0), (13.0, 3.0, 3.0)], 16)
    faces = torch.tensor([[0, 1, 2]])
    fragments = rasterize(vertices, faces, (16, 16))
    positions = interpolate(fragments, faces, vertices[0, :, :2])[0]
    row, column = torch.nonzero(fragments.covered[0], as_tuple=True)
    expected = torch.stack([1 - (2 * column + 1) / 16, 1 - (2 * row + 1) / 16], -1)
    assert torch.allclose(positions[row, column], expected, atol=1e-6)
    assert (positions[~fragments.covered[0]] == 0).all()
    colours = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
    interpolate(fragments, faces, colours).sum().backward()
    # Weights of a pixel add up to 1, so every pixel contributes 1 per channel.
    assert colours.grad is not None
    assert torch.allclose(colours.grad.sum(1), torch.tensor(float(len(row)), dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(threads: int) -> None:
    import numba

    vertices, faces = _soup(2)
    expected = rasterize(vertices[:1], faces, (33, 33))
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(min(threads, before))
        assert torch.equal(rasterize(vertices[:1], faces, (33, 33)).depth, expected.depth)
    finally:
        numba.set_num_threads(before)


def test_small_pictures_of_large_faces_and_the_reverse() -> None:
    """Boxes of pixel centres are tight; faces far outside or across the picture stay right."""
    generator = torch.Generator().manual_seed(5)
    for scale, size in ((40.0, (9, 31)), (0.05, (257, 63))):
        vertices = (torch.rand(1, 900, 3, generator=generator) - 0.5) * scale
        vertices[..., 2] = 2.0 + torch.rand(1, 900, generator=generator)
        faces = torch.arange(900).view(-1, 3)
        both = [
            rasterize(vertices, faces, size, cull_backfaces=False, backend=name)
            for name in ("numba", "torch")
        ]
        assert both[0].covered.any()
        assert torch.equal(both[0].face_index, both[1].face_index)
        assert torch.equal(both[0].depth, both[1].depth)


def test_without_numba_the_cpu_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = _soup(4)
    expected = rasterize(vertices, faces, (16, 16), backend="numba")
    monkeypatch.setattr(mesh_rasterizer, "_numba_is_installed", lambda: False)
    assert torch.equal(rasterize(vertices, faces, (16, 16)).depth, expected.depth)
    with pytest.raises(UserError, match="numba is not installed"):
        rasterize(vertices, faces, (16, 16), backend="numba")


def test_unavailable_backends_are_refused_with_advice() -> None:
    if importlib.util.find_spec("pytorch3d") is None:
        with pytest.raises(UserError, match="not installed"):
            rasterize(torch.zeros(1, 3, 3), torch.zeros(1, 3).long(), (4, 4), backend="pytorch3d")
    with pytest.raises(ValueError, match=r"\(B, V, 3\)"):
        rasterize(torch.zeros(3, 3), torch.zeros(1, 3).long(), (4, 4))
