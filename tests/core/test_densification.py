"""Adaptive density: invariants of clone, split, prune and reset, and what parity leaves broken."""

from __future__ import annotations

import math

import pytest
import torch

from cap4d_core.avatar import densification
from cap4d_core.avatar.densification import SplatStatistics, SplatTensors
from cap4d_core.avatar.optimizers import SPLAT_GROUPS, RowAdam, batch_betas, make_adam, set_rates
from cap4d_core.settings import FittingSettings

FACES = 5
SHAPES = {"xyz": (3,), "f_dc": (1, 3), "f_rest": (15, 3), "opacity": (1,), "scaling": (3,)}
SHAPES["rotation"] = (4,)


def _state(num: int = 20, stepped: bool = True) -> tuple[SplatTensors, torch.optim.Adam]:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(num, *s, generator=generator) for n, s in SHAPES.items()}
    splats = SplatTensors(tensors, torch.arange(num) % FACES, FACES)
    adam = make_adam(splats.groups(), torch.nn.Linear(1, 1), FittingSettings())
    if stepped:
        for parameter in splats.groups().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adam.step()
        adam.zero_grad()
    return splats, adam


def _statistics(num: int, gradient: float = 0.0) -> SplatStatistics:
    statistics = SplatStatistics.zeros(num)
    statistics.gradient_sum += gradient
    statistics.count += 1
    return statistics


def _check_consistent(splats: SplatTensors, adam: torch.optim.Adam) -> None:
    """Every tensor, moment and counter has one row per splat, and the optimiser knows them."""
    count = len(splats)
    for group, name in zip(adam.param_groups, SPLAT_GROUPS, strict=False):
        parameter = getattr(splats, name)
        assert group["params"][0] is parameter and len(parameter) == count
        assert len(adam.state[parameter]["exp_avg"]) == count
    assert len(splats.binding) == count
    assert torch.equal(
        torch.bincount(splats.binding, minlength=FACES).int(), splats.binding_counter
    )
    assert (splats.binding_counter > 0).all()
    # Stale parameters in the state would leak memory.
    assert all(p in {q for g in adam.param_groups for q in g["params"]} for p in adam.state)


def _densify(
    splats: SplatTensors, adam: torch.optim.Adam, statistics: SplatStatistics, **k: object
) -> None:
    arguments: dict[str, object] = {
        "threshold": 0.5, "dense_size": 1.0, "max_screen_radius": None,
        "generator": torch.Generator().manual_seed(0), **k,
    }  # fmt: skip
    densification.densify_and_prune(splats, adam, statistics, torch.ones(FACES, 1), **arguments)  # type: ignore[arg-type]


def test_nothing_happens_below_the_threshold() -> None:
    splats, adam = _state()
    splats.opacity.data.fill_(1.0)
    before = splats.xyz.detach().clone()
    _densify(splats, adam, _statistics(20, 0.4))
    assert torch.equal(splats.xyz, before)


@pytest.mark.parametrize("parity", [False, True])
def test_clone_and_split_grow_consistently(parity: bool) -> None:
    splats, adam = _state()
    splats.opacity.data.fill_(1.0)
    large = splats.scaling.detach().exp().amax(1) > 1.0
    assert large.any() and not large.all()
    _densify(splats, adam, _statistics(20, 1.0), parity=parity)
    # A clone adds one; a split replaces one by two; faces that held only parents keep those too.
    assert len(splats) >= 40
    _check_consistent(splats, adam)
    state = adam.state[splats.xyz]
    assert (state["exp_avg"][20:] == 0).any() and float(state["step"]) == 1


def test_split_children_lie_within_the_parent() -> None:
    """Offsets are in the units of the coordinates: their spread is the parent's own size."""
    splats, _ = _state(FACES * 2000, stepped=False)
    splats.opacity.data.fill_(1.0)
    splats.xyz.data.zero_()
    splats.scaling.data.fill_(math.log(2.0))
    face_scale = torch.full((FACES, 1), 0.01)
    for parity, spread in ((False, 2.0), (True, 0.02)):
        copy = SplatTensors(splats.groups(), splats.binding, FACES)  # type: ignore[arg-type]
        densification.densify_and_prune(
            copy, None, _statistics(len(copy), 1.0), face_scale, threshold=0.5, dense_size=0.001,
            max_screen_radius=None, generator=torch.Generator().manual_seed(0), parity=parity,
        )  # fmt: skip
        children = copy.xyz.detach()[-len(splats) :]
        # 30 000 draws: the standard deviation is good to 0.4 %.
        assert float(children.std()) == pytest.approx(spread, rel=0.03)
        assert torch.allclose(copy.scaling[-1].exp(), torch.tensor(2.0 / 1.6))


