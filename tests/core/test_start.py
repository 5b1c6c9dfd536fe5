"""A job's start: what is imported, and what is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import cap4d_core.diffusion.sampling
assert not {names} & set(sys.modules), {names} & set(sys.modules)
from cap4d_core.diffusion.diffusers_parts import AutoencoderKL
from diffusers import AutoencoderKL as theirs, UNet2DModel
import diffusers.models.unets
assert theirs is AutoencoderKL and diffusers.models.unets.UNet2DModel is UNet2DModel
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.slow
def test_sampling_imports_only_what_it_needs() -> None:
    heavy = {"transformers", "peft", "accelerate", "matplotlib", "numba"}
    heavy |= {"diffusers.models.transformers.transformer_flux"}
    done = run(SCRIPT.replace("{names}", repr(heavy)))
    assert done.returncode == 0, done.stderr
