"""The rasterizer and the head model on CUDA give what they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import project
from cap4d_core.geometry.crops import pixels_to_ndc
from cap4d_core.geometry.mesh_rasterizer import rasterize
from tests.core.synthetic_head import head_folder
from tests.core.test_mesh_rasterizer import _soup

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("perspective", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_triangle_soup(size: tuple[int, int], perspective: bool) -> None:
    vertices, faces = _soup(3)
    cpu = rasterize(vertices, faces, size, perspective=perspective)
    gpu = rasterize(vertices.cuda(), faces.cuda(), size, perspective=perspective, backend="torch")
    # Divisions may round differently; only pixels whose centre lies on an edge can change.
    assert (gpu.face_index.cpu() != cpu.face_index).float().mean() < 1e-3
    same = gpu.face_index.cpu() == cpu.face_index
    assert torch.allclose(gpu.barycentrics.cpu()[same], cpu.barycentrics[same], atol=1e-4)
    again = rasterize(vertices.cuda(), faces.cuda(), size, perspective=perspective, backend="torch")
    assert torch.equal(again.face_index, gpu.face_index) and torch.equal(again.depth, gpu.depth)


def test_posed_head_in_its_crop() -> None:
    model = HeadModel.load(head_folder())
    expr, rot = torch.zeros(4, 65), torch.tensor([[0.0, angle, 0.0] for angle in (-1, 0, 0.5, 1)])
    tra = torch.tensor([[0.0, 0.0, -1.2]]).expand(4, 3)
    one, extr = torch.ones(1, 1), torch.eye(4)[None]
    results = []
    for device in ("cpu", "cuda"):
        moved = [value.to(device) for value in (torch.zeros(150), expr, rot, tra)]
        vertices = model.to(device)(*moved).vertices
        camera = [value.to(device) for value in (800 * one, 800 * one, 128 * one, 128 * one, extr)]
        ndc = pixels_to_ndc(project(vertices, *camera)[0], (0, 0, 256, 256))
        results.append(rasterize(ndc, model.faces, (128, 128)).face_index.cpu())
        assert torch.isfinite(vertices).all()
    # float32 matrix products differ in the last bits, which moves silhouettes by rounding only.
    assert (results[0] != results[1]).float().mean() < 3e-3
    assert (results[0] >= 0).float().mean() > 0.1
