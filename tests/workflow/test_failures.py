"""One bad subject among ten: nine are finished, and the end of the run says which one and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from tests.core.synthetic_head import head_folder
from tests.workflow.command_runs import run_cap4d
from tests.workflow.snakemake_runs import run_snakemake

pytestmark = pytest.mark.workflow

# Imported avatars: everything of a workflow but the hours.
NAMES = [f"s{number}" for number in range(10)]
BAD = "s4"
SawFault = Callable[..., None]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    head = HeadModel.load(head_folder(), lower_jaw=True)
    settings = FittingSettings(
        uv_resolution=32, deform_net_channels=4, deform_net_layers=3, num_gaussians_init=500
    )
    GaussianAvatar.create(head, torch.zeros(150), settings).save(tmp_path / NAMES[0])
    for name in NAMES[1:]:
        shutil.copytree(tmp_path / NAMES[0], tmp_path / name)
    damaged = tmp_path / BAD / "avatar.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    rows = "".join(f"{name}\t{name}\n" for name in NAMES)
    (tmp_path / "subjects.tsv").write_text(f"subject\tavatar\n{rows}")
    path = tmp_path / "config.yaml"
    content = {"subjects": "subjects.tsv", "head_model": {"path": str(head_folder())}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_nine_of_ten_are_finished_and_the_tenth_is_named(
    tmp_path: Path, config: Path, saw_fault: SawFault
) -> None:
    # --quiet hides Snakemake's own messages about failed jobs, not ours.
    result = run_snakemake(tmp_path, "--cores", "2", "--quiet", "all", "--configfile", str(config))
    assert result.returncode == 1
    avatars = sorted(
        path.parts[-3] for path in tmp_path.glob("results/*/avatar/avatar.safetensors")
    )
    assert avatars == [name for name in NAMES if name != BAD]
    lines = result.stdout.splitlines()
    row = next(line for line in lines if line.startswith(BAD))
    assert row.split()[:2] == [BAD, "import_avatar"] and "avatar.safetensors: found" in row
    assert any(line.strip() == f"log: results/logs/import_avatar/{BAD}.log" for line in lines)
    assert "9 of 10 subjects are finished." in lines and "1 failed:" in lines
    assert "Traceback" not in result.stdout

    summary = run_cap4d(tmp_path, "summary", "--configfile", str(config))
    assert f"{BAD}  import_avatar" in summary and f"{NAMES[0]}: avatar in" in summary
    page = (tmp_path / "results" / "index.html").read_text()
    assert "What failed" in page and f"{BAD}/avatar" in page and "found unreadable" in page

    # Put right, only the tenth is made, and nobody speaks of it any more.
    shutil.copy(tmp_path / NAMES[0] / "avatar.safetensors", tmp_path / BAD / "avatar.safetensors")
    result = run_snakemake(tmp_path, "--cores", "2", "--configfile", str(config))
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("Finished jobid") == 3  # import, report, all
    assert "Failed" not in run_cap4d(tmp_path, "summary", "--configfile", str(config))
    assert "What failed" not in (tmp_path / "results" / "index.html").read_text()
    saw_fault(
        "one bad subject of ten",
        "that subject; nine are finished",
        "the jobs of that subject; the table at the end of the run says which one and why",
        "correct what the table names, the same command again",
    )
