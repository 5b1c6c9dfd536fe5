"""Gaussian renderers: the compiled one against its plain twin, gsplat's formulas and laws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cap4d_core.avatar import renderer_torch
from cap4d_core.avatar.renderer import RenderOutput, choose_backend, render_gaussians
from cap4d_core.errors import UserError
from tests.core.splat_scenes import SplatScene, head_like

BACKENDS = ["cpu", "torch"]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The twin's many tiny operations only get slower with more threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def render(scene: SplatScene, **options) -> RenderOutput:
    return render_gaussians(*scene.arguments(), **options)


def gradients(scene: SplatScene, seed: int = 0, **options) -> tuple[RenderOutput, list[Tensor]]:
    """Output and the gradients of a random linear function of image, alpha and depth."""
    scene = scene.with_gradients()
    out = render(scene, with_depth=True, **options)
    out.means2d.retain_grad()
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=DOUBLE).to(x)).sum()
        for x in (out.image, out.alpha, out.depth)
    )
    loss.backward()
    return out, [leaf.grad for leaf in scene.leaves()] + [out.means2d.grad]


def one_splat(mean, scale=0.01, opacity=0.9, size=(40, 32), dtype=DOUBLE) -> SplatScene:
    intrinsics = torch.tensor([[[60.0, 0, 21.0], [0, 50.0, 15.0], [0, 0, 1]]], dtype=dtype)
    sh = torch.zeros(1, 16, 3, dtype=dtype)
    sh[0, 0] = torch.tensor([1.0, 0.0, -1.0])
    return SplatScene(
        torch.tensor([[mean]], dtype=dtype),
        torch.tensor([[[2.0, 0.0, 0.0, 0.0]]], dtype=dtype),
        torch.full((1, 1, 3), scale, dtype=dtype),
        torch.tensor([opacity], dtype=dtype),
        sh,
        torch.eye(4, dtype=dtype)[None],
        intrinsics,
        *size,
    )


# 70 x 50 pixels: partial tiles on both borders. 400 splats overlap enough that the front ones
# finish pixels (transmittance 1e-4) and cut off others.
@pytest.mark.parametrize("radius_px", [0.3, 2.0, 9.0])
def test_compiled_renderer_equals_twin_in_double_precision(radius_px: float) -> None:
    scene = head_like(400, 2, 70, 50, radius_px=radius_px, dtype=DOUBLE)
    background = (0.1, 0.5, 0.9)
    out, grads = gradients(scene, backend="cpu", background=background)
    twin, twin_grads = gradients(scene, backend="torch", background=background)
    # Same formulas in another order of operations: rounding of float64 only.
    for name in ("image", "alpha", "depth", "means2d"):
        torch.testing.assert_close(getattr(out, name), getattr(twin, name), rtol=0, atol=1e-10)
    assert torch.equal(out.radii, twin.radii)
    assert (out.radii > 0).all(-1).any()
    for grad, twin_grad in zip(grads, twin_grads, strict=True):
        assert twin_grad.abs().max() > 0
        torch.testing.assert_close(grad, twin_grad, rtol=1e-8, atol=1e-9 * twin_grad.abs().max())


def test_gradients_of_splats_centred_outside_the_image() -> None:
    # The projection's Jacobian is frozen beyond the image plus 15 %: a branch of its own.
    scene = head_like(300, 1, 40, 40, radius_px=15.0, dtype=DOUBLE)
    scene = replace(scene, means=scene.means * torch.tensor([1.8, 1.5, 1.0], dtype=DOUBLE))
    out, grads = gradients(scene, backend="cpu")
    frozen = (out.means2d < -8) | (out.means2d > 48)
    assert (frozen & (out.radii > 0)).any(0).any(0).all()  # in both directions
    for grad, twin_grad in zip(grads, gradients(scene, backend="torch")[1], strict=True):
        torch.testing.assert_close(grad, twin_grad, rtol=1e-8, atol=1e-9 * twin_grad.abs().max())


def test_compiled_renderer_equals_twin_in_single_precision() -> None:
    scene = head_like(1500, 2, 96, 80, radius_px=2.0)
    out, grads = gradients(scene, backend="cpu")
    twin, twin_grads = gradients(scene, backend="torch")
    # A pixel whose alpha or transmittance lies within rounding of a cut-off may jump by 1/255.
    for name in ("image", "alpha"):
        error = (getattr(out, name) - getattr(twin, name)).abs()
        assert error.max() < 5e-3
        assert (error > 1e-5).float().mean() < 1e-3
    assert ((out.radii - twin.radii).abs() > 0).float().mean() < 1e-3
    for grad, twin_grad in zip(grads, twin_grads, strict=True):
        assert (grad - twin_grad).norm() < 1e-3 * twin_grad.norm()


def test_pixels_are_cut_off_when_nearly_opaque() -> None:
    scene = head_like(400, 1, 48, 48, radius_px=9.0, dtype=DOUBLE)
    scene = replace(scene, opacities=torch.full_like(scene.opacities, 0.95))
    out = render(scene, backend="cpu")
    # Blending stops before transmittance reaches 1e-4, hence alpha stays below 1 - 1e-4.
    assert out.alpha.max() > 0.999
    assert out.alpha.max() < 1 - 1e-4
    torch.testing.assert_close(out.image, render(scene, backend="torch").image)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_projection_and_colours_equal_gsplat_formulas(degree: int) -> None:
    formulas = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = head_like(300, 1, 64, 64, radius_px=3.0, dtype=DOUBLE, seed=degree)
    # Spread the splats far beyond the image: culling and the clamped Jacobian take part.
    scene = replace(scene, means=scene.means * 4, opacities=torch.ones_like(scene.opacities))
    covariances, _ = formulas._quat_scale_to_covar_preci(
        scene.quats, scene.scales, compute_preci=False
    )
    radii, means2d, depths, conics, _ = formulas._fully_fused_projection(
        scene.means, covariances, scene.world_to_camera[:, None], scene.intrinsics[:, None],
        64, 64, near_plane=0.01, far_plane=1000.0,
    )  # fmt: skip
    visible = (radii[0, 0] > 0).all(-1)
    centre = torch.linalg.inv(scene.world_to_camera)[:, :3, 3]
    colors = formulas._spherical_harmonics(degree, scene.means[0] - centre, scene.sh)

    ours = renderer_torch.project(
        scene.means[0], scene.quats[0], scene.scales[0], scene.opacities,
        scene.world_to_camera[0], scene.intrinsics[0], 64, 64, 0.01, 1000.0,
    )  # fmt: skip
    assert 10 < visible.sum() < 290
    torch.testing.assert_close(ours[0][visible], means2d[0, 0][visible])
    torch.testing.assert_close(ours[1][visible], conics[0, 0][visible])
    torch.testing.assert_close(ours[2][visible], depths[0, 0][visible])
    # gsplat's torch formulas lack the opacity-aware radius of its CUDA kernels: at opacity 1 it is
    # sqrt(2 log 255) = 3.329 instead of 3.33, so a ceiling may differ by one pixel.
    assert ((ours[3] - radii[0, 0]).abs() <= 1).all()
    ours_colors = renderer_torch.spherical_harmonics(degree, scene.means[0] - centre, scene.sh)
    torch.testing.assert_close(ours_colors, colors)

    out = render(scene, backend="cpu", sh_degree=degree)
    torch.testing.assert_close(out.means2d[0][visible], means2d[0, 0][visible])
    assert torch.equal(out.radii[0], ours[3])


def finite_difference_scene() -> SplatScene:
    """Three soft splats far from every cut-off: nothing finishes, nothing leaves the image."""
    scene = head_like(3, 1, 24, 20, radius_px=6.0, dtype=DOUBLE, seed=3)
    return replace(scene, means=scene.means * 0.3, opacities=torch.full((3,), 0.6, dtype=DOUBLE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leaf", ["means", "quats", "scales", "opacities", "sh"])
def test_gradients_match_finite_differences(backend: str, leaf: str) -> None:
    # The cut-off at alpha = 1/255 is a jump of the image; weights that vanish outside a central
    # window where every splat is above it make the loss smooth.
    scene = finite_difference_scene()
    probe = render(scene, backend=backend)
    weights = torch.zeros_like(probe.image)
    weights[:, 7:13, 9:15] = torch.randn(1, 6, 6, 3, generator=torch.Generator().manual_seed(1))

    def loss(value: Tensor) -> Tensor:
        out = render(
            replace(scene, **{leaf: value}), backend=backend, with_depth=True, background=(0, 0, 0)
        )
        return (
            (out.image * weights).sum()
            + (out.alpha * weights[..., :1]).sum()
            + (out.depth * weights[..., 1:2]).sum()
        )

    value = getattr(scene, leaf).clone().requires_grad_()
    (analytic,) = torch.autograd.grad(loss(value), value)
    assert analytic.abs().max() > 0
    step = 1e-6 * max(1.0, getattr(scene, leaf).abs().max().item())
    if leaf in ("means", "scales"):
        step = 1e-7  # metres; a pixel is 1e-2 m here
    flat = value.detach().flatten()
    entries = range(0, len(flat), max(1, len(flat) // 12))
    for entry in entries:
        up, down = flat.clone(), flat.clone()
        up[entry] += step
        down[entry] -= step
        numeric = (loss(up.view_as(value)) - loss(down.view_as(value))) / (2 * step)
        # Central differences: error ~ step^2 third derivative + 1e-16 / step.
        torch.testing.assert_close(
            analytic.flatten()[entry], numeric, rtol=1e-5, atol=1e-6 * analytic.abs().max().item()
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_equals_stacked_single_views(backend: str) -> None:
    scene = head_like(200, 3, 40, 40)
    out = render(scene, backend=backend, with_depth=True)
    for b in range(3):
        single = SplatScene(
            scene.means[b : b + 1], scene.quats[b : b + 1], scene.scales[b : b + 1],
            scene.opacities, scene.sh, scene.world_to_camera[b : b + 1],
            scene.intrinsics[b : b + 1], 40, 40,
        )  # fmt: skip
        alone = render(single, backend=backend, with_depth=True)
        for name in ("image", "alpha", "depth", "means2d", "radii"):
            assert torch.equal(getattr(alone, name)[0], getattr(out, name)[b]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_and_repeated_parameters_agree(backend: str) -> None:
    scene = head_like(200, 2, 40, 40, dtype=DOUBLE)
    repeated = replace(
        scene, opacities=scene.opacities.repeat(2, 1), sh=scene.sh.repeat(2, 1, 1, 1)
    )
    out, shared = gradients(scene, backend=backend)
    other, separate = gradients(repeated, backend=backend)
    assert torch.equal(out.image, other.image)
    # A shared parameter collects the gradients of all views.
    torch.testing.assert_close(shared[3], separate[3].sum(0))
    torch.testing.assert_close(shared[4], separate[4].sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_background_fills_what_alpha_leaves(backend: str) -> None:
    scene = head_like(100, 2, 40, 30, dtype=DOUBLE)
    black = render(scene, backend=backend, background=(0, 0, 0))
    colors = torch.tensor([[0.2, 0.5, 0.8], [1.0, 0.0, 0.3]], dtype=DOUBLE)
    out = render(scene, backend=backend, background=colors)
    assert torch.equal(out.alpha, black.alpha)
    torch.testing.assert_close(out.image, black.image + (1 - out.alpha) * colors[:, None, None])
    # Alpha does not depend on the background, nor do its gradients.
    grads = []
    for background in (0.0, 1.0):
        leaf = scene.with_gradients()
        render(leaf, backend=backend, background=[background] * 3).alpha.sum().backward()
        grads.append(leaf.means.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splat_lands_where_a_pinhole_projects_it(backend: str) -> None:
    out = render(one_splat([0.1, -0.05, 0.8]), backend=backend, background=(0, 0, 0))
    u, v = 60 * 0.1 / 0.8 + 21, 50 * -0.05 / 0.8 + 15
    torch.testing.assert_close(out.means2d[0, 0], torch.tensor([u, v], dtype=DOUBLE))
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    weight = out.alpha[0, ..., 0]
    # The cut-off at 1/255 and the pixel grid make the centre of mass only nearly exact.
    assert abs((weight * columns).sum() / weight.sum() - u) < 0.02
    assert abs((weight * rows).sum() / weight.sum() - v) < 0.02
    # Colour = 0.5 + 0.2821 times the constant coefficient, cut off at 0.
    color = out.image[0, 11, 28] / out.alpha[0, 11, 28]
    expected = torch.tensor([0.5 + 0.2820947918, 0.5, 0.5 - 0.2820947918], dtype=DOUBLE)
    torch.testing.assert_close(color, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depth_is_the_distance_of_what_is_seen(backend: str) -> None:
    out = render(one_splat([0.0, 0.0, 0.8]), backend=backend, with_depth=True)
    covered = out.alpha > 0
    assert covered.any()
    torch.testing.assert_close(out.depth[covered], torch.full_like(out.depth[covered], 0.8))
    assert (out.depth[~covered] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearer_splat_hides_farther_one(backend: str) -> None:
    near, far = one_splat([0.0, 0.0, 0.5], 0.1, 1.0), one_splat([0.0, 0.0, 0.9], 0.2, 1.0)
    far.sh[0, 0] = torch.tensor([-1.0, 1.0, 1.0])

    def both(first: SplatScene, second: SplatScene) -> SplatScene:
        merged = {
            name: torch.cat([getattr(first, name), getattr(second, name)], dim)
            for name, dim in (
                ("means", 1),
                ("quats", 1),
                ("scales", 1),
                ("opacities", 0),
                ("sh", 0),
            )
        }
        return replace(first, **merged)

    out = render(both(near, far), backend=backend)
    swapped = render(both(far, near), backend=backend)
    assert torch.equal(out.image, swapped.image)
    alone = render(near, backend=backend)
    centre = (0, 15, 21)
    # Alpha is at most 0.999, so at most a thousandth of the farther splat shines through.
    assert (out.image[centre] - alone.image[centre]).abs().max() < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mean, opacity",
    [
        ([0.0, 0.0, -0.8], 0.9),  # behind the camera
        ([0.0, 0.0, 0.005], 0.9),  # nearer than the near plane
        ([0.0, 0.0, 1001.0], 0.9),  # beyond the far plane
        ([2.0, 0.0, 0.8], 0.9),  # beside the image
        ([0.0, 0.0, 0.8], 0.003),  # below 1/255
        ([float("nan"), 0.0, 0.8], 0.9),
    ],
)
def test_unseen_splats_leave_the_background(backend: str, mean, opacity) -> None:
    scene = one_splat(mean, opacity=opacity).with_gradients()
    out = render(scene, backend=backend, background=(0.3, 0.2, 0.1), with_depth=True)
    assert (out.radii == 0).all()
    assert (out.alpha == 0).all() and (out.depth == 0).all()
    assert torch.equal(out.image, torch.tensor([0.3, 0.2, 0.1], dtype=DOUBLE).expand(1, 32, 40, 3))
    out.image.sum().backward()
    if backend == "cpu":
        for leaf in scene.leaves():
            assert (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_splats_give_the_background(backend: str) -> None:
    scene = head_like(0, 2, 20, 10).with_gradients()
    out = render(scene, backend=backend, background=(0.3, 0.2, 0.1), with_depth=True)
    assert torch.equal(out.image, torch.tensor([0.3, 0.2, 0.1]).expand(2, 10, 20, 3))
    assert out.alpha.shape == out.depth.shape == (2, 10, 20, 1)
    assert out.means2d.shape == out.radii.shape == (2, 0, 2)
    assert (out.alpha == 0).all()
    out.image.sum().backward()


def test_results_do_not_depend_on_thread_count() -> None:
    scene = head_like(3000, 2, 128, 128)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        out, grads = gradients(scene, backend="cpu")
        results.append([out.image, out.alpha, out.depth, *grads])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_rotation_scale_of_quaternion_is_free() -> None:
    scene = head_like(50, 1, 32, 32, dtype=DOUBLE)
    longer = replace(scene, quats=scene.quats * -3.0)
    torch.testing.assert_close(
        render(longer, backend="cpu").image, render(scene, backend="cpu").image
    )


def test_moving_world_and_camera_together_changes_nothing() -> None:
    scene = head_like(100, 1, 32, 32, dtype=DOUBLE)
    # Degree 0: higher harmonics are tied to the world axes.
    before = render(scene, backend="cpu", sh_degree=0)
    quaternion = torch.tensor([0.9, 0.1, -0.3, 0.2], dtype=DOUBLE)
    rotation = renderer_torch.rotation_matrices(quaternion)
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=0)
    product = torch.stack(
        [
            torch.stack([w, -x, -y, -z]),
            torch.stack([x, w, -z, y]),
            torch.stack([y, z, w, -x]),
            torch.stack([z, -y, x, w]),
        ]
    )
    shift = torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE)
    motion = torch.eye(4, dtype=DOUBLE)
    motion[:3, :3], motion[:3, 3] = rotation, shift
    moved = replace(
        scene,
        means=scene.means @ rotation.T + shift,
        quats=scene.quats @ product.T,
        world_to_camera=scene.world_to_camera @ torch.linalg.inv(motion),
    )
    after = render(moved, backend="cpu", sh_degree=0)
    # atol: a pixel at the 1/255 cut-off could jump; with this seed none does.
    torch.testing.assert_close(after.image, before.image, rtol=0, atol=1e-9)


def test_no_gradients_are_recorded_without_need() -> None:
    scene = head_like(50, 1, 32, 32)
    assert not render(scene).image.requires_grad
    with torch.no_grad():
        assert not render(scene.with_gradients()).image.requires_grad


def test_backend_choice() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu) == "cpu"
    assert choose_backend("torch", cuda) == "torch"
    with pytest.raises(UserError, match="expected one of auto, gsplat, cpu, torch"):
        choose_backend("opengl", cpu)
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose_backend("gsplat", cpu)
    with pytest.raises(UserError, match="cannot render tensors on cuda"):
        choose_backend("cpu", cuda)


def test_auto_on_cuda_needs_gsplat(monkeypatch: pytest.MonkeyPatch) -> None:
    from cap4d_core.avatar import renderer_gsplat

    monkeypatch.setattr(renderer_gsplat, "is_installed", lambda: False)
    with pytest.raises(UserError, match="install gsplat"):
        choose_backend("auto", torch.device("cuda"))
    monkeypatch.setattr(renderer_gsplat, "is_installed", lambda: True)
    assert choose_backend("auto", torch.device("cuda")) == "gsplat"


def test_gsplat_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, shapes and the gradient of means2d, with a stand-in for the CUDA library."""
    from cap4d_core.avatar import renderer_gsplat

    scene = head_like(20, 2, 16, 12).with_gradients()
    seen = {}

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **kw):
        seen.update(kw, colors=colors, opacities=opacities, viewmats=viewmats, Ks=Ks)
        points = means[:, None, :, :2] * 3.0  # (B, 1, N, 2)
        radii = torch.ones(2, 1, 20, 2, dtype=torch.int32)
        radii[0, 0, 0, 1] = 0
        image = points.sum((2, 3))[:, :, None, None, None].expand(2, 1, height, width, 4) * 1.0
        return image, image[..., :1], {"means2d": points, "radii": radii}

    monkeypatch.setattr(renderer_gsplat, "_load_rasterization", lambda: rasterization)
    image, alpha, depth, means2d, radii = renderer_gsplat.rasterize(
        scene.means, scene.quats, scene.scales, scene.opacities.expand(2, 20), scene.sh[None],
        scene.world_to_camera, scene.intrinsics, 16, 12, sh_degree=2,
        background=torch.ones(2, 3), near=0.02, far=9.0, with_depth=True,
    )  # fmt: skip
    assert seen["colors"].shape == (2, 20, 16, 3) and seen["opacities"].shape == (2, 20)
    assert seen["viewmats"].shape == (2, 1, 4, 4) and seen["Ks"].shape == (2, 1, 3, 3)
    assert seen["backgrounds"].shape == (2, 1, 3) and seen["packed"] is False
    assert (seen["near_plane"], seen["far_plane"], seen["sh_degree"]) == (0.02, 9.0, 2)
    assert seen["render_mode"] == "RGB+ED"
    assert image.shape == (2, 12, 16, 3) and alpha.shape == depth.shape == (2, 12, 16, 1)
    assert means2d.shape == radii.shape == (2, 20, 2)
    assert (means2d[0, 0] == 0).all()  # invisible
    means2d.retain_grad()
    image[..., 0].mean(dim=(1, 2)).sum().backward()
    torch.testing.assert_close(means2d.grad, torch.ones(2, 20, 2))
    torch.testing.assert_close(scene.means.grad[..., :2], torch.full((2, 20, 2), 3.0))


@pytest.mark.parametrize(
    "name, shape",
    [("quats", (1, 50, 3)), ("opacities", (49,)), ("sh", (50, 16)), ("intrinsics", (3, 3))],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    scene = replace(head_like(50, 1, 32, 32), **{name: torch.ones(shape)})
    with pytest.raises(ValueError, match=name):
        render(scene)


def test_degree_needs_its_coefficients() -> None:
    scene = head_like(50, 1, 32, 32)
    flat = replace(scene, sh=scene.sh[:, :1])
    expected = render(scene, sh_degree=0).image
    assert torch.equal(render(flat, sh_degree=0).image, expected)
    with pytest.raises(ValueError, match="sh_degree 1"):
        render(flat, sh_degree=1)
