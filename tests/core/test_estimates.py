"""Estimates of jobs, disk and time before a run."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.batch.disk_use import avatar_bytes, job_sizes
from cap4d_core.batch.estimates import (
    GPU_RULES,
    check_space,
    describe,
    estimate,
    size_text,
    stage_table,
)
from cap4d_core.config import Config, load_config
from cap4d_core.errors import UserError
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from tests.core.synthetic_head import head_folder
from tests.core.test_learned_resources import finished_job

Load = Callable[..., Config]
GB = 1e9


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Two subjects and one motion."""
    (tmp_path / "subjects.tsv").write_text("subject\ttracking\nana\tana\nben\tben\n")
    (tmp_path / "driving.tsv").write_text("driving\tfit\tnum_frames\ntalk\tt.npz\t100\n")
    for name in ("ana", "ben"):
        (tmp_path / name / "images" / "cam0").mkdir(parents=True)
        (tmp_path / name / "images" / "cam0" / "0.png").write_bytes(bytes(2_000_000))
        (tmp_path / name / "reference_images.json").write_text('[["cam0", 0]]')
    (tmp_path / "m.ckpt").write_bytes(bytes(1000))

    def load_with(**changes: Any) -> Config:
        raw: dict[str, Any] = {
            "subjects": "subjects.tsv",
            "driving": "driving.tsv",
            "results": str(tmp_path / "out"),
            "mmdm": {"path": "m.ckpt"},
            **changes,
        }
        return load_config(raw, tmp_path / "config.yaml")

    return load_with


JOBS = {"track_subject": 2, "sample_views": 80, "decode_views": 16, "fit_avatar": 2, "all": 1}


def test_sizes_follow_the_settings(load: Load) -> None:
    config = load()
    sizes = job_sizes(config)
    images = 8 * sizes["decode_views"].kept
    assert 840 * 512**2 < images < 840 * 512**2 * 2  # between 1 and 2 bytes per pixel
    latents = 840 * 4 * 64 * 64 * 4
    assert 8 * sizes["sample_views"].temporary == latents
    kept = job_sizes(load(keep_intermediates=True))["sample_views"]
    assert kept.temporary == 0 and 8 * kept.kept > latents
    assert 2_000_000 < sizes["track_subject"].kept < 2_100_000
    assert sizes["prepare_mmdm"].kept < 20_000
    longer = load(animation={"png_frames": True})
    assert job_sizes(longer)["animate_avatar"].kept > sizes["animate_avatar"].kept + 100 * 512**2


@pytest.mark.parametrize(
    "changes",
    [
        {"uv_resolution": 32, "deform_net_layers": 3, "deform_net_channels": 8},
        {"uv_resolution": 64, "deform_net_layers": 5, "deform_net_channels": 16},
        {"uv_resolution": 64, "deform_net_layers": 2, "deform_net_channels": 32},
    ],
    ids=str,
)
def test_avatar_size_is_that_of_the_file(tmp_path: Path, changes: dict[str, int]) -> None:
    settings = FittingSettings(num_gaussians_init=40_000, **changes)
    head = HeadModel.load(head_folder(), lower_jaw=True)
    avatar = GaussianAvatar.create(head, torch.zeros(150), settings)
    avatar.save(tmp_path)
    splats = len(avatar.splats.xyz)
    # The model allows for as many splats again as there are at the start.
    expected = avatar_bytes(settings) - (2 * 40_000 - splats) * 240
    assert (tmp_path / "avatar.safetensors").stat().st_size == pytest.approx(expected, rel=0.05)


def test_no_time_is_invented(load: Load) -> None:
    config = load()
    found = estimate(config, JOBS)
    assert found.jobs == 100  # targets are no work
    assert found.seconds(gpu=True) == found.seconds(gpu=False) == 0
    assert "Time: unknown" in describe(found, config.results)
    assert "unknown" in stage_table(found)


def test_times_are_those_of_finished_jobs_with_the_same_settings(load: Load) -> None:
    config = load()
    sampling = config.settings.sampling.model_dump(mode="json")
    for number, seconds in enumerate((50, 60, 700)):
        finished_job(
            Path(config.results), "sample_views", f"ana/1/{number}-of-8", seconds, 1, sampling
        )
    finished_job(Path(config.results), "decode_views", "ana/1", 1e6, 1, {"resolution": 1})
    found = estimate(config, JOBS)
    assert found.seconds(gpu=True) == 80 * 60  # the median
    text = describe(found, config.results, num_gpus=4)
    assert "at least 1 h 20 min of GPU jobs (20 min 00 s with 4 at once)" in text
    assert "Not measured yet" in text and "decode_views" in text and "2 subjects" in text


def test_disk_is_said_per_subject_and_in_total(load: Load) -> None:
    config = load()
    found = estimate(config, {"decode_views": 16, "prepare_mmdm": 1})
    decoded = 16 * job_sizes(config)["decode_views"].kept
    text = describe(found, config.results)
    assert f"Disk per subject: about {size_text(decoded / 2)}" in text
    assert found.kept_bytes > decoded


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Pretends that so many bytes are free."""
    return lambda count: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(count, 0, count))


def test_too_small_a_disk_is_refused_before_the_start(
    load: Load, free: Callable[[float], None]
) -> None:
    config = load()
    found = estimate(config, JOBS)
    free(found.peak_bytes + 1)
    assert check_space(found, config.results) is None
    free(found.kept_bytes + 1)
    assert "may be needed meanwhile" in str(check_space(found, config.results))
    free(found.kept_bytes - 1)
    with pytest.raises(UserError, match="check_disk_space=false"):
        check_space(found, config.results)
    assert "Warning" in str(check_space(found, config.results, refuse=False))


def test_gpu_rules_are_those_that_ask_for_one() -> None:
    text = "".join(p.read_text() for p in (Path(__file__).parents[2] / "rules").glob("*.smk"))
    rules = re.split(r"^rule ", text, flags=re.M)[1:]
    assert {rule.partition(":")[0] for rule in rules if "gpu=1" in rule} >= GPU_RULES


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (4_300, "4.3 kB"), (2.5 * GB, "2.5 GB"), (7e12, "7 TB")]
)
def test_size_text(count: float, text: str) -> None:
    assert size_text(count) == text
