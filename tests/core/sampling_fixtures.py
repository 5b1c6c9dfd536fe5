"""A subject, a head and a tiny diffusion model for tests of the sampling stage."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.checkpoint import save_mmdm
from cap4d_core.diffusion.conditioning import RendererTables
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import AutoencoderConfig, MMDMConfig
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_flame_template
from cap4d_core.settings import SamplingSettings

MAKE_HEAD = Path(__file__).parents[1] / "goldens" / "head" / "make_head.py"

# 4 views per call at 8 x 8 latents: a network call takes milliseconds.
TINY = MMDMConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(0, 1),
    head_channels=8,
    norm_groups=8,
    views_per_call=4,
    latent_size=8,
    autoencoder=AutoencoderConfig(
        base_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4
    ),
)


@dataclass(frozen=True)
class World:
    """Folders of the synthetic subject (3 references), its head model and a tiny MMDM."""

    tracking: Path
    head_model: Path
    mmdm: Path


@functools.cache
def world() -> World:
    """Built once per session."""
    root = Path(tempfile.mkdtemp(prefix="cap4d_sampling_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    source = root / "source"
    subprocess.run([sys.executable, str(MAKE_HEAD), str(source)], check=True, capture_output=True)
    prepare_head_model(source, None, root / "head_model")
    template = load_flame_template(root / "head_model")
    tables = RendererTables.from_template(
        template.vertices, template.faces, template.head_vertex_ids
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_mmdm(
            root / "mmdm",
            MMDMDenoiser(TINY),
            Autoencoder(TINY.autoencoder),
            {
                "freqs": tables.frequencies,
                "faces": tables.faces,
                "faces_uvs": torch.from_numpy(template.uv_faces),
                "face_mask": tables.face_mask,
                "props": tables.props,
            },
            {"source": {"name": "random"}},
        )
    shutil.rmtree(source / "data")
    return World(source / "examples" / "input" / "subject", root / "head_model", root / "mmdm")


@functools.cache
def head() -> HeadModel:
    """Head model of `world`."""
    return HeadModel.load(world().head_model)


@functools.cache
def template() -> HeadTemplate:
    """Its template."""
    return load_flame_template(world().head_model)


def tiny_settings(**changes: Any) -> SamplingSettings:
    """Settings that fit the tiny model: 2 references, 2 views per call, 10 steps."""
    values: dict[str, Any] = {
        "num_views": 8,
        "num_inference_steps": 10,
        "max_references": 2,
        "views_per_call": TINY.views_per_call,
        "resolution": TINY.image_size,
        "num_shards": 2,
        "sync_steps": [0.2, 0.5],
        "checkpoint_every_steps": 1,
    }
    return SamplingSettings(**(values | changes))
