"""The fit on CUDA: agrees with the CPU, resumes, runs with LPIPS."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from cap4d_core.avatar.fit_functions import MeshFunction
from cap4d_core.avatar.fitting import fit_avatar
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.demo.world import reference_fit, write_demo_crops, write_demo_head
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from tests.core.test_fitting import TINY, Killed, kill_at

pytestmark = pytest.mark.gpu

NUM_VIEWS = 17


@functools.cache
def _inputs() -> tuple[HeadModel, list[Path]]:
    """Head model (on the CPU) and pictures of a demo person."""
    folder = Path(tempfile.mkdtemp(prefix="cap4d_fit_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    head = prepare_head_model(write_demo_head(folder / "assets"), None, folder / "head")
    fit = reference_fit(24, NUM_VIEWS, 160)
    write_demo_crops(folder / "views", 24, fit, crop_size=64, device="cuda")
    return HeadModel.load(head, lower_jaw=True), [folder / "views"]


def _head() -> HeadModel:
    return copy.deepcopy(_inputs()[0])


def _trainer(
    device: str, lpips: Lpips | None = None, settings: FittingSettings = TINY
) -> AvatarTrainer:
    head = _head().to(device)
    data = load_image_data(_inputs()[1]).to(device)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    return AvatarTrainer(avatar, data, settings, lpips=lpips)


def _random_lpips() -> Lpips:
    torch.manual_seed(0)
    lpips = Lpips()
    with torch.no_grad():
        for layer in lpips.convolutions:
            torch.nn.init.kaiming_normal_(layer.weight)
        for head in lpips.heads:
            head.uniform_(0, 1)
    return lpips


def test_first_steps_agree_with_the_cpu() -> None:
    losses = []
    for device in ("cpu", "cuda"):
        trainer = _trainer(device)
        losses.append(torch.stack([trainer.step(i).cpu() for i in range(1, 4)]))
    # Two renderers and other summation orders; Adam turns tiny gradients into full steps.
    assert torch.allclose(losses[0][0], losses[1][0], rtol=1e-3, atol=1e-6)
    assert torch.allclose(losses[0][:, -1], losses[1][:, -1], rtol=5e-3)


def test_killed_and_resumed_on_cuda(tmp_path: Path) -> None:
    head, sets = _head(), _inputs()[1]
    settings = TINY.model_copy(update={"checkpoint_every_s": 1e-9})
    with pytest.raises(Killed):
        fit_avatar(sets, head, settings, tmp_path, kill_at(5), device="cuda")
    seen: list[int] = []
    avatar = fit_avatar(
        sets, head, settings, tmp_path, lambda p: seen.append(p.done), device="cuda"
    )
    assert seen[0] == 6 and seen[-1] == 10
    assert all(p.is_cuda and torch.isfinite(p).all() for p in avatar.splats.parameters())


def test_half_precision_lpips_stays_close() -> None:
    lpips = _random_lpips()
    a, b = torch.rand(2, 2, 3, 64, 64).unbind(0)
    expected = lpips(a, b)
    have = lpips.cuda()(a.cuda(), b.cuda()).cpu()
    assert torch.allclose(have, expected, rtol=0.03)


def test_compiled_steps_agree_with_plain_ones() -> None:
    """With LPIPS, features of targets kept, and density control, which changes all sizes."""
    losses, counts = [], []
    for mode in ("off", "on"):
        changes = {"compile": mode, "batch_size": 2, "lpips_start": 0, "lpips_end": 1}
        trainer = _trainer("cuda", _random_lpips().cuda(), TINY.model_copy(update=changes))
        losses.append(torch.stack([trainer.step(i).cpu() for i in (2, 4, 6, 8)]))
        counts.append(len(trainer.avatar.splats))
        assert trainer.compiler.enabled == (mode == "on")
        assert trainer._targets is not None and len(trainer._targets.maps) == 5
    assert counts[0] > 500 and abs(counts[0] - counts[1]) < 0.02 * counts[0]
    assert torch.allclose(losses[0][0], losses[1][0], rtol=5e-3, atol=1e-6)
    assert torch.allclose(losses[0][:, -1], losses[1][:, -1], rtol=2e-2)


def test_meshes_are_recorded() -> None:
    trainer = _trainer("cuda")
    plain = MeshFunction(trainer.avatar, from_maps=False)
    for iteration in (1, 2, 3):
        trainer.step(iteration)
        rows = torch.tensor([iteration], device="cuda")
        inputs = trainer._mesh_inputs(rows, trainer.neck_offsets.index_select(0, rows))
        for have, expected in zip(trainer._mesh(*inputs), plain(*inputs), strict=True):
            assert torch.allclose(have, expected, atol=1e-6)
    assert trainer._mesh._graph is not None


def test_a_step_does_not_wait_for_the_device() -> None:
    """Without density control no step reads anything back (gsplat itself has to, once)."""
    trainer = _trainer("cuda")
    trainer.settings = trainer.settings.model_copy(update={"densify_until": 0})
    trainer.step(1)
    posed = trainer.pose(torch.tensor([0], device="cuda"), True, torch.zeros(1, 3, device="cuda"))
    batch = trainer.data.batch(torch.tensor([0], device="cuda"))
    output = trainer.render(posed, batch, 0)
    visible = torch.ones(1, len(trainer.avatar.splats), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = trainer.view_order(2, 1)
        neck = trainer.neck_offsets.index_select(0, rows)
        posed = trainer.pose(rows, True, neck)
        trainer.losses(2, posed, output.image.detach(), trainer.data.batch(rows), visible, neck)[
            "total"
        ].backward()
        trainer._optimise(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
