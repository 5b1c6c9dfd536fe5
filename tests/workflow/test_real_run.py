"""The example run on real photos and fits (`make real-run`), shortened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.tracking import read_fit
from tests.real_run.make_small_mmdm import write_small_checkpoint
from tests.workflow.snakemake_runs import ROOT, dry_run, run_snakemake

pytestmark = [pytest.mark.workflow, pytest.mark.slow, pytest.mark.timeout(2400)]
CONFIG = ROOT / "tests" / "real_run" / "config.yaml"


@pytest.fixture
def environment(tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    weights = write_small_checkpoint(tmp_path / "small_mmdm")
    variables = {"CAP4D_REAL_DATA": str(real_data), "CAP4D_SMALL_MMDM": str(weights)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def test_real_photos_fits_and_motion(tmp_path: Path, environment: dict[str, str]) -> None:
    assert dry_run(tmp_path, CONFIG)["sample_views"] == 2 * 2 * 2  # subjects x rounds x shards
    result = run_snakemake(
        tmp_path, "--cores", "2", "--resources", "gpu=2", "--quiet", "rules",
        "--set-threads", "prepare_mmdm=1", "encode_references=1", "sample_views=1",
        "decode_views=1", "fit_avatar=1", "animate_avatar=1", "track_subject=1", "track_driving=1",
        "--config", "fitting={iterations: 20, evaluate_every: 20}",
        "--configfile", str(CONFIG),
        environment=environment,
        timeout=2300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    results = tmp_path / "results-real"
    motion = read_fit(results / "driving" / "sequence_00" / "fit.npz")
    assert motion.num_frames == 48
    # Coefficients of another basis are dropped; the blink (last column) is not.
    assert not motion.expr[:, :-1].any() and motion.expr[:, -1].any()
    for subject, num_references in (("felix", 4), ("tesla", 1)):
        folder = results / subject
        assert len(read_image_set(folder / "views" / "reference_images")) == num_references
        generated = read_image_set(folder / "views" / "generated_images")
        assert len(generated) == 12
        assert np.isfinite([view.parameters.tra for view in generated]).all()
        metrics = json.loads((folder / "avatar" / "metrics.json").read_text())
        assert metrics["train"]["psnr"] > 5
        assert (folder / "animation" / "sequence_00" / "renders.mp4").stat().st_size > 1000
