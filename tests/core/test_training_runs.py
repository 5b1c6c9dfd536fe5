"""Training runs from data to a model folder: killed and resumed, in one process and in two."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.checkpoint import load_mmdm
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training.batches import TrainingBatch
from cap4d_core.diffusion.training.denoiser_pass import DenoiserPass, denoiser_loss
from cap4d_core.diffusion.training.launch import launch
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.diffusion.training.records import read_records
from cap4d_core.diffusion.training.train import train_mmdm
from cap4d_core.diffusion.training.trainer import Machine, Trainer
from cap4d_core.errors import UserError
from cap4d_core.files.basic import read_safetensors, write_safetensors
from cap4d_core.files.images import read_rgb
from cap4d_core.training_settings import OptimizerSettings
from tests.core.mmdm_models import TINY, random_frames
from tests.core.training_runs import CHECKPOINT_EVERY, SETTINGS, STEPS, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in another order are other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("training") / "whole"
    train(folder)
    return folder


def trained(folder: Path) -> dict[str, Tensor]:
    """Weights of both networks, unrounded."""
    kept = folder / "checkpoints"
    return {
        f"{name}.{key}": tensor
        for name in ("autoencoder", "denoiser")
        for key, tensor in read_safetensors(kept / f"{name}.safetensors")[0].items()
    }


def steps_of(records: list[dict[str, Any]], phase: str) -> list[int]:
    return [entry["step"] for entry in records if entry["phase"] == phase]


def losses_of(folder: Path) -> list[tuple[str, int, float]]:
    records = read_records(folder / "metrics.jsonl")
    return [(entry["phase"], entry["step"], entry["loss"]) for entry in records if "loss" in entry]


def test_a_run_leaves_a_model_that_loads(whole: Path) -> None:
    model = load_mmdm(whole / "model")
    assert model.config.views_per_call == 4 and model.config.image_size == 32
    assert model.tables is not None
    records = read_records(whole / "metrics.jsonl")
    assert steps_of(records, "denoiser") == list(range(1, STEPS + 1))
    assert read_rgb(whole / "samples.png").std() > 0
    # States are for runs that are not finished.
    assert not list((whole / "checkpoints").glob("*.pt"))


def test_weights_moved_and_the_average_followed(whole: Path) -> None:
    records = read_records(whole / "metrics.jsonl")
    losses = [entry["loss"] for entry in records if entry["phase"] == "denoiser"]
    # Noise is at first predicted as 0: a loss near 1.
    assert losses[0] == pytest.approx(1.0, abs=0.15)
    assert losses[-1] < losses[0]
    weights = trained(whole)
    assert float(weights["denoiser.conv_out.weight"].abs().max()) > 0  # it began at zero


def test_perceptual_term_is_part_of_the_loss(whole: Path) -> None:
    settings = SETTINGS.autoencoder
    records = read_records(whole / "metrics.jsonl")
    entries = [entry for entry in records if entry["phase"] == "autoencoder"]
    assert len(entries) == settings.steps
    for entry in entries:
        assert entry["perceptual"] > 0
        parts = (
            settings.mse_weight * entry["mse"]
            + settings.l1_weight * entry["l1"]
            + settings.kl_weight * entry["kl"]
            + settings.perceptual_weight * entry["perceptual"]
        )
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_perceptual_term_without_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoints" / "frames", tmp_path / "checkpoints" / "frames")
    with pytest.raises(UserError, match=r"fitting\.lpips_weights"):
        train_mmdm(SETTINGS, tmp_path / "no_head_model", tmp_path)


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """SIGKILL two steps after a state was saved; then the same command again."""
    # Frames are made once and read by both runs.
    shutil.copytree(whole / "checkpoints" / "frames", tmp_path / "checkpoints" / "frames")
    shutil.copytree(whole / "checkpoints" / "demo_head", tmp_path / "checkpoints" / "demo_head")
    dead_at = CHECKPOINT_EVERY + 2
    killed = subprocess.run(
        [sys.executable, "-m", "tests.core.training_runs", str(tmp_path), str(dead_at)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    records = read_records(tmp_path / "checkpoints" / "metrics.jsonl")
    assert steps_of(records, "denoiser")[-1] == dead_at
    state = torch.load(tmp_path / "checkpoints" / "denoiser.pt", weights_only=True)
    assert state["step"] == CHECKPOINT_EVERY
    assert not (tmp_path / "model").exists()

    train(tmp_path)
    expected, resumed = trained(whole), trained(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    # Steps that were made twice are recorded once, with the same losses.
    assert losses_of(whole) == losses_of(tmp_path)


def test_finished_run_is_not_repeated(whole: Path) -> None:
    """A deleted model folder is written again from what was kept, without another step."""
    before = (whole / "model" / "denoiser.safetensors").read_bytes()
    shutil.rmtree(whole / "model")
    train(whole)
    assert (whole / "model" / "denoiser.safetensors").read_bytes() == before
    assert steps_of(read_records(whole / "metrics.jsonl"), "denoiser") == list(range(1, STEPS + 1))


class NumberedBatches:
    """Batch n of process r of p is the (n p + r)-th of all: p processes see what one would."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def draw(self, number: int, batch_size: int) -> TrainingBatch:
        index = number * self.group.size + self.group.rank
        latents, times, conditioning = random_frames(TINY, batch_size, 1, seed=index)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        return TrainingBatch(latents, conditioning, times[:, :1].expand_as(times), noise)


