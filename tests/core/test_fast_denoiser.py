"""The fast denoiser computes what the plain one does, each saving on its own and in a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion import fused_pointwise
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.diffusion.denoiser_cost import plain_cost, sampling_cost
from cap4d_core.diffusion.denoiser_program import Kind, Savings, plan_program
from cap4d_core.diffusion.denoiser_setup import (
    DenoiserRoute,
    choose_route,
    compiled_denoiser,
    route_denoiser,
)
from cap4d_core.diffusion.fast_denoiser import FastDenoiser, even_batches
from cap4d_core.diffusion.fast_sampling import FastSamplingDenoiser
from cap4d_core.diffusion.grouping import SeededGrouping
from cap4d_core.diffusion.network_setup import choose_batches_per_call
from cap4d_core.diffusion.sampler import StepPlan, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.errors import UserError
from cap4d_core.settings import SamplingSettings
from tests.core.mmdm_models import TINY, random_denoiser, random_frames
from tests.core.sampling_fixtures import tiny_settings

TIMESTEP = 321
BATCHES = 2


def variant(**changes: Any) -> MMDMConfig:
    return TINY.model_copy(update=changes)


# The released model's shape in small, and corners: views meet everywhere, in the middle only, never
# or in several transformer blocks; references then join and leave at other places.
CONFIGS = {
    "released shape": variant(channel_mult=(1, 2, 4, 4), attention_levels=(0, 1, 2)),
    "everywhere": variant(multi_view_min_mult=1),
    "middle only": variant(attention_levels=()),
    "never": variant(multi_view_min_mult=9),
    "deep": variant(channel_mult=(1, 2, 2), transformer_depth=2, num_res_blocks=2),
}
NONE = {"share_prefix": False, "drop_outputs": False, "merge_unconditional": False}


def inputs(
    config: MMDMConfig, references: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, FrameConditioning]:
    latents, _, conditioning = random_frames(config, BATCHES, references, seed)
    return latents.to(dtype), conditioning.to(dtype=dtype)


def plain_noise(
    denoiser: MMDMDenoiser, latents: Tensor, c: FrameConditioning, references: int, guided: bool
) -> Tensor:
    times = torch.full(latents.shape[:2], TIMESTEP, device=latents.device)
    bound = denoiser(latents, times, c)[:, references:]
    if not guided:
        return bound
    return torch.stack([denoiser(latents, times, c.unconditional())[:, references:], bound])


def fast_noise(
    fast: FastDenoiser,
    latents: Tensor,
    c: FrameConditioning,
    references: int,
    guided: bool,
    call: Any = None,
) -> Tensor:
    biases = fast.time_biases(TIMESTEP)
    features = fast.reference_features(
        c.z_input[:, :references].flatten(0, 1),
        c.pos_enc[:, :references].flatten(0, 1),
        biases,
        guided,
        at_a_time=3,
    )
    ids = torch.arange(len(latents) * references, device=latents.device)
    call = call or fast
    return call(
        latents[:, references:],
        c.pos_enc[:, references:],
        biases,
        features and features.gather(ids, len(latents)),
        references,
        guided,
    )


def deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("references", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_denoiser(name: str, references: int) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        denoiser = random_denoiser(CONFIGS[name]).to(dtype)
        latents, c = inputs(CONFIGS[name], references, dtype)
        for guided in (True, False):
            expected = plain_noise(denoiser, latents, c, references, guided)
            actual = fast_noise(FastDenoiser(denoiser), latents, c, references, guided)
            assert actual.shape == expected.shape
            assert deviation(actual, expected) < bound


@pytest.mark.parametrize("saving", [*NONE, None])
def test_each_saving_on_its_own(saving: str | None) -> None:
    config = CONFIGS["released shape"]
    denoiser = random_denoiser(config).double()
    latents, c = inputs(config, 2, torch.float64)
    fast = FastDenoiser(denoiser, Savings(**(NONE | ({saving: True} if saving else {}))))
    expected = plain_noise(denoiser, latents, c, 2, guided=True)
    assert deviation(fast_noise(fast, latents, c, 2, guided=True), expected) < 1e-12


def test_enlarging_within_the_convolution() -> None:
    config = CONFIGS["released shape"]
    denoiser = random_denoiser(config).double()
    latents, c = inputs(config, 1, torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        fast = FastDenoiser(denoiser, merge_upsampling=True, memory_format=layout)
        expected = plain_noise(denoiser, latents, c, 1, guided=True)
        assert deviation(fast_noise(fast, latents, c, 1, guided=True), expected) < 1e-12


def test_references_are_used() -> None:
    """Guards the comparisons above against networks that ignore references."""
    denoiser = random_denoiser(TINY)
    latents, c = inputs(TINY, 1, torch.float32)
    other = FrameConditioning(c.pos_enc, c.z_input + 1, c.ref_mask)
    expected = plain_noise(denoiser, latents, c, 1, guided=False)
    changed = plain_noise(denoiser, latents, other, 1, guided=False)
    assert deviation(changed, expected) > 1e-3


def test_weights_stay_the_denoisers() -> None:
    denoiser = random_denoiser(TINY)
    latents, c = inputs(TINY, 1, torch.float32)
    before = plain_noise(denoiser, latents, c, 1, guided=True)
    names = list(denoiser.state_dict())
    FastDenoiser(denoiser)
    assert list(denoiser.state_dict()) == names
    assert torch.equal(plain_noise(denoiser, latents, c, 1, guided=True), before)


def test_what_references_take_part_in() -> None:
    """In the released model: from the first transformer of level 1 to the last one of level 1."""
    with torch.device("meta"):
        program = plan_program(MMDMDenoiser(MMDMConfig()))
    operations = program.operations
    first, last = operations[program.first], operations[program.last]
    assert (first.kind, first.level) == (last.kind, last.level) == (Kind.TRANSFORMER, 1)
    assert all(o.level >= 1 for o in operations[program.first : program.last + 1])
    after = operations[program.last + 1 :]
    assert [o.kind for o in after[:1]] == [Kind.UP] and not any(o.across_views for o in after)
    # Of the skips made before, level 1 uses one: its own input.
    assert [operations[i].level for i in program.reference_skips] == [1]


def frames(config: MMDMConfig, count: int, mask: float, seed: int) -> FrameConditioning:
    generator = torch.Generator().manual_seed(seed)
    side = config.latent_size
    return FrameConditioning(
        torch.randn(count, side, side, config.condition_channels, generator=generator),
        torch.randn(count, 4, side, side, generator=generator) * mask,
        torch.full((count, 1, side, side), mask),
    )


def run(denoiser: Any, max_references: int, guidance: float = 2.0, **changes: Any) -> Tensor:
    references, num_views = min(3, max_references), 12
    size = TINY.views_per_call - references
    noise = torch.randn(num_views, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    arguments: dict[str, Any] = {
        "noise": noise,
        "batches_per_call": 2,
    }
    return sample_stochastic_io(
        denoiser,
        NoiseSchedule(),
        frames(TINY, 3, 1.0, 1),
        frames(TINY, num_views, 0.0, 2),
        5,
        guidance,
        TINY.views_per_call,
        max_references,
        grouping=SeededGrouping(3, num_views, references, size, ("k",)),
        **(arguments | changes),
    )


@pytest.mark.parametrize("max_references", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_whole_sampling_run(max_references: int, guidance: float) -> None:
    denoiser = random_denoiser(TINY)
    expected = run(denoiser, max_references, guidance)
    # Float32 rounding, carried through 5 steps of an untrained network.
    for same_shapes in (False, True):
        for map_bytes in (0, 2**20):
            fast = FastSamplingDenoiser(
                FastDenoiser(denoiser), same_shapes=same_shapes, map_bytes=map_bytes
            )
            assert deviation(run(fast, max_references, guidance), expected) < 1e-4
            # Three batches per call leave a part of a call over.
            actual = run(fast, max_references, guidance, batches_per_call=5)
            assert deviation(actual, expected) < 1e-4


def test_guidance_in_a_part_of_the_steps() -> None:
    """As without guidance outside the interval, as with guidance inside; plain and fast alike."""
    denoiser = random_denoiser(TINY)
    fast = FastSamplingDenoiser(FastDenoiser(denoiser))
    everywhere, nowhere = run(denoiser, 1), run(denoiser, 1, guidance=1.0)
    assert torch.equal(run(denoiser, 1, guidance_interval=(0.0, 1.0)), everywhere)
    assert torch.equal(run(denoiser, 1, guidance_interval=(0.5, 0.5)), nowhere)
    # Five steps: the second and third are guided.
    middle = run(denoiser, 1, guidance_interval=(0.2, 0.6))
    start = run(denoiser, 1, guidance=1.0, end_step=1)
    guided = run(denoiser, 1, noise=start, start_step=1, end_step=3)
    assert torch.equal(middle, run(denoiser, 1, guidance=1.0, noise=guided, start_step=3))
    assert deviation(middle, everywhere) > 1e-3 and deviation(middle, nowhere) > 1e-3
    assert deviation(run(fast, 1, guidance_interval=(0.2, 0.6)), middle) < 1e-4


def test_pieces_give_the_same_bits_as_the_whole() -> None:
    fast = FastSamplingDenoiser(FastDenoiser(random_denoiser(TINY)), same_shapes=True)
    whole = run(fast, 2)
    middle = run(fast, 2, end_step=2)
    again = FastSamplingDenoiser(FastDenoiser(random_denoiser(TINY)), same_shapes=True)
    assert torch.equal(run(again, 2, noise=middle, start_step=2), whole)


def test_calls_of_one_shape() -> None:
    shapes = set()
    fast = FastDenoiser(random_denoiser(TINY))

    def spy(latents: Tensor, maps: Tensor, *others: Any) -> Tensor:
        shapes.add((latents.shape, maps.shape))
        return fast(latents, maps, *others)

    run(FastSamplingDenoiser(fast, spy, same_shapes=True), 1, batches_per_call=3)
    assert len(shapes) == 1


def test_what_calls_share_is_computed_once_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastDenoiser(random_denoiser(TINY))
    events: list[str] = []
    features = fast.reference_features

    def noted(*arguments: Any) -> Any:
        events.append("shared")
        return features(*arguments)

    def call(*arguments: Any) -> Tensor:
        events.append("call")
        return fast(*arguments)

    monkeypatch.setattr(fast, "reference_features", noted)
    run(FastSamplingDenoiser(fast, call), 2, callback=lambda _: events.append("done"))
    calls = ["call"] * 3  # 6 batches, 2 per call
    between = ["shared", "done", *calls]
    assert events == ["shared", *calls, *between * 4, "done"]


def test_partial_reference_masks_take_the_plain_path() -> None:
    denoiser = random_denoiser(TINY)
    references, views = frames(TINY, 1, 1.0, 1), frames(TINY, 3, 0.0, 2)
    references.ref_mask[..., :4] = 0
    fast = FastSamplingDenoiser(FastDenoiser(denoiser))
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = np.zeros((1, 1), np.int64), np.arange(3)[None]
    step = fast.prepare(references, views, 1.0, 1)
    joined = FrameConditioning.cat([references, views])
    stacked = FrameConditioning.stack([joined])
    inputs_ = torch.cat([references.z_input, latents])[None]
    expected = denoiser(inputs_, torch.full((1, 4), TIMESTEP), stacked)[0, 1:]
    torch.testing.assert_close(step(StepPlan(TIMESTEP, *batches), latents), expected)


@pytest.mark.slow
def test_compiled_form_has_no_graph_breaks() -> None:
    denoiser = random_denoiser(CONFIGS["released shape"])
    latents, c = inputs(CONFIGS["released shape"], 2, torch.float32)
    fast = FastDenoiser(denoiser)
    expected = fast_noise(fast, latents, c, 2, guided=True)
    compiled = torch.compile(fast.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        actual = fast_noise(fast, latents, c, 2, True, compiled)
    assert deviation(actual, expected) < 1e-5


def test_failing_compiler_falls_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)

    denoiser = random_denoiser(TINY)
    latents, c = inputs(TINY, 1, torch.float32)
    fast = FastDenoiser(denoiser)
    expected = fast_noise(fast, latents, c, 1, guided=False)
    with torch.no_grad():
        call = compiled_denoiser(fast)
        assert torch.equal(fast_noise(fast, latents, c, 1, False, call), expected)
    assert not call.is_compiled
    assert caplog.text.count("without compiled kernels") == 1


@pytest.mark.slow
def test_compiled_form_is_kept(tmp_path: Path) -> None:
    """A second user loads it, with other weights; a damaged file is made anew."""
    latents, c = inputs(TINY, 2, torch.float32)
    for seed, loaded in ((0, False), (1, True)):
        fast = FastDenoiser(random_denoiser(TINY, seed))
        call = compiled_denoiser(fast, tmp_path)
        with torch.no_grad():
            expected = fast_noise(fast, latents, c, 2, True)
            actual = fast_noise(fast, latents, c, 2, True, call)
        assert call.is_compiled and call.was_loaded == loaded
        assert deviation(actual, expected) < 1e-5
    (file,) = tmp_path.glob("*.bin")
    size = file.stat().st_size
    file.write_bytes(b"rubbish")
    call = compiled_denoiser(fast, tmp_path)
    with torch.no_grad():
        actual = fast_noise(fast, latents, c, 2, True, call)
    assert call.is_compiled and not call.was_loaded
    assert file.stat().st_size > size / 2
    assert deviation(actual, expected) < 1e-5


@pytest.mark.parametrize(("gigabytes", "batches"), [(8, 1), (16, 2), (24, 4), (141, 4)])
def test_batches_per_call_follow_the_memory(
    gigabytes: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    cuda = torch.device("cuda")
    assert choose_batches_per_call(SamplingSettings(), cuda) == batches
    assert choose_batches_per_call(SamplingSettings(low_memory=True), cuda) == 1
    assert choose_batches_per_call(SamplingSettings(batches_per_call=3), cuda) == 3


def test_route_depends_on_the_whole_job() -> None:
    cpu = torch.device("cpu")
    assert choose_route(tiny_settings(), cpu, 15, 100) == DenoiserRoute(True, False, False, 1)
    route = choose_route(tiny_settings(batches_per_call=4), cpu, 15, 100)
    assert route.batches_per_call == 3
    plain = choose_route(tiny_settings(batches_per_call=4, fast_path="off"), cpu, 15, 100)
    assert plain == DenoiserRoute(False, False, False, 4)
    assert choose_route(tiny_settings(compile="on"), cpu, 15, 1).compiled
    denoiser = random_denoiser(TINY)
    assert route_denoiser(denoiser, plain) is denoiser


def test_without_working_kernels_norms_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_headers(_: Tensor) -> Tensor:
        raise RuntimeError("fatal error: Python.h: No such file or directory\nmore")

    route = DenoiserRoute(True, False, True, 1, fused=True)
    step = route_denoiser(random_denoiser(TINY), route)
    assert isinstance(step, FastSamplingDenoiser) and step.denoiser.fused
    monkeypatch.setattr(fused_pointwise, "geglu", no_headers)
    step = route_denoiser(random_denoiser(TINY), route)
    assert isinstance(step, FastSamplingDenoiser) and not step.denoiser.fused
    assert "slower: fatal error: Python.h: No such file or directory. It needs" in caplog.text


def test_8_bits_need_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = random_denoiser(TINY)
    monkeypatch.setattr(type(denoiser), "device", torch.device("cuda"))
    with pytest.raises(UserError, match="'fp8' needs Triton"):
        route_denoiser(denoiser, DenoiserRoute(True, False, True, 1, float8=True))


def test_batches_fill_calls() -> None:
    assert even_batches(120, 4) == 4
    assert even_batches(15, 4) == 3
    assert even_batches(17, 4) == 3
    assert even_batches(210, 4) == 3
    assert even_batches(2, 4) == 2
    assert even_batches(7, 1) == 1


@contextmanager
def counted_operations() -> Iterator[Any]:
    """Torch's counter; it does not know the CPU's fused attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("merge", [False, True])
def test_operations_are_counted(name: str, merge: bool) -> None:
    """Against torch's own counter."""
    config = CONFIGS[name]
    denoiser = random_denoiser(config)
    latents, c = inputs(config, 2, torch.float32)
    with counted_operations() as counter:
        plain_noise(denoiser, latents, c, 2, guided=True)
    cost = plain_cost(config, BATCHES * 2)
    # Layers of the time embedding are left out of the table.
    assert 0 < counter.get_total_flops() - cost.total < 0.05 * cost.total
    fast = FastDenoiser(denoiser, merge_upsampling=merge)
    biases = fast.time_biases(TIMESTEP)
    features = fast.reference_features(
        c.z_input[:, :2].flatten(0, 1), c.pos_enc[:, :2].flatten(0, 1), biases, True
    )
    call = features and features.gather(torch.arange(2 * BATCHES), BATCHES)
    with counted_operations() as counter:
        fast(latents[:, 2:], c.pos_enc[:, 2:], biases, call, 2, True)
    cost = sampling_cost(config, 2, BATCHES, guided=True, merge_upsampling=merge)
    assert counter.get_total_flops() == cost.total
