"""Laws of stochastic I/O sampling, on closed-form denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.grouping import RecordedGrouping, SeededGrouping
from cap4d_core.diffusion.sampler import SamplingProgress, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.errors import DivergedError
from cap4d_core.progress import Progress

SCHEDULE = NoiseSchedule()
ALPHAS = torch.from_numpy(SCHEDULE.alphas_cumprod)
NUM_VIEWS, NUM_REFERENCES, SIZE, CHANNELS = 12, 3, 4, 5


def frames(count: int, mask: float, seed: int) -> FrameConditioning:
    generator = torch.Generator().manual_seed(seed)
    return FrameConditioning(
        torch.randn(count, SIZE, SIZE, CHANNELS, generator=generator),
        torch.randn(count, 4, SIZE, SIZE, generator=generator) * mask,
        torch.full((count, 1, SIZE, SIZE), mask),
    )


REFERENCES, VIEWS = frames(NUM_REFERENCES, 1.0, 1), frames(NUM_VIEWS, 0.0, 2)
NOISE = torch.randn(NUM_VIEWS, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def mixing_denoiser(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
    """Smooth, couples the views of a call, sees references, pose and time."""
    a = ALPHAS[timesteps][..., None, None, None]
    own = c.pos_enc[..., :4].movedim(-1, -3)
    together = (latents + c.z_input).mean(1, keepdim=True)
    return (1 - a).sqrt() * latents / (0.25 * a + 1 - a) - a.sqrt() * (
        0.3 * together.tanh() + 0.2 * own
    )


def grouping(references: int = 2, key: tuple[str | int, ...] = ("k",)) -> SeededGrouping:
    return SeededGrouping(NUM_REFERENCES, NUM_VIEWS, references, 4 - references, key)


def sample(denoiser: Callable[..., Tensor] = mixing_denoiser, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "references": REFERENCES,
        "generated": VIEWS,
        "num_steps": 10,
        "guidance_scale": 2.0,
        "num_views_per_call": 4,
        "max_references": 2,
        "noise": NOISE,
        "grouping": grouping(),
    }
    return sample_stochastic_io(denoiser, SCHEDULE, **(arguments | changes))


def test_pieces_give_the_same_bits_as_the_whole() -> None:
    whole = sample()
    for cut in (1, 4, 9):
        middle = sample(end_step=cut)
        assert torch.equal(sample(noise=middle, start_step=cut), whole)
    assert torch.equal(sample(noise=whole, start_step=10), whole)


def test_batches_per_call_do_not_matter() -> None:
    whole = sample()
    for count in (2, 4, 100):
        # Only the order of float32 sums differs.
        torch.testing.assert_close(sample(batches_per_call=count), whole, rtol=1e-5, atol=1e-5)


def test_a_perfect_denoiser_recovers_the_data() -> None:
    """For data concentrated on one image the best denoiser is known in closed form."""
    clean = torch.randn(NUM_VIEWS, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    marked = FrameConditioning(
        torch.cat([clean.movedim(1, -1), clean[:, :1].movedim(1, -1)], -1),
        VIEWS.z_input,
        VIEWS.ref_mask,
    )
    predictions = []

    def perfect(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = ALPHAS[timesteps][..., None, None, None]
        return (latents - a.sqrt() * c.pos_enc[..., :4].movedim(-1, -3)) / (1 - a).sqrt()

    def keep(progress: Progress) -> None:
        assert isinstance(progress, SamplingProgress) and progress.predicted_clean is not None
        predictions.append(progress.predicted_clean)

    final = sample(perfect, generated=marked, guidance_scale=1.0, callback=keep)
    for predicted in predictions[2:]:
        # 1 / sqrt(abar) amplifies float32 rounding at the noisy end.
        torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-3)
    # The last step ends at abar_0 = 0.998, so a 20th of the initial noise is left.
    first, last = ALPHAS[int(SCHEDULE.ddim(10).timesteps[-1])], ALPHAS[0]
    initial = (NOISE - first.sqrt() * clean) / (1 - first).sqrt()
    expected = last.sqrt() * clean + (1 - last).sqrt() * initial
    torch.testing.assert_close(final, expected, rtol=0, atol=2e-5)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    results = [sample(guidance_scale=g, end_step=1) for g in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(results[2] - results[1], results[1] - results[0], atol=1e-5, rtol=0)
    assert (results[1] - results[0]).abs().max() > 1e-3


def test_what_the_network_sees() -> None:
    """Two halves, unconditional first; references first; same time everywhere."""
    seen = []

    def spy(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        seen.append((latents, timesteps, c))
        return mixing_denoiser(latents, timesteps, c)

    sample(spy, end_step=1, batches_per_call=2)
    reference_batches, view_batches = grouping().step(0)
    latents, timesteps, c = seen[0]
    assert latents.shape == (4, 4, 4, SIZE, SIZE) and timesteps.unique().numel() == 1
    for batch in range(2):
        ids, views = reference_batches[batch], view_batches[batch]
        free, bound = batch, 2 + batch
        assert torch.equal(latents[free], latents[bound])
        assert torch.equal(latents[bound, :2], REFERENCES.z_input[ids])
        assert torch.equal(latents[bound, 2:], NOISE[views])
        assert torch.equal(c.pos_enc[bound, :2], REFERENCES.pos_enc[ids])
        assert torch.equal(c.pos_enc[bound, 2:], VIEWS.pos_enc[views])
        assert not c.pos_enc[free].any() and not c.z_input[free].any()
        assert torch.equal(c.ref_mask[free], c.ref_mask[bound])
        assert c.ref_mask[free, :2].all() and not c.ref_mask[free, 2:].any()
    calls = len(seen)
    seen.clear()
    sample(spy, end_step=1, guidance_scale=1.0)
    assert len(seen) == 2 * calls and seen[0][0].shape[0] == 1


def test_inputs_are_not_changed_and_progress_is_told() -> None:
    before = NOISE.clone()
    states: list[SamplingProgress] = []

    def keep(progress: Progress) -> None:
        assert isinstance(progress, SamplingProgress)
        states.append(progress)

    final = sample(callback=keep)
    assert torch.equal(NOISE, before)
    assert [(s.step, s.done, s.total) for s in states] == [(i, i + 1, 10) for i in range(10)]
    assert states[-1].latents is not None and torch.equal(states[-1].latents, final)


def test_single_reference_is_always_the_first() -> None:
    alone = grouping(references=1)
    assert all((alone.step(i)[0] == 0).all() for i in range(5))


def test_groupings_are_fresh_partitions_that_ignore_global_state() -> None:
    first = grouping().step(3)
    np.random.seed(0)
    torch.manual_seed(0)
    again = grouping().step(3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(grouping().step(4)[1], first[1])
    assert not np.array_equal(grouping(key=("other",)).step(3)[1], first[1])
    for step in range(20):
        references, views = grouping().step(step)
        assert sorted(views.flatten()) == list(range(NUM_VIEWS))
        assert all(len(set(row)) == 2 for row in references.tolist())


def test_nan_stops_with_a_message() -> None:
    with pytest.raises(DivergedError, match="step 0 of 10"):
        sample(lambda latents, timesteps, c: latents * float("nan"))


def test_wrong_batches_are_refused() -> None:
    references, views = grouping().step(0)
    views = views.copy()
    views[0, 0] = views[0, 1]
    with pytest.raises(ValueError, match="every one"):
        sample(grouping=RecordedGrouping(references[None], views[None]), end_step=1)
    with pytest.raises(ValueError, match="batches of 2"):
        sample(noise=NOISE[:11], generated=VIEWS.index(range(11)))