def train_steps(
    group: Group, device: torch.device, folder: Path, batch_size: int, accumulate: int
) -> None:
    """Three steps of the tiny denoiser; the first process writes weights and metrics."""
    torch.manual_seed(0 if group.is_first else 99)  # the first one's weights are everybody's
    settings = OptimizerSettings(
        steps=3, batch_size=batch_size, accumulate=accumulate, warmup_steps=1, ema_decay=0.5,
        log_every=1, clip_gradient=0.05,
    )  # fmt: skip
    objective = DenoisingLoss(NoiseSchedule(TINY.schedule))
    trainer = Trainer(
        "denoiser",
        DenoiserPass(MMDMDenoiser(TINY)),
        denoiser_loss(NumberedBatches(group), objective, batch_size, device),
        settings,
        Machine(device, group=group),
        Pace(settings),
        folder / "state.pt",
        folder / "metrics.jsonl",
        "",
    )
    trainer.run()
    if group.is_first:
        write_safetensors(folder / "weights.safetensors", trainer.average.state())


@pytest.mark.slow
def test_processes_do_what_accumulation_does(tmp_path: Path) -> None:
    """Two processes with a batch each make the steps of one process that adds two batches."""
    cpu = torch.device("cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    train_steps(Group(), cpu, one, 2, 2)
    launch(train_steps, (two, 2, 1), 2, cpu, 2)
    expected, _ = read_safetensors(one / "weights.safetensors")
    found, _ = read_safetensors(two / "weights.safetensors")
    moved = 0.0
    torch.manual_seed(0)
    begin = MMDMDenoiser(TINY).state_dict()
    for name, tensor in expected.items():
        moved = max(moved, float((tensor - begin[name.removeprefix("denoiser.")]).abs().max()))
        # Adam divides by the root of squares: sums in another order show where gradients vanish.
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-6, msg=name)
    assert moved > 1e-4
    losses = [[e["loss"] for e in read_records(f / "metrics.jsonl")] for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """A killed parent leaves neither training processes nor makers of people behind."""
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.core.training_runs", "wait", str(tmp_path)], cwd=ROOT
    )
    end = time.monotonic() + 240
    while len(files := list(tmp_path.glob("*.txt"))) < 2:
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.1)
    children = [int(pid) for file in files for pid in file.read_text().split()]
    assert len(children) == 4 and all(map(is_running, children))
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(map(is_running, children)):
        assert time.monotonic() < end, [pid for pid in children if is_running(pid)]
        time.sleep(0.1)
