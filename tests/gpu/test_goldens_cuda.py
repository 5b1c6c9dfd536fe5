"""Golden files of the networks and of sampling, computed on CUDA in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cap4d_core.diffusion.network_setup import matmul_precision
from tests.parity import adapters_avatar_training, adapters_mmdm_network, adapters_mmdm_sampling
from tests.parity.conftest import DEFAULT
from tests.parity.goldens import ADAPTERS, Golden, manifest_entries

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FILES = [
    "C_unet_small_io", "C_unet_small_modules", "D_vae_small_io", "F_sampler_unet",
    "F_sampler_unet_R1", "B5_unet_small", "C1_l1_ssim", "C2_lpips_structure",
]  # fmt: skip
# What makes tensors and networks in the adapters.
MAKERS = (
    (torch, "from_numpy"),
    (adapters_mmdm_network, "load_denoiser"),
    (adapters_mmdm_network, "load_autoencoder"),
    (adapters_mmdm_sampling, "load_denoiser"),
    (adapters_avatar_training, "tensor"),
    (adapters_avatar_training, "recipe_lpips"),
    (adapters_avatar_training, "DeformationUNet"),
    (adapters_avatar_training, "positional_encoding"),
)


@pytest.mark.parametrize("stem", FILES)
def test_golden(stem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inputs and weights go to the device; expected values and tolerances are those of the CPU."""
    (directory,) = (folder for folder in DEFAULT if (folder / f"{stem}.npz").exists())
    entry = manifest_entries(directory).get(stem, {})
    golden = Golden(directory / f"{stem}.npz", directory, tmp_path, entry)
    for module, name in MAKERS:
        monkeypatch.setattr(module, name, on_device(getattr(module, name)))
    with matmul_precision("fp32"):
        ADAPTERS[stem](golden)
    golden.finish()


def on_device(make: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors or networks of a function, on the device."""
    return lambda *arguments, **options: make(*arguments, **options).to(DEVICE)
