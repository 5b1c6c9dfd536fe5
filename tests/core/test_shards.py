"""Dealing of views to shards, rounds, and jobs that are killed."""

from __future__ import annotations

import errno
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.diffusion.dealing import (
    deal_views,
    initial_noise,
    padded_view_count,
    views_per_iteration,
)
from cap4d_core.diffusion.grouping import SeededGrouping, shard_key
from cap4d_core.diffusion.references import encode_references
from cap4d_core.diffusion.round_plan import round_steps
from cap4d_core.diffusion.sampler import sample_stochastic_io
from cap4d_core.diffusion.sampling import read_shard, sample_views
from cap4d_core.diffusion.view_plan import plan_views
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.settings import SamplingSettings
from tests.core.killable import KillableJob
from tests.core.sampling_fixtures import tiny_settings, world
from tests.core.test_sampler import NOISE, REFERENCES, SCHEDULE, VIEWS, mixing_denoiser


def test_dealing_is_a_partition_that_depends_on_the_round() -> None:
    deals = [deal_views(24, 3, 7, "ana", r) for r in range(4)]
    for parts in deals:
        assert [len(p) for p in parts] == [8, 8, 8]
        assert sorted(np.concatenate(parts)) == list(range(24))
        assert all((np.diff(p) > 0).all() for p in parts)
    assert not np.array_equal(deals[0][0], deals[1][0])
    assert np.array_equal(deals[2][1], deal_views(24, 3, 7, "ana", 2)[1])
    assert not np.array_equal(deals[0][0], deal_views(24, 3, 7, "ben", 0)[0])
    assert np.array_equal(deal_views(24, 1, 7, "ana", 5)[0], np.arange(24))


def test_noise_belongs_to_the_view() -> None:
    shape = (4, 8, 8)
    all_noise = initial_noise(range(6), shape, 3, "ana")
    assert torch.equal(initial_noise([4, 1], shape, 3, "ana"), all_noise[[4, 1]])
    assert not torch.equal(initial_noise([4], shape, 4, "ana")[0], all_noise[4])
    assert not torch.equal(initial_noise([4], shape, 3, "ben")[0], all_noise[4])
    many = initial_noise(range(200), shape, 3, "ana")
    # 51200 draws: standard errors 0.0044 and 0.0031.
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.015


def test_view_counts_are_rounded_up() -> None:
    # The published rule fails for these (28 views, 5 or 6 per call).
    assert padded_view_count(28, 1, 5) == 30
    assert padded_view_count(28, 1, 6) == 30
    assert padded_view_count(840, 8, 7) == 840
    assert padded_view_count(840, 8, 4) == 864
    assert views_per_iteration(1, 4, 8) == 7
    assert views_per_iteration(9, 4, 8) == 4
    with pytest.raises(UserError, match="max_references"):
        views_per_iteration(9, 8, 8)


def test_one_shard_is_the_unsharded_algorithm_wherever_it_is_cut() -> None:
    def run(cuts: list[float]) -> torch.Tensor:
        latents = NOISE
        for index, (first, stop) in enumerate(round_steps(cuts, 10)):
            (ids,) = deal_views(12, 1, 5, "ana", index)
            key = shard_key(5, "ana", 1, index, 0)
            part = sample_stochastic_io(
                mixing_denoiser, SCHEDULE, REFERENCES, VIEWS.index(ids.tolist()), 10, 2.0, 4, 2,
                latents[ids], SeededGrouping(3, 12, 2, 2, key), first, stop,
            )  # fmt: skip
            latents = torch.empty_like(latents)
            latents[ids] = part
        return latents

    once = run([])
    for cuts in ([0.5], [1, 2, 7], list(range(10))):
        assert torch.equal(run([float(c) for c in cuts]), once)


