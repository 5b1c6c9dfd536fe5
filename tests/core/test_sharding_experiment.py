"""The sharding experiment: what it samples in one process is what the jobs of a workflow sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sharding.report import BEGIN, END, merged, write_report
from benchmarks.sharding.sampling import ShardedGrouping, sample
from benchmarks.sharding.settings import Setting, planned
from benchmarks.sharding.world import common_view_count, conditioning_of
from cap4d_core.diffusion.checkpoint import load_mmdm
from cap4d_core.diffusion.dealing import deal_views
from cap4d_core.diffusion.sampling import read_shard
from cap4d_core.diffusion.view_plan_file import read_plan
from cap4d_core.files.basic import read_safetensors
from cap4d_core.files.images import read_rgb
from tests.core.sampling_fixtures import head, template, tiny_settings, world
from tests.core.test_shards import Run

ROOT = Path(__file__).parents[2]


def test_one_process_samples_what_the_jobs_sample(tmp_path: Path) -> None:
    settings = tiny_settings()  # 2 shards, 3 rounds
    run = Run(tmp_path, settings)
    expected: dict[int, torch.Tensor] = {}
    for index in range(3):
        for shard in range(2):
            latents, ids, _ = read_shard(run.sample(index, shard))
            expected |= dict(zip(ids, latents, strict=True))

    model = load_mmdm(world().mmdm)
    plan = read_plan(run.plan)
    stored, _ = read_safetensors(run.latents)
    person: Any = SimpleNamespace(
        plan=plan, reference_latents=stored["latents"][plan.reference_order]
    )
    scene: Any = SimpleNamespace(model=head(), template=template())
    references, generated = conditioning_of([person], model, scene)
    result = sample(
        model, [plan.subject], references, generated,
        num_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        max_references=settings.max_references, seed=settings.seed, num_shards=2,
        sync_steps=settings.sync_steps, batches_per_call=3,
    )  # fmt: skip
    assert len(expected) == len(result)
    jobs = torch.stack([expected[i] for i in range(len(result))])
    # Batches of other sizes round differently (3e-7); dealing at another step makes 8e-6 with this
    # network.
    torch.testing.assert_close(result, jobs, rtol=0, atol=2e-6 * float(jobs.abs().max()))


def test_people_and_shards_stay_apart() -> None:
    names = ("ana", "ben")
    grouping = ShardedGrouping(names, 24, 3, 2, 4, 7, 3, [0.5], 10)
    for step in (0, 4, 5, 9):
        references, views = grouping.step(step)
        assert references.shape == (12, 2) and views.shape == (12, 4)
        assert sorted(views.flatten()) == list(range(48))
        assert np.array_equal(references // 3, np.repeat(views[:, :1] // 24, 2, 1))
        for person, name in enumerate(names):
            dealt = deal_views(24, 3, 7, name, step // 5)
            shard_of = {int(v): s for s, ids in enumerate(dealt) for v in ids}
            for batch in views[person * 6 : person * 6 + 6] - 24 * person:
                assert len({shard_of[int(v)] for v in batch}) == 1


def test_independent_batches_never_mix() -> None:
    grouping = ShardedGrouping(["ana"], 12, 1, 1, 3, 7, 4, [], 10)
    sets = [{frozenset(b.tolist()) for b in grouping.step(i)[1]} for i in range(10)]
    assert all(s == sets[0] for s in sets)
    regrouped = ShardedGrouping(["ana"], 12, 1, 1, 3, 7, 4, list(range(1, 10)), 10)
    assert {frozenset(b.tolist()) for b in regrouped.step(3)[1]} != sets[0]


def test_every_setting_has_a_name_of_its_own() -> None:
    plan = planned(["coupling", "shards", "steps", "guidance"], [1, 4], 50, 2.0)
    settings = {s for part in plan.values() for s in part}
    assert len({s.key for s in settings}) == len(settings)
    assert {(s.shards, s.sync) for s in plan["shards"]} == {
        (1, "none"), *((n, sync) for n in (2, 4, 8) for sync in ("none", "default", "every"))
    }  # fmt: skip
    every = Setting(1, 4, "every", 10, "ddim", 2.0)
    assert every.sync_steps(10) == list(range(1, 10))
    assert common_view_count(200, 8, [1, 4], 8) == 224


def result_part(seeds: list[int], **figures: float) -> dict[str, Any]:
    people = [{"seed": seed, "psnr": 20.0 + seed, **figures} for seed in seeds]
    return {
        "format": 1, "weights": "w", "views": 8, "num_views": 8, "steps": 50, "guidance": 1.0,
        "seeds": seeds, "references": [1], "machine": "card", "worlds": {"refs1": people},
        "settings": {"a": {"key": "a", "seconds": 1.0, "subjects": people}},
    }  # fmt: skip


def test_parts_that_were_shared_out_become_one() -> None:
    """People and figures are joined; what two parts have is the first one's."""
    parts = [result_part([2, 1]), result_part([3]), result_part([2], psnr=0.0, avatar_psnr=25.0)]
    whole = merged(parts)
    assert whole["seeds"] == [1, 2, 3]
    assert whole["settings"]["a"]["subjects"] == [
        {"seed": 1, "psnr": 21.0},
        {"seed": 2, "psnr": 22.0, "avatar_psnr": 25.0},
        {"seed": 3, "psnr": 23.0},
    ]
    assert [person["seed"] for person in whole["worlds"]["refs1"]] == [1, 2, 3]
    assert parts[0] == result_part([2, 1])  # nothing was changed in place
    with pytest.raises(SystemExit, match="weights differ"):
        merged([parts[0], {**parts[1], "weights": "others"}])


