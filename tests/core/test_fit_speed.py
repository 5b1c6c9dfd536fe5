"""What makes the fit fast agrees with the plain arithmetic."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from cap4d_core.avatar.compiled import Compiler
from cap4d_core.avatar.fit_functions import image_terms
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import load_image_data
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.lpips_fast import FastLpips, TargetFeatures
from cap4d_core.avatar.optimizers import set_rates
from cap4d_core.avatar.schedules import is_due
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from tests.core.synthetic_head import head_folder
from tests.core.test_fitting import SETS, TINY


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    torch.manual_seed(0)
    network = Lpips()
    with torch.no_grad():
        for layer in network.convolutions:
            torch.nn.init.kaiming_normal_(layer.weight)
        for head in network.heads:
            head.uniform_(0, 1)
    return network


def test_half_precision_lpips_stays_close(lpips: Lpips) -> None:
    a, b = torch.rand(2, 2, 3, 32, 32).unbind(0)
    assert torch.allclose(FastLpips(lpips)(a, b), lpips(a, b), rtol=0.01)
    with pytest.raises(ValueError, match="parity"):
        FastLpips(Lpips(parity=True))


def test_kept_features_change_nothing(lpips: Lpips) -> None:
    fast = FastLpips(lpips)
    targets = torch.rand(9, 3, 32, 32)
    deepest = 9 * 2 * 512 * (2 * 2 + 4 * 4)
    rows = torch.tensor([8, 3])
    image = torch.rand(2, 3, 32, 32)
    expected = fast(image, targets[rows])
    for budget, taps in ((0, 0), (deepest, 2), (deepest - 1, 1), (1e9, 5)):
        kept = TargetFeatures(fast, lambda r: targets[r], 9, budget)
        assert len(kept.maps) == taps
        assert torch.allclose(fast(image, targets[rows], kept.of(rows)), expected, rtol=1e-5)


def test_kept_features_are_used_in_the_loss(lpips: Lpips) -> None:
    fast = FastLpips(lpips)
    image, target = torch.rand(1, 32, 32, 3), torch.rand(1, 3, 32, 32)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :8] = False
    kept = TargetFeatures(fast, lambda _: target * mask, 1, 1e9)
    plain = image_terms(image, target, mask, lpips)
    quick = image_terms(image, target, mask, fast, kept.of(torch.tensor([0])))
    assert torch.equal(plain[:2], quick[:2])
    assert torch.allclose(plain[2], quick[2], rtol=0.01)
    assert float(image_terms(image, target, mask, None)[2]) == 0


def test_due_once_per_interval_whatever_the_batch() -> None:
    for batch in (1, 3, 8):
        steps = range(batch, 240 + batch, batch)
        assert sum(is_due(i, 20, batch) for i in steps) == steps[-1] // 20
    assert [i for i in range(1, 10) if is_due(i, 3, 1)] == [3, 6, 9]


def _trainer(**changes: Any) -> AvatarTrainer:
    settings = TINY.model_copy(update=changes)
    head = HeadModel.load(head_folder(), lower_jaw=True)
    data = load_image_data(SETS)
    return AvatarTrainer(GaussianAvatar.create(head, data.shape, settings), data, settings)


def test_iterations_count_views() -> None:
    still = {"densify_until": 100, "densify_grad_threshold": 1.0}
    trainer = _trainer(batch_size=3, opacity_reset_interval=7, **still)
    resets = []
    for iteration in range(3, 16, 3):
        before = trainer.avatar.splats.opacity
        trainer.step(iteration)
        resets.append(trainer.avatar.splats.opacity is not before)
    # At 3 the first view of density control (2) has passed; splits come at every third view after.
    assert resets == [True] * 5
    assert trainer.num_splits == 5
    assert trainer.neck_adam is not None and trainer.neck_adam.steps == 5
    assert trainer.avatar.active_sh_degree == 3


def test_rates_are_linear_in_the_batch_at_first_and_its_root_at_last() -> None:
    one, eight = _trainer(iterations=80), _trainer(iterations=80, batch_size=8)
    for iteration, factor in ((0, 8.0), (40, 8**0.75), (80, 8**0.5), (88, 8**0.5)):
        for trainer in (one, eight):
            set_rates(iteration, trainer.settings, trainer.adam, trainer.neck_adam)
        for a, b in zip(one.adam.param_groups, eight.adam.param_groups, strict=True):
            assert b["lr"] == pytest.approx(factor * a["lr"]) and a["lr"] > 0
        assert one.neck_adam is not None and eight.neck_adam is not None
        assert eight.neck_adam.lr == pytest.approx(factor * one.neck_adam.lr)
    assert eight.adam.param_groups[0]["betas"] == (0.5, pytest.approx(0.992))


def test_parity_takes_one_view_per_step() -> None:
    assert _trainer(parity=True, batch_size=8).batch_size == 1
    assert FittingSettings(batch_size=8, parity=True).views_per_step == 1


def test_a_failing_compiler_does_not_stop_the_fit(caplog: pytest.LogCaptureFixture) -> None:
    plain = [_trainer().step(1) for _ in range(1)]
    trainer = _trainer()
    trainer.compiler = Compiler(True)

    def failing(*_: Any) -> Any:
        if trainer.compiler.enabled:
            raise RuntimeError("no kernels today")
        return image_terms(*_)

    trainer._image_terms = failing
    with caplog.at_level(logging.WARNING):
        assert torch.equal(trainer.step(1), plain[0])
    assert "no kernels today" in caplog.text and not trainer.compiler.enabled


class Operations(TorchDispatchMode):
    """Names of the tensor operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_meshes_can_be_recorded() -> None:
    """On CUDA they are a graph, which no value from the host and no read by it may interrupt."""
    trainer = _trainer()
    rows = torch.tensor([0])
    inputs = trainer._mesh_inputs(rows, trainer.neck_offsets.index_select(0, rows))
    trainer._mesh(*inputs)  # fills caches
    with Operations() as seen:
        mesh = trainer._mesh(*inputs)
        mesh.rotation.sum().backward()
    assert "aten::convolution_backward" in seen.names
    assert not seen.names & {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"}


def test_compiled_steps_agree_with_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for a GPU, once for all numbers of splats, but run as it is."""
    graphs = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=kept, bw_compiler=kept)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    have, counts = [], []
    for mode in ("off", "on"):
        trainer = _trainer(compile=mode, batch_size=2, densify_from=1)
        have.append(torch.stack([trainer.step(i) for i in (2, 4, 6)]))
        counts.append(len(trainer.avatar.splats))
        assert trainer.compiler.enabled == (mode == "on")
    # Placing, regularisers and image terms, forward and backward.
    assert len(graphs) == 6
    assert counts[0] == counts[1] > 3000
    assert torch.allclose(have[0], have[1], rtol=1e-4, atol=1e-7)
