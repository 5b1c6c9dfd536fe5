"""The fit: learns, resumes to the bit, refuses to go on with NaN."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cap4d_core.avatar import fitting
from cap4d_core.avatar.fit_report import psnr, render_views
from cap4d_core.avatar.fitting import fit_avatar, load_lpips
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import load_image_data
from cap4d_core.avatar.renderer import RenderOutput, render_gaussians
from cap4d_core.avatar.training import AvatarTrainer, ViewOrder, screen_radii
from cap4d_core.errors import DivergedError, MissingAssetError
from cap4d_core.files.image_set import ImageSetItem, read_image_set
from cap4d_core.files.images import to_uint8, write_image
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import Progress
from cap4d_core.settings import FittingSettings
from tests.core.killable import KillableJob
from tests.core.synthetic_head import head_folder

DATASET = Path(__file__).parents[1] / "goldens" / "avatar" / "E_dataset"
SETS = [DATASET / "reference_images", DATASET / "generated_images"]
# Densification, an opacity reset, harmonics and the neck all act within ten steps.
TINY = FittingSettings(
    iterations=10, uv_resolution=32, deform_net_channels=4, deform_net_layers=3,
    num_gaussians_init=500, min_gaussians_per_face=1, sh_warmup=3, densify_from=2,
    densify_until=9, densification_interval=3, opacity_reset_interval=8,
    densify_grad_threshold=1e-7, lr_feature=0.02, lr_deform_net=1e-3, lr_neck=1e-3,
    evaluate_every=5,
)  # fmt: skip
Render = Callable[..., RenderOutput]


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return HeadModel.load(head_folder(), lower_jaw=True)


class Killed(Exception):
    """Stands in for a killed job."""


def kill_at(iteration: int) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.done == iteration:
            raise Killed

    return callback


def parameters(avatar: GaussianAvatar) -> dict[str, torch.Tensor]:
    return {**avatar.splats.state_dict(), **avatar.deformation.state_dict(),
            "neck": avatar.rest_neck}  # fmt: skip


def test_killed_and_resumed_gives_the_same_bits(head: HeadModel, tmp_path: Path) -> None:
    straight = fit_avatar(SETS, head, TINY, tmp_path / "straight")
    # A checkpoint after every step; the job dies after the fifth.
    settings = TINY.model_copy(update={"checkpoint_every_s": 1e-9})
    with pytest.raises(Killed):
        fit_avatar(SETS, head, settings, tmp_path / "killed", kill_at(5))
    assert (tmp_path / "killed" / "checkpoints" / "last.safetensors").exists()
    assert not (tmp_path / "killed" / "avatar.json").exists()
    seen: list[int] = []
    resumed = fit_avatar(SETS, head, settings, tmp_path / "killed", lambda p: seen.append(p.done))
    assert seen == [6, 7, 8, 9, 10]
    expected, have = parameters(straight), parameters(resumed)
    assert expected.keys() == have.keys()
    assert all(torch.equal(expected[name], have[name]) for name in expected)
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.slow
def test_killed_at_any_moment(head: HeadModel, tmp_path: Path) -> None:
    """SIGKILL of the process, also while it writes; fits of the same length end the same."""
    settings = TINY.model_copy(update={"checkpoint_every_s": 1e-9})
    output = tmp_path / "avatar"
    arguments = [head.folder, output, settings.model_dump_json(), *SETS]
    job = KillableJob("tests.core.killable_fit", arguments)
    moments = random.Random(1)
    try:
        assert job.run(None)[-1] == "end 0"
        straight = GaussianAvatar.load(output, head)
        shutil.rmtree(output)
        killed = 0
        for _ in range(3):
            lines = job.run(1, moments.random() * 0.1)
            killed += lines[-1] == f"end {-signal.SIGKILL}"
            assert not (output / "avatar.json").exists()
        assert killed == 3
        lines = job.run(None)
        assert lines[-1] == "end 0" and lines[0] != "step 1"
    finally:
        job.close()
    expected, have = parameters(straight), parameters(GaussianAvatar.load(output, head))
    assert all(torch.equal(expected[name], have[name]) for name in expected)


def test_outputs(head: HeadModel, tmp_path: Path) -> None:
    progress: list[Progress] = []
    avatar = fit_avatar(SETS, head, TINY, tmp_path, progress.append)
    assert [p.done for p in progress] == list(range(1, 11))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_gaussians"] == len(avatar.splats) and metrics["num_held_out"] == 1
    assert {"psnr", "ssim"} <= metrics["held_out"].keys()
    assert [e["iteration"] for e in metrics["evaluations"]] == [5, 10]
    assert len(metrics["curves"]["total"]) == len(metrics["curves"]["iteration"])
    assert (tmp_path / "metrics.png").stat().st_size > 0
    assert {p.name for p in (tmp_path / "previews").iterdir()} == {"000005.png", "000010.png"}
    description = json.loads((tmp_path / "avatar.json").read_text())
    assert description["settings"]["iterations"] == 10
    loaded = GaussianAvatar.load(tmp_path, head)
    expr, eyes = torch.randn(1, 65), torch.zeros(1, 3)
    assert torch.equal(loaded.pose(expr, eyes).means, avatar.pose(expr, eyes).means)


def test_other_settings_do_not_resume(head: HeadModel, tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"checkpoint_every_s": 1e-9})
    with pytest.raises(Killed):
        fit_avatar(SETS, head, settings, tmp_path, kill_at(3))
    seen: list[int] = []
    other = settings.model_copy(update={"lr_feature": 0.01, "iterations": 4})
    fit_avatar(SETS, head, other, tmp_path, lambda p: seen.append(p.done))
    assert seen == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def painted_views(head: HeadModel, tmp_path_factory: pytest.TempPathFactory) -> list[ImageSetItem]:
    """Views of a striped, opaque avatar in the cameras and expressions of the golden image sets."""
    folder = tmp_path_factory.mktemp("painted")
    items = [item for source in SETS for item in read_image_set(source)]
    data = load_image_data([items])
    avatar = GaussianAvatar.create(head, data.shape, TINY)
    with torch.no_grad():
        height = avatar.pose(torch.zeros(1, 65), torch.zeros(1, 3)).means[0, :, 1:2]
        avatar.splats.f_dc.copy_(
            1.5 * torch.sin(height * torch.tensor([60.0, 90.0, 40.0]))[:, None]
        )
        avatar.splats.opacity.fill_(4.0)
        trainer = AvatarTrainer(avatar, data, TINY)
        images = render_views(trainer, range(len(data)))
    for index, image in enumerate(images):
        write_image(folder / f"{index:05d}.png", to_uint8(image.permute(1, 2, 0).numpy()))
    return [replace(item, image=folder / f"{i:05d}.png") for i, item in enumerate(items)]


def test_fitting_improves_unseen_views(
    head: HeadModel, painted_views: list[ImageSetItem], tmp_path: Path
) -> None:
    settings = TINY.model_copy(
        update={"iterations": 60, "densify_until": 0, "evaluate_every": 20, "static_neck": True}
    )
    fit_avatar([painted_views], head, settings, tmp_path)
    scores = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    first, last = (scores[i]["held_out"]["psnr"] for i in (0, -1))
    assert last > first + 3


def test_batches_of_views(head: HeadModel, tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"batch_size": 3, "iterations": 4})
    avatar = fit_avatar(SETS, head, settings, tmp_path)
    assert all(torch.isfinite(p).all() for p in avatar.parameters())


def test_nan_stops_the_fit_and_keeps_the_last_good_state(head: HeadModel, tmp_path: Path) -> None:
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> RenderOutput:
        nonlocal calls
        calls += 1
        output = render_gaussians(*args, **kwargs)
        if calls > 6:
            output.image = output.image * float("nan")
        return output

    settings = TINY.model_copy(update={"checkpoint_every_s": 1e-9, "evaluate_every": 10})
    with pytest.raises(DivergedError, match=r"not finite.*last good state"):
        fit_avatar(SETS, head, settings, tmp_path, render_fn=failing)
    assert not (tmp_path / "avatar.json").exists()
    # The fault gone, the fit goes on where it was good.
    seen: list[int] = []
    fit_avatar(SETS, head, settings, tmp_path, lambda p: seen.append(p.done))
    assert seen[0] > 1 and seen[-1] == 10


def test_exploding_count_stops_the_fit(head: HeadModel, tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"max_gaussians": 1600})
    with pytest.raises(DivergedError, match=r"more than\s+fitting.max_gaussians"):
        fit_avatar(SETS, head, settings, tmp_path)


def test_lpips_is_optional_unless_required() -> None:
    assert load_lpips(FittingSettings(), "cpu") is None
    with pytest.raises(MissingAssetError, match="lpips_weights"):
        load_lpips(FittingSettings(require_lpips=True), "cpu")


def test_wrong_head_is_a_programming_error(head: HeadModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower_jaw"):
        fit_avatar(SETS, head, TINY.model_copy(update={"use_lower_jaw": False}), tmp_path)


def test_view_order_is_a_permutation_per_epoch() -> None:
    order = ViewOrder([3, 5, 7, 9], seed=0, device="cpu")
    steps = [order.rows(step, 3).tolist() for step in range(4)]
    flat = [view for step in steps for view in step]
    assert all(sorted(flat[i : i + 4]) == [3, 5, 7, 9] for i in (0, 4, 8))
    # Stateless: a resumed run asks for later steps first.
    assert ViewOrder([3, 5, 7, 9], 0, "cpu").rows(3, 3).tolist() == steps[3]
    assert ViewOrder([3, 5, 7, 9], 1, "cpu").rows(0, 4).tolist() != flat[:4]
    assert len(ViewOrder([1], 0, "cpu").rows(0, 5)) == 5


def test_cached_head_maps_change_nothing(head: HeadModel) -> None:
    data = load_image_data(SETS)
    losses = []
    for static in (True, False):
        # With a neck that may not move, both ways are the same computation.
        settings = TINY.model_copy(update={"static_neck": static, "lr_neck": 0.0})
        avatar = GaussianAvatar.create(head, data.shape, settings)
        trainer = AvatarTrainer(avatar, data, settings)
        losses.append(torch.stack([trainer.step(i) for i in range(1, 4)]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-7)


def test_screen_radii() -> None:
    radii = torch.tensor([[[3, 4], [0, 5], [2, 1]]], dtype=torch.int32)
    visible, radius = screen_radii(radii, parity=False)
    assert visible.tolist() == [[True, False, True]] and radius[0, 0] == 4
    assert screen_radii(radii, parity=True)[1][0, 0] == 5


def test_psnr_over_a_mask() -> None:
    target = torch.zeros(1, 3, 4, 4)
    image = torch.full_like(target, 0.1)
    image[..., 2:] = 1.0
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    assert float(psnr(image, target, mask)) == pytest.approx(20.0, abs=1e-4)


def test_log_interval_is_short_in_short_runs() -> None:
    # The guard against NaN looks at least 20 times.
    assert min(fitting.LOG_INTERVAL, max(TINY.iterations // 20, 1)) == 1
