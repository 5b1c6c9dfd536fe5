"""Masked metrics and the comparison of an avatar with held-out views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cap4d_core.avatar.lpips import Lpips
from cap4d_core.errors import InputFileError
from cap4d_core.evaluation.evaluate import evaluate_avatar, render_view, viewing_direction
from cap4d_core.evaluation.metrics import dilated_mask, lpips, psnr, ssim
from cap4d_core.files.image_set import ViewParameters, write_view_parameters
from cap4d_core.files.images import read_grey, read_rgb, to_uint8, write_image
from tests.core.toy_avatar import ToyAvatar

HEAD = torch.nn.Module()
SIZE = 48


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error() -> None:
    truth = _noise(20, 20, 3) * 0.5
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:9] = True
    image = truth + 0.1
    image[~mask] = 9.0  # outside: must not count
    assert psnr(image, truth, mask) == pytest.approx(20.0, abs=1e-4)
    assert psnr(truth, truth, mask) == pytest.approx(100.0)


def test_ssim_against_an_independent_implementation() -> None:
    """Full mask: equals the definition evaluated with numpy at interior pixels."""
    truth, image = _noise(30, 30, 3).double(), _noise(30, 30, 3, seed=1).double()
    image = 0.7 * truth + 0.3 * image
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[15, 15] = True
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    values = []
    # Only the masked pixel differs in what is compared: the rest is set to the truth.
    compared = truth.clone()
    compared[15, 15] = image[15, 15]
    for c in range(3):
        x, y = (p[10:21, 10:21, c].numpy() for p in (compared, truth))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * x * x).sum() - mx**2, (weights * y * y).sum() - my**2
        cov = (weights * x * y).sum() - mx * my
        values.append(
            (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        )
    assert ssim(image, truth, mask) == pytest.approx(np.mean(values), abs=2e-5)


def test_ssim_ignores_what_is_outside() -> None:
    truth = _noise(40, 40, 3)
    image = truth + 0.1 * _noise(40, 40, 3, seed=2)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 10:30] = True
    other = torch.where(mask[..., None], image, torch.rand(40, 40, 3))
    assert ssim(other, truth, mask) == pytest.approx(ssim(image, truth, mask), abs=1e-6)
    assert ssim(truth, truth, mask) == pytest.approx(1.0, abs=1e-6)


def test_empty_masks_and_other_sizes_are_refused() -> None:
    image = torch.zeros(12, 12, 3)
    with pytest.raises(ValueError, match="empty mask"):
        psnr(image, image, torch.zeros(12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ in size"):
        psnr(image, image[:5], torch.ones(12, 12, dtype=torch.bool))


def test_masks_grow_by_the_radius() -> None:
    matte = np.zeros((21, 21), np.uint8)
    matte[10, 10] = 3  # any foreground counts
    grown = dilated_mask(matte, 5)
    y, x = np.nonzero(grown)
    assert (x.min(), x.max(), y.min(), y.max()) == (5, 15, 5, 15)
    assert not grown[5, 5]  # round, not square
    assert dilated_mask(matte, 0).sum() == 1


def _view(yaw_deg: float, mouth: float) -> ViewParameters:
    """A camera 50 cm away; the head turned by yaw, mouth open by `mouth`."""
    extr = np.eye(4)
    extr[2, 3] = 0.5
    expr = np.zeros(65, np.float32)
    expr[0] = mouth
    return ViewParameters(
        shape=np.zeros(150, np.float32), expr=expr,
        rot=np.array([0, np.radians(yaw_deg), 0], np.float32), tra=np.zeros(3, np.float32),
        eye_rot=np.zeros(3, np.float32), fx=300.0, fy=300.0, cx=60.0, cy=50.0, extr=extr,
        resolution=(100, 120), crop_box=(10, 0, 110, 100),
    )  # fmt: skip


def _write_set(folder: Path, avatar: Any, views: list[ViewParameters], mattes: bool) -> Path:
    for i, view in enumerate(views):
        image = render_view(avatar, view, SIZE)
        write_image(folder / "images" / f"{i:05d}.png", to_uint8(image.numpy()))
        write_view_parameters(folder / "flame" / f"{i:05d}.npz", view)
        if mattes:
            foreground = (image < 0.999).any(dim=-1).numpy()
            write_image(folder / "mattes" / f"{i:05d}.png", foreground.astype(np.uint8) * 255)
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    avatar = ToyAvatar()
    held_out = [_view(yaw, mouth) for yaw, mouth in ((5, 0.0), (20, 1.0), (-35, 0.5))]
    references = [_view(-30, 0.0), _view(0, 0.0), _view(30, 0.0)]
    return (
        _write_set(tmp_path / "held_out", avatar, held_out, mattes=True),
        _write_set(tmp_path / "references", avatar, references, mattes=False),
    )


def test_the_true_avatar_wins(sets: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = evaluate_avatar(ToyAvatar(), HEAD, *sets, tmp_path / "out")  # type: ignore[arg-type]
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    views, summary = metrics["views"], metrics["summary"]
    assert [view["nearest_reference"] for view in views] == ["00001.png", "00002.png", "00000.png"]
    angles = [view["angle_to_reference_deg"] for view in views]
    np.testing.assert_allclose(angles, [5, 10, 5], atol=0.01)
    for view in views:
        # Only the rounding of the truth to bytes: 58.9 dB for uniform rounding errors.
        assert view["psnr"] > 55 and view["ssim"] > 0.999
        assert view["psnr_gain"] == pytest.approx(view["psnr"] - view["baseline_psnr"])
        assert view["psnr_gain"] > 10
    assert summary["num_views"] == 3 and summary["share_better_than_baseline"] == 1
    assert summary["max_angle_to_reference_deg"] == pytest.approx(10, abs=0.01)
    picture = read_rgb(tmp_path / "out" / "side_by_side.png")
    assert picture.shape[1] > 3 * 320


def test_a_wrong_avatar_loses(sets: tuple[Path, Path], tmp_path: Path) -> None:
    avatar = ToyAvatar()
    with torch.no_grad():
        avatar.splats.f_dc += 1.0
    metrics = evaluate_avatar(avatar, HEAD, *sets, tmp_path / "out")  # type: ignore[arg-type]
    assert metrics["summary"]["psnr"] < 25
    assert metrics["summary"]["psnr_gain"] < 0


def test_expression_of_each_view_is_used(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """One expression for all views (a published slip) would cost the views that differ."""

    class Frozen(ToyAvatar):
        def pose(self, expr: torch.Tensor, *rest: Any) -> Any:
            return super().pose(torch.zeros_like(expr), *rest)

    metrics = evaluate_avatar(Frozen(), HEAD, *sets, tmp_path / "out")  # type: ignore[arg-type]
    quality = [view["psnr"] for view in metrics["views"]]
    assert quality[0] > 55 > 30 > max(quality[1:])


def test_viewing_direction_turns_against_the_head() -> None:
    straight = viewing_direction(_view(0, 0))
    np.testing.assert_allclose(straight, [0, 0, -1], atol=1e-9)
    # rot turns the head to +x in head space; the camera then lies to its -x side.
    turned = viewing_direction(_view(30, 0))
    np.testing.assert_allclose(turned, [-0.5, 0, -np.cos(np.radians(30))], atol=1e-6)


def test_perceptual_distance_is_added_with_weights(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ruler of one line in place of the network, which has tests of its own."""

    class MeanDifference(torch.nn.Module):
        def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (image - target).abs().mean((1, 2, 3))

    network = MeanDifference()
    monkeypatch.setattr(Lpips, "load", lambda path, **options: network)
    metrics = evaluate_avatar(
        ToyAvatar(),  # type: ignore[arg-type]
        HEAD,  # type: ignore[arg-type]
        *sets,
        tmp_path / "out",
        lpips_weights="weights.safetensors",
    )
    summary = metrics["summary"]
    # Rounding of the truth against other views: orders of magnitude apart.
    assert 0 < summary["lpips"] < 0.1 * summary["baseline_lpips"]
    picture = _noise(SIZE, SIZE, 3)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[10:20, 10:20] = True
    outside = torch.where(mask[..., None], picture, picture.flip(0))
    assert lpips(network, outside, picture, mask) == 0


def test_the_room_behind_a_photo_does_not_count(sets: tuple[Path, Path], tmp_path: Path) -> None:
    held_out, references = sets
    for file in (held_out / "images").iterdir():
        image = read_rgb(file).copy()
        image[read_grey(held_out / "mattes" / file.name) == 0] = (20, 160, 40)
        write_image(file, image)
    metrics = evaluate_avatar(ToyAvatar(), HEAD, held_out, references, tmp_path / "out")  # type: ignore[arg-type]
    assert metrics["summary"]["psnr"] > 55


def test_empty_mattes_are_user_errors(sets: tuple[Path, Path], tmp_path: Path) -> None:
    held_out, references = sets
    write_image(held_out / "mattes" / "00001.png", np.zeros((SIZE, SIZE), np.uint8))
    with pytest.raises(InputFileError, match=r"00001\.png: found no foreground"):
        evaluate_avatar(ToyAvatar(), HEAD, held_out, references, tmp_path)  # type: ignore[arg-type]
