"""Profiles: what they find out at start, and what can be set from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yte

from cap4d_core.gpu import POOL_VARIABLE
from tests.workflow.snakemake_runs import ROOT

PROFILES = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/config.yaml"))
GPU_RULES = {
    rule.partition(":")[0]
    for path in (ROOT / "rules").glob("*.smk")
    for rule in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]
    if re.search(r"^ +gpu=", rule, re.MULTILINE)
}


def text_of(profile: str) -> str:
    return (ROOT / "profiles" / profile / "config.yaml").read_text()


def read(profile: str) -> dict[str, Any]:
    """As Snakemake reads it."""
    return yte.process_yaml(text_of(profile), require_use_yte=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_entry_is_explained(profile: str) -> None:
    lines = text_of(profile).splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[a-z-]+:", line) and not line.startswith(("executor:", "max-status")):
            assert lines[number - 1].startswith(("#", "slurm-status")), f"{profile}: {line}"


@pytest.mark.parametrize("profile", PROFILES)
def test_rules_of_a_profile_exist(profile: str) -> None:
    known = set()
    for path in (ROOT / "rules").glob("*.smk"):
        known |= set(re.findall(r"^rule (\w+):", path.read_text(), re.MULTILINE))
    named = {*read(profile).get("set-resources", {}), *read(profile).get("set-threads", {})}
    assert named <= known
    assert len(GPU_RULES) >= 7
    if profile == "slurm":  # else they would go to the partition without GPUs
        assert named >= GPU_RULES


@pytest.mark.parametrize(("pool", "gpus"), [("", 1), ("a", 1), ("a,b,c,d,e,f,g,h", 8)])
def test_workstation_counts_its_gpus(
    pool: str, gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(POOL_VARIABLE, pool)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    profile = read("workstation")
    assert profile["cores"] == 32 and profile["resources"] == {"gpu": gpus}
    threads = set(profile["set-threads"].values())
    assert threads == {3 if gpus == 8 else 4}
    assert gpus * threads.pop() < 32  # something is left for CPU jobs


def test_cluster_is_described_by_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GPU_PARTITION", "CPU_PARTITION", "ACCOUNT", "GPU_MODEL")
    for name in names:
        monkeypatch.delenv(f"CAP4D_SLURM_{name}", raising=False)
    plain = read("slurm")
    assert plain["default-resources"]["slurm_partition"] == "gpu"
    assert "slurm_account" not in plain["default-resources"]
    assert "gpu_model" not in plain["set-resources"]["fit_avatar"]
    for name, value in zip(names, ("big", "small", "me", "a100"), strict=True):
        monkeypatch.setenv(f"CAP4D_SLURM_{name}", value)
    profile = read("slurm")
    assert profile["default-resources"]["slurm_partition"] == "small"
    assert profile["default-resources"]["slurm_account"] == "me"
    for rule, resources in profile["set-resources"].items():
        is_gpu = rule in GPU_RULES
        assert resources.get("slurm_partition") == ("big" if is_gpu else None), rule
        assert resources.get("gpu_model") == ("a100" if is_gpu else None), rule
        # Else what was learned from finished jobs would not count.
        assert not {"mem_mb", "runtime"} & set(resources), rule