def test_a_face_keeps_its_most_opaque_splat() -> None:
    splats, adam = _state()
    flagged = torch.ones(20, dtype=torch.bool)
    best = [
        int(torch.where(splats.binding == f)[0][splats.opacity[splats.binding == f, 0].argmax()])
        for f in range(FACES)
    ]
    removed = densification.prunable(splats, flagged)
    assert torch.where(~removed)[0].tolist() == sorted(best)
    assert not densification.prunable(splats, flagged, parity=True).any()
    densification.prune(splats, adam, _statistics(20), flagged)
    assert len(splats) == FACES
    _check_consistent(splats, adam)


def test_equal_opacities_leave_exactly_one() -> None:
    splats, _ = _state()
    splats.opacity.data.fill_(-9.0)
    removed = densification.prunable(splats, torch.ones(20, dtype=torch.bool))
    assert torch.equal(torch.bincount(splats.binding[~removed]), torch.ones(FACES).long())


def test_huge_splats_are_pruned_unless_parity_forgot_their_size() -> None:
    for parity, expected in ((False, 19), (True, 20)):
        splats, adam = _state()
        splats.opacity.data.fill_(1.0)
        splats.scaling.data.fill_(math.log(0.01))
        statistics = _statistics(20)
        statistics.max_radius[3] = 50.0
        _densify(splats, adam, statistics, max_screen_radius=20.0, parity=parity)
        assert len(splats) == expected
        assert (statistics.max_radius == 0).all() and len(statistics.count) == expected


def test_faint_splats_are_pruned() -> None:
    splats, adam = _state()
    splats.opacity.data.fill_(1.0)
    splats.opacity.data[:5] = -9.0
    _densify(splats, adam, _statistics(20))
    assert len(splats) == 15
    _check_consistent(splats, adam)


@pytest.mark.parametrize("stepped", [True, False])
def test_opacity_reset(stepped: bool) -> None:
    splats, adam = _state(stepped=stepped)
    before = splats.opacity.detach().sigmoid()
    densification.reset_opacity(splats, adam)
    after = splats.opacity.detach().sigmoid()
    # The round trip through the logit costs a few float32 steps.
    assert torch.allclose(after, before.clamp(max=0.01), rtol=1e-4)
    if stepped:
        state = adam.state[splats.opacity]
        assert (state["exp_avg"] == 0).all() and float(state["step"]) == 1
    # The optimiser goes on with the new tensor.
    splats.opacity.grad = torch.ones_like(splats.opacity)
    adam.step()
    assert (splats.opacity.detach().sigmoid() < after).all()


def test_statistics_average_over_visible_views() -> None:
    statistics = SplatStatistics.zeros(3)
    gradients = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [5.0, 0], [9, 9]]])
    visible = torch.tensor([[True, True, False], [True, False, False]])
    radii = torch.tensor([[2.0, 7.0, 99.0], [3.0, 50.0, 99.0]])
    statistics.add(gradients, radii, visible)
    assert statistics.mean_gradient().tolist() == [3.0, 1.0, 0.0]
    assert statistics.max_radius.tolist() == [3.0, 7.0, 0.0]


def test_row_adam_is_torchs_sparse_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    row_adam = RowAdam(ours, 0.01, eps=1e-8)
    sparse = torch.optim.SparseAdam([theirs], lr=0.01, eps=1e-8)
    for rows in ([0], [2, 1], [0], [3]):
        index = torch.tensor(rows)
        weights = torch.randn(len(rows), 3, generator=generator)
        (ours[index] * weights).sum().backward()
        row_adam.step(index)
        table = torch.nn.functional.embedding(index, theirs, sparse=True)
        (table * weights).sum().backward()
        sparse.step()
        sparse.zero_grad()
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_repeated_rows_move_once() -> None:
    tables = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    for table, rows in zip(tables, ([0], [0, 0]), strict=True):
        table.grad = torch.ones(2, 3)
        RowAdam(table, 0.1).step(torch.tensor(rows))
    assert torch.equal(*tables)


def test_rates_scale_with_the_square_root_of_the_batch() -> None:
    splats, _ = _state()
    for batch, factor in ((1, 1.0), (4, 2.0)):
        settings = FittingSettings(batch_size=batch)
        adam = make_adam(splats.groups(), torch.nn.Linear(1, 1), settings)
        set_rates(settings.iterations, settings, adam, None)
        rates = {group["name"]: group["lr"] for group in adam.param_groups}
        assert rates["f_dc"] == pytest.approx(0.0025 * factor)
        assert rates["xyz"] == pytest.approx(5e-5 * factor)
        assert rates["deform_net"] == pytest.approx(1e-7 * factor)
    assert batch_betas(1) == (0.9, 0.999)
    assert batch_betas(4) == pytest.approx((0.6, 0.996))
