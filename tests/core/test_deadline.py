"""Jobs that end before their time limit: when, what they say, going on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cap4d_core import deadline
from cap4d_core.avatar.fitting import fit_avatar
from cap4d_core.deadline import LIMITED_VARIABLE, MARGIN_VARIABLE, margin_s, stop_before_limit
from cap4d_core.diffusion.sampling import read_shard, sample_views
from cap4d_core.errors import DeadlineError, UserError
from cap4d_core.flame.model import HeadModel
from cap4d_core.progress import Progress
from tests.core.sampling_fixtures import tiny_settings, world
from tests.core.synthetic_head import head_folder
from tests.core.test_fitting import SETS, TINY, parameters
from tests.core.test_shards import Run


def test_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARGIN_VARIABLE, raising=False)
    assert margin_s(1) == 12 and margin_s(10) == 120 and margin_s(360) == 120
    monkeypatch.setenv(MARGIN_VARIABLE, "45")
    assert margin_s(360) == 45
    monkeypatch.setenv(MARGIN_VARIABLE, "soon")
    with pytest.raises(UserError, match="is 'soon'; expected a number of seconds"):
        margin_s(360)


def test_only_where_somebody_enforces_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def callback(progress: Progress) -> None:
        pass

    for name in ("SLURM_JOB_ID", LIMITED_VARIABLE):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.delenv(LIMITED_VARIABLE, raising=False)
        assert stop_before_limit(callback, 5) is callback
        monkeypatch.setenv(name, "1")
        assert stop_before_limit(callback, None) is callback
        assert stop_before_limit(callback, 5) is not callback


def test_stops_when_the_time_is_over_and_work_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(deadline, "_PROCESS_START", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv(MARGIN_VARIABLE, raising=False)
    seen: list[int] = []
    callback = stop_before_limit(lambda progress: seen.append(progress.done), 10)
    callback(Progress(1, 9))
    now[0] = 10 * 60 - 120 - 1
    callback(Progress(2, 9))
    now[0] += 1
    callback(Progress(9, 9))  # done is done
    with pytest.raises(DeadlineError, match=r"limit of 10 min is near: stopped after 3 of 9"):
        callback(Progress(3, 9))
    assert seen == [1, 2, 9, 3]


def stop_at(done: int) -> deadline.ProgressCallback:
    def callback(progress: Progress) -> None:
        if progress.done == done:
            raise DeadlineError("the time is over")

    return callback


def test_shard_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """No step is lost, although checkpoints are due less often."""
    run = Run(tmp_path, tiny_settings(num_shards=1, checkpoint_every_steps=100))
    output, seen = run.files(0)[0], []
    inputs = (run.plan, run.latents, world().mmdm, world().head_model, [], output, 0, 0)
    with pytest.raises(DeadlineError):
        sample_views(*inputs, run.settings, callback=stop_at(4))
    assert not output.exists()
    sample_views(*inputs, run.settings, callback=lambda progress: seen.append(progress.done))
    assert seen[0] == 5
    expected = run.sample(0, 0, "straight")
    assert torch.equal(read_shard(output)[0], read_shard(expected)[0])
    # At the last step there is nothing to go on with.
    output.unlink()
    sample_views(*inputs, run.settings, callback=stop_at(seen[-1]))
    assert output.exists()


def test_fit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    head = HeadModel.load(head_folder(), lower_jaw=True)
    straight = fit_avatar(SETS, head, TINY, tmp_path / "straight")
    with pytest.raises(DeadlineError):
        fit_avatar(SETS, head, TINY, tmp_path / "stopped", stop_at(7))
    seen: list[int] = []
    resumed = fit_avatar(SETS, head, TINY, tmp_path / "stopped", lambda p: seen.append(p.done))
    assert seen == [8, 9, 10]
    expected, have = parameters(straight), parameters(resumed)
    assert all(torch.equal(expected[name], have[name]) for name in expected)
