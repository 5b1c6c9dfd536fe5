"""Conditioning maps and sampling jobs on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.diffusion.conditioning import ConditioningRenderer, RenderedViews, RendererTables
from cap4d_core.diffusion.decoding import decode_views
from cap4d_core.diffusion.frames import reference_views
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.references import encode_references
from cap4d_core.diffusion.sampling import read_shard, sample_views
from cap4d_core.diffusion.view_plan import plan_views
from cap4d_core.files.images import read_rgb
from cap4d_core.files.tracking import read_tracked_subject
from cap4d_core.flame.model import HeadModel
from tests.core.sampling_fixtures import head, template, tiny_settings, world

pytestmark = pytest.mark.gpu


def test_conditioning_maps_agree() -> None:
    views = reference_views(
        read_tracked_subject(world().tracking), head(), template().head_vertex_ids
    )
    tables = RendererTables.from_template(
        template().vertices, template().faces, template().head_vertex_ids
    )
    maps = []
    for device in ("cpu", "cuda"):
        model = HeadModel.load(world().head_model).to(device)
        renderer = ConditioningRenderer(model, tables, MMDMConfig(), views[0].extr)
        maps.append(RenderedViews(renderer, views).index(slice(None)).pos_enc.cpu())
    error = (maps[0] - maps[1]).abs()
    # Vertices differ by float32 rounding: at most 5 fine pixels of each silhouette change sides.
    beyond = (error.amax(-1) > 1e-3).sum((1, 2))
    assert int(beyond.max()) <= 5 and float(error[..., 45:].max()) < 1e-5


def test_views_rendered_in_blocks() -> None:
    """As each on its own, and the same bits whatever is asked for."""
    views = reference_views(
        read_tracked_subject(world().tracking), head(), template().head_vertex_ids
    )
    views = [views[i % len(views)] for i in range(11)]
    tables = RendererTables.from_template(
        template().vertices, template().faces, template().head_vertex_ids
    )
    model = HeadModel.load(world().head_model).to("cuda")
    renderer = ConditioningRenderer(model, tables, MMDMConfig(), views[0].extr)
    whole = RenderedViews(renderer, views).index(slice(None)).pos_enc
    for ids in ([10], [9, 2], [3, 3, 8]):
        for capacity in (0, 2**30):
            part = RenderedViews(renderer, views, cache_bytes=capacity).index(ids).pos_enc
            assert torch.equal(part, whole[ids])
    single = torch.cat([renderer.maps([view], is_reference=False) for view in views])
    beyond = ((whole - single).abs().amax(-1) > 1e-3).sum((1, 2))
    assert int(beyond.max()) <= 5  # fine pixels of a silhouette, as against the CPU


def test_sampling_job_agrees(tmp_path: Path) -> None:
    # Published steps, so that the small differences of two float32 implementations stay small.
    settings = tiny_settings(
        num_shards=1, precision="fp32", num_inference_steps=5, parity=True, num_views=4
    )
    w = world()
    plan = tmp_path / "plan.npz"
    plan_views(w.tracking, w.head_model, plan, settings, "ana")
    latents, images = [], []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        encode_references(w.tracking, w.head_model, w.mmdm, folder / "ref", settings, device)
        shard = folder / "shard.safetensors"
        sample_views(
            plan, folder / "ref" / "latents.safetensors", w.mmdm, w.head_model, [], shard, 0, 0,
            settings, device=device,
        )  # fmt: skip
        latents.append(read_shard(shard)[0])
        decode_views(
            plan, shard, w.mmdm, folder / "gen", folder / "gen" / "i.json", settings, device
        )
        images.append(read_rgb(folder / "gen" / "images" / "00000.png").astype(np.int64))
    # A random network amplifies rounding from step to step; relative to the latents' peak.
    peak = float(latents[0].abs().max())
    torch.testing.assert_close(latents[1], latents[0], rtol=0, atol=2e-2 * peak)
    assert abs(images[0] - images[1]).mean() < 3


def test_same_bits_again(tmp_path: Path) -> None:
    settings = tiny_settings(num_shards=1, num_views=4)
    w = world()
    plan = tmp_path / "plan.npz"
    plan_views(w.tracking, w.head_model, plan, settings, "ana")
    encode_references(w.tracking, w.head_model, w.mmdm, tmp_path / "ref", settings, "cuda")
    results = []
    for name in ("a", "b"):
        shard = tmp_path / f"{name}.safetensors"
        sample_views(
            plan, tmp_path / "ref" / "latents.safetensors", w.mmdm, w.head_model, [], shard, 0, 0,
            settings, device="cuda",
        )  # fmt: skip
        results.append(read_shard(shard)[0])
    assert torch.equal(results[0], results[1])