def test_dealing_at_every_step_groups_views_as_published() -> None:
    """Any two views meet with probability (G - 1) / (N - 1), as in one random partition."""
    num_views, shards, size, trials = 12, 3, 2, 3000
    meetings = np.zeros((num_views, num_views))
    for trial in range(trials):
        for shard, ids in enumerate(deal_views(num_views, shards, 1, "ana", trial)):
            groups = SeededGrouping(3, len(ids), 2, size, shard_key(1, "ana", shards, trial, shard))
            for batch in groups.step(trial)[1]:
                a, b = ids[batch]
                meetings[a, b] += 1
                meetings[b, a] += 1
    expected = trials * (size - 1) / (num_views - 1)
    off_diagonal = meetings[~np.eye(num_views, dtype=bool)]
    # Binomial standard deviation 15.7; 66 pairs, so 4.5 sigma is far out.
    assert np.abs(off_diagonal - expected).max() < 4.5 * np.sqrt(expected * 10 / 11)


class Run:
    """Plan, reference latents and rounds of the tiny subject in one folder."""

    def __init__(self, folder: Path, settings: SamplingSettings) -> None:
        self.folder, self.settings = folder, settings
        w = world()
        self.plan = folder / "plan.npz"
        plan_views(w.tracking, w.head_model, self.plan, settings, "ana")
        encode_references(w.tracking, w.head_model, w.mmdm, folder / "references", settings)
        self.latents = folder / "references" / "latents.safetensors"

    def files(self, round_index: int, name: str = "rounds") -> list[Path]:
        return [
            self.folder / name / str(round_index) / f"{shard}.safetensors"
            for shard in range(self.settings.num_shards)
        ]

    def sample(self, round_index: int, shard: int, name: str = "rounds") -> Path:
        output = self.files(round_index, name)[shard]
        sample_views(
            self.plan, self.latents, world().mmdm, world().head_model,
            self.files(round_index - 1, name) if round_index else [],
            output, round_index, shard, self.settings,
        )  # fmt: skip
        return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds of two shards, sampled in order."""
    run = Run(tmp_path_factory.mktemp("run"), tiny_settings(sync_steps=[0.3]))
    for round_index in range(2):
        for shard in range(2):
            run.sample(round_index, shard)
    return run


def test_rounds_advance_all_views(finished: Run) -> None:
    for round_index, stop in enumerate((3, 10)):
        ids: list[int] = []
        for path in finished.files(round_index):
            latents, view_ids, next_step = read_shard(path)
            assert next_step == stop and len(latents) == len(view_ids)
            assert torch.isfinite(latents).all()
            ids += view_ids
        assert sorted(ids) == list(range(8))
    first = [read_shard(path)[1] for path in finished.files(0)]
    assert first != [read_shard(path)[1] for path in finished.files(1)]
    assert not list(finished.folder.glob("**/*checkpoint*"))
    assert all(path.with_suffix(".png").exists() for path in finished.files(1))


def test_order_of_jobs_does_not_matter(finished: Run) -> None:
    for round_index in range(2):
        for shard in (1, 0):
            again = finished.sample(round_index, shard, "reversed")
            expected = finished.files(round_index)[shard]
            assert torch.equal(read_shard(again)[0], read_shard(expected)[0])


def test_incomplete_previous_round_is_refused(finished: Run) -> None:
    w = world()

    def attempt(previous: list[Path]) -> None:
        sample_views(
            finished.plan, finished.latents, w.mmdm, w.head_model, previous,
            finished.folder / "x.safetensors", 1, 0, finished.settings,
        )  # fmt: skip

    with pytest.raises(UserError, match="holds 4 views, the plan 8"):
        attempt(finished.files(0)[:1])
    with pytest.raises(InputFileError, match="latents after 10 steps"):
        attempt(finished.files(1))
    with pytest.raises(UserError, match="Round 4, shard 1 does not exist"):
        sample_views(
            finished.plan, finished.latents, w.mmdm, w.head_model, [],
            finished.folder / "x.safetensors", 3, 0, finished.settings,
        )  # fmt: skip


def test_settings_that_do_not_fit_the_weights_are_refused(finished: Run) -> None:
    w = world()
    wrong = tiny_settings(sync_steps=[0.3], views_per_call=8, resolution=64, max_references=6)
    with pytest.raises(UserError, match=r"views_per_call = 8.*resolution = 64"):
        sample_views(
            finished.plan, finished.latents, w.mmdm, w.head_model, [],
            finished.folder / "x.safetensors", 0, 0, wrong,
        )  # fmt: skip


def test_checkpoint_of_other_inputs_is_not_used(
    finished: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from cap4d_core.diffusion.sampling_checkpoint import SamplingCheckpoint

    path = tmp_path / "c.safetensors"
    latents = torch.randn(2, 4, 8, 8)
    checkpoint = SamplingCheckpoint(path, "a", 5)
    checkpoint.save_if_due(3, latents)
    checkpoint.wait()
    assert not path.exists()
    changing = latents.clone()
    checkpoint.save_if_due(4, changing)
    changing.zero_()  # what is written is the state at the call
    checkpoint.wait()
    loaded = SamplingCheckpoint(path, "a", 5).load(0, 10, (2, 4, 8, 8))
    assert loaded is not None and loaded[0] == 5 and torch.equal(loaded[1], latents)
    assert SamplingCheckpoint(path, "b", 5).load(0, 10, (2, 4, 8, 8)) is None
    assert "other inputs or settings" in caplog.text
    path.write_bytes(b"rubbish")
    assert SamplingCheckpoint(path, "a", 5).load(0, 10, (2, 4, 8, 8)) is None


def test_failed_checkpoint_is_reported_by_the_next(tmp_path: Path) -> None:
    from cap4d_core.diffusion.sampling_checkpoint import SamplingCheckpoint

    (tmp_path / "file").touch()
    checkpoint = SamplingCheckpoint(tmp_path / "file/c.safetensors", "a", 1)
    checkpoint.save_if_due(0, torch.zeros(1))
    with pytest.raises(OSError, match="file"):
        checkpoint.save_if_due(1, torch.zeros(1))


def test_failed_checkpoint_does_not_spoil_a_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cap4d_core.diffusion import sampling_checkpoint

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "c.safetensors")

    path = tmp_path / "c.safetensors"
    checkpoint = sampling_checkpoint.SamplingCheckpoint(path, "a", 1)
    checkpoint.save(0, torch.zeros(1))
    monkeypatch.setattr(sampling_checkpoint, "write_safetensors", full)
    checkpoint.save_if_due(1, torch.zeros(1))
    checkpoint.remove()
    assert not path.exists()
    assert "No space left" in caplog.text


def killable_job(run: Run, output: Path) -> KillableJob:
    """Shard 0 of round 1."""
    w = world()
    inputs = [run.plan, run.latents, w.mmdm, w.head_model, output]
    arguments = [*inputs, run.settings.model_dump_json(), *run.files(0)]
    return KillableJob("tests.core.killable_sampling", arguments)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_job_gives_the_same_bits(
    finished: Run, tmp_path: Path, kills: int
) -> None:
    expected, expected_ids, _ = read_shard(finished.files(1)[0])
    output = tmp_path / "shard.safetensors"
    moments = random.Random(kills)
    job = killable_job(finished, output)
    try:
        killed = 0
        for _ in range(kills):
            lines = job.run(moments.randrange(0, 2), moments.random() * 0.05)
            killed += lines[-1] == f"end {-signal.SIGKILL}"
        assert killed >= 1
        assert job.run(None)[-1] == "end 0"
    finally:
        job.close()
    latents, ids, _ = read_shard(output)
    assert ids == expected_ids and torch.equal(latents, expected)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "shard.safetensors", "shard.png", *(p.name for p in tmp_path.glob("shard.tmp-*"))
    }  # fmt: skip
