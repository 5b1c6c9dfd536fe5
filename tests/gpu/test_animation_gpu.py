"""Animation and evaluation on CUDA agree with the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.animation.driver import animate
from cap4d_core.animation.ply import read_animation_ply
from cap4d_core.evaluation.evaluate import render_view
from cap4d_core.files.images import read_rgb
from cap4d_core.settings import AnimationSettings
from tests.core.test_evaluation import _view
from tests.core.toy_avatar import ToyAvatar, toy_driving

pytestmark = pytest.mark.gpu


def test_frames_and_export_agree_with_the_cpu(tmp_path: Path) -> None:
    settings = AnimationSettings(png_frames=True, depth=True, transparent=True, frame_batch=2)
    for device in ("cpu", "cuda"):
        avatar = ToyAvatar().to(device)
        head = torch.nn.Module()
        animate(avatar, head, (toy_driving(), None), settings, tmp_path / device)  # type: ignore[arg-type]
    for i in range(5):
        cpu, cuda = (read_rgb(tmp_path / d / "frames" / f"{i:05d}.png") for d in ("cpu", "cuda"))
        # Two renderers with the same rules: rounding, and splats at the 1/255 cut-off.
        assert np.abs(cpu.astype(int) - cuda).max() <= 3
    cpu_ply, cuda_ply = (
        read_animation_ply(tmp_path / d / "exported_animation.ply") for d in ("cpu", "cuda")
    )
    np.testing.assert_allclose(cuda_ply.vertices, cpu_ply.vertices, atol=1e-7)


def test_views_agree_with_the_cpu() -> None:
    cpu = render_view(ToyAvatar(), _view(20, 0.5), 48)  # type: ignore[arg-type]
    cuda = render_view(ToyAvatar().cuda(), _view(20, 0.5), 48)  # type: ignore[arg-type]
    assert (cpu - cuda.cpu()).abs().max() < 0.01
