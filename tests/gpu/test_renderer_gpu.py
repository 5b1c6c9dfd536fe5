"""gsplat on CUDA against the compiled CPU renderer: same scenes, same numbers."""

from __future__ import annotations

import pytest
import torch

from cap4d_core.avatar.renderer import RenderOutput, render_gaussians
from tests.core.splat_scenes import SplatScene, head_like

pytestmark = pytest.mark.gpu


def render_with_gradients(
    scene: SplatScene, device: str, backend: str
) -> tuple[RenderOutput, list[torch.Tensor]]:
    scene = scene.with_gradients(device)
    out = render_gaussians(
        *scene.arguments(), with_depth=True, background=(0.2, 0.6, 1.0), backend=backend
    )
    out.means2d.retain_grad()
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator).to(x)).sum()
        for x in (out.image, out.alpha, out.depth)
    )
    loss.backward()
    return out, [leaf.grad for leaf in scene.leaves()] + [out.means2d.grad]


@pytest.mark.parametrize("backend", ["gsplat", "torch"])
@pytest.mark.parametrize("radius_px", [0.5, 3.0])
def test_cuda_equals_cpu(backend: str, radius_px: float) -> None:
    scene = head_like(2000, 3, 100, 70, radius_px=radius_px)
    expected, expected_grads = render_with_gradients(scene, "cpu", "cpu")
    out, grads = render_with_gradients(scene, "cuda", backend)
    # Fast-math exponentials and another summation order: 1e-3 holds except where a pixel sits on a
    # cut-off (1/255, transmittance 1e-4), which may jump by that much.
    for name in ("image", "alpha"):
        error = (getattr(out, name).cpu() - getattr(expected, name)).abs()
        assert (error > 1e-3).float().mean() < 1e-3, name
        assert error.max() < 2e-2, name
    covered = expected.alpha > 0.1
    depth_error = (out.depth.cpu() - expected.depth).abs()[covered]
    assert (depth_error > 1e-3).float().mean() < 1e-3
    # A radius is a ceiling: rounding may move it by one.
    assert ((out.radii.cpu() - expected.radii).abs() > 0).float().mean() < 1e-3
    both = ((out.radii.cpu() > 0) & (expected.radii > 0)).all(-1)
    torch.testing.assert_close(
        out.means2d.cpu()[both], expected.means2d[both], rtol=1e-5, atol=1e-3
    )
    names = ("means", "quats", "scales", "opacities", "sh", "means2d")
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert (grad.cpu() - expected_grad).norm() < 5e-3 * expected_grad.norm(), name


def test_auto_picks_gsplat_on_cuda() -> None:
    scene = head_like(100, 1, 32, 32).with_gradients("cuda")
    out = render_gaussians(*scene.arguments())
    assert out.image.is_cuda
    out.image.sum().backward()
    assert scene.means.grad.abs().max() > 0


def test_no_visible_splats_on_cuda() -> None:
    scene = head_like(10, 1, 32, 32)
    scene.means[..., 2] -= 5.0  # behind the camera
    scene = scene.with_gradients("cuda")
    out = render_gaussians(*scene.arguments(), with_depth=True)
    assert (out.image == 1).all() and (out.alpha == 0).all() and (out.radii == 0).all()
    assert (out.means2d == 0).all()
    out.image.sum().backward()
