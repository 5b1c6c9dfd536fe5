"""Image losses and regularisers."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from cap4d_core.avatar import losses
from cap4d_core.avatar.deformation import OFFSET_UNIT
from cap4d_core.avatar.schedules import (
    evaluation_interval,
    log_linear_rate,
    loss_weights,
    lpips_share,
    scheduled_rates,
    sh_degree_at,
)
from cap4d_core.geometry.rotations import so3_exp
from cap4d_core.settings import FittingSettings


def _images(seed: int = 0, size: tuple[int, int] = (24, 31)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) for _ in "ab")  # type: ignore[return-value]


def test_ssim_agrees_with_torchmetrics_inside_the_borders() -> None:
    a, b = _images()
    _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    ours = losses.ssim_map(a, b)
    # torchmetrics reflects at the borders; there the maps differ by definition.
    assert torch.allclose(ours[..., 5:-5, 5:-5], full[..., 5:-5, 5:-5], atol=1e-6)


def test_all_ways_of_blurring_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _images()
    expected = losses.ssim_map(a, b, "window")
    products = losses.fast_blur(a)
    assert not isinstance(products, str)
    for blur in ("axes", "shifts", products):
        assert torch.allclose(losses.ssim_map(a, b, blur), expected, atol=1e-9)
    monkeypatch.setattr(losses, "MAX_MATRIX_BLUR", {})
    assert losses.fast_blur(a) == "axes"


def test_ssim_of_equal_images_is_one_even_when_tiny() -> None:
    for size in ((3, 4), (24, 31)):
        a, _ = _images(size=size)
        assert float(losses.ssim(a, a)) == pytest.approx(1.0)


def test_ssim_gradient() -> None:
    a, b = (image[:1, :1, :9, :7].contiguous() for image in _images())
    assert torch.autograd.gradcheck(lambda x: losses.ssim(x, b), (a.requires_grad_(),))


def test_position_loss_counts_visible_splats_beyond_the_threshold() -> None:
    xyz = torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, 0, 10.0]], requires_grad=True)
    visible = torch.tensor([[True, True, False]])
    loss = losses.position_loss(xyz, visible, 2.0)
    assert float(loss) == pytest.approx(0.5)  # (1 + 0) / 2 visible
    loss.backward()
    assert xyz.grad is not None and xyz.grad[0, 0] > 0 and (xyz.grad[1:] == 0).all()


def test_losses_over_nothing_visible_are_zero_not_nan() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    xyz = torch.ones(3, 3, requires_grad=True)
    total = losses.position_loss(xyz, nothing, 0.1) + losses.scale_loss(xyz, nothing, 0.1)
    total.backward()
    assert float(total) == 0 and xyz.grad is not None and torch.isfinite(xyz.grad).all()


def test_scale_loss_in_face_units_and_metres() -> None:
    scales = torch.tensor([[2.0, 1.0, 0.5]])
    visible = torch.ones(2, 1, dtype=torch.bool)
    assert float(losses.scale_loss(scales, visible, 1.0)) == pytest.approx(1.0)
    world = torch.stack([scales, 2 * scales])
    # Excesses: (1, 0, 0) and (3, 1, 0).
    assert float(losses.scale_loss(world, visible, 1.0)) == pytest.approx((1 + 10**0.5) / 2)


def test_metric_position_loss_is_in_metres() -> None:
    xyz, scale = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[[0.01]]])
    visible = torch.ones(1, 1, dtype=torch.bool)
    value = losses.metric_position_loss(xyz, scale, visible, 0.005)
    assert float(value) == pytest.approx(0.015)


def test_laplacian_ignores_linear_maps() -> None:
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    linear = torch.stack([row, column, row - 2 * column], dim=-1)[None]
    assert float(losses.laplacian_loss(linear)) == pytest.approx(0, abs=1e-6)
    bump = torch.zeros(1, 8, 8, 3)
    bump[0, 4, 4, 0] = OFFSET_UNIT
    # 4^2 at the bump and 1 at its four neighbours, over 6 x 6 pixels.
    assert float(losses.laplacian_loss(bump)) == pytest.approx(20 / 36)


def test_relative_losses_vanish_for_equal_meshes() -> None:
    means = torch.randn(1, 5, 3)
    rotation = so3_exp(torch.randn(1, 5, 3))
    assert float(losses.relative_deformation_loss(means, means)) == 0
    assert float(losses.relative_rotation_loss(rotation, rotation)) == pytest.approx(0, abs=1e-10)
    turned = rotation @ so3_exp(torch.tensor([0.0, 0.2, 0.0]))
    assert float(losses.relative_rotation_loss(turned, rotation)) == pytest.approx(0.04, rel=1e-4)
    shifted = means + torch.tensor([OFFSET_UNIT, 0, 0])
    # 0.0108 m added to float32 values of order 1 is itself only known to 1e-5.
    loss = float(losses.relative_deformation_loss(shifted, means))
    assert loss == pytest.approx(1.0, rel=1e-4)


def test_neck_loss_has_no_gradient_at_rest() -> None:
    neck = torch.zeros(2, 3, requires_grad=True)
    losses.neck_loss(neck).backward()
    assert neck.grad is not None and (neck.grad == 0).all()


def test_weights_always_share_one_budget() -> None:
    settings = FittingSettings(lpips_start=10, lpips_end=20, w_lpips=0.1)
    for iteration in (1, 10, 15, 20, 50):
        weights = loss_weights(iteration, settings)
        assert weights.l1 + weights.ssim + weights.lpips / 0.1 == pytest.approx(1.0)
    assert lpips_share(15, settings) == pytest.approx(0.45)
    without = loss_weights(50, settings, has_lpips=False)
    assert without.lpips == 0 and without.l1 + without.ssim == pytest.approx(1.0)


def test_schedules() -> None:
    assert log_linear_rate(50, 1e-2, 1e-4, 100) == pytest.approx(1e-3)
    assert log_linear_rate(200, 1e-2, 1e-4, 100) == pytest.approx(1e-4)
    assert log_linear_rate(5, 0.0, 0.0, 100) == 0
    settings = FittingSettings(iterations=100, sh_warmup=10, lr_position_final=1e-3)
    assert scheduled_rates(100, settings)["xyz"] == pytest.approx(1e-3)
    assert scheduled_rates(100, settings)["neck"] == pytest.approx(1e-7)
    assert [sh_degree_at(i, settings) for i in (9, 10, 25, 90)] == [0, 1, 2, 3]
    assert evaluation_interval(settings) == 20