# Runs the command as on a machine with a GPU, which lacks some packages: importing them fails.
BLOCKED = """
import runpy, sys
for name in ("numba", "matplotlib", "imageio", "imageio_ffmpeg", "torchmetrics", "av", "plyfile"):
    sys.modules[name] = None
sys.argv = ["sharding_experiment", *sys.argv[1:]]
runpy.run_module("benchmarks.sharding_experiment", run_name="__main__")
"""


@pytest.mark.slow
def test_the_command_measures_resumes_and_reports(tmp_path: Path) -> None:
    results = tmp_path / "results.json"

    command = [
        sys.executable, "-c", BLOCKED, str(world().mmdm), "--json", str(results), "--seeds", "9000",
        "--views", "6", "--steps", "10", "--references", "1", "--parts", "coupling", "--pictures",
        str(tmp_path / "rows"),
    ]  # fmt: skip

    def measure(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "Out of time" in measure("--seconds", "0")
    assert not results.exists()
    assert "Everything is measured." in measure()
    content = json.loads(results.read_text("utf-8"))
    assert len(content["settings"]) == 2
    (truth,) = content["worlds"]["refs1"]
    for setting in content["settings"].values():
        (figures,) = setting["subjects"]
        # Random weights: far worse than the truth by every measure.
        assert figures["psnr"] < 20 < truth["truth"]["psnr"]
        assert figures["consistency_psnr"] < truth["truth"]["consistency_psnr"]
    before = results.read_text("utf-8")
    assert "0 settings" in measure()
    assert results.read_text("utf-8") == before
    with pytest.raises(subprocess.CalledProcessError) as caught:
        measure("--steps", "20")
    assert "other steps" in caught.value.stderr

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "sharding.md").write_text(f"Mine.\n{BEGIN}\nold\n{END}\nMine too.\n", "utf-8")
    write_report([results], docs, tmp_path / "rows")
    page = (docs / "sharding.md").read_text("utf-8")
    assert page.startswith("Mine.\n") and page.endswith("\nMine too.\n") and "old" not in page
    one_shard = content["settings"]["refs1_shards1_none_ddim10_guidance2"]["subjects"][0]
    assert f"| 1 | – | {one_shard['psnr_far']:.2f} | {one_shard['gain_far']:.2f} |" in page
    for name in ("shards", "steps", "views"):
        assert read_rgb(docs / "images" / f"sharding_{name}.png").std() > 5
