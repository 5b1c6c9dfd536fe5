"""Demo subjects as training data: exact parameters, the pipeline's crops, any machine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from cap4d_core.demo import family, world
from cap4d_core.demo.head import build_demo_head, head_vertex_ids
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import make_subject
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.geometry.crops import crop_box_from_points

SEED = 3


@pytest.fixture(scope="module")
def renderer() -> SubjectRenderer:
    return SubjectRenderer(make_subject(SEED, texture_size=256))


@pytest.fixture(scope="module")
def views(renderer: SubjectRenderer) -> family.FamilyViews:
    return family.render_views(renderer, 24, np.random.default_rng(1), size=64)


def test_views_are_complete_and_cover_the_range(views: family.FamilyViews) -> None:
    assert len(views) == 24
    assert views.rgb.shape == (24, 64, 64, 3) and views.rgb.dtype == torch.uint8
    assert views.matte.shape == (24, 64, 64) and views.matte.dtype == torch.uint8
    assert (views.rgb[views.matte == 0] == 255).all()
    share = (views.matte > 127).float().mean((1, 2))
    assert (share > 0.25).all() and (share < 0.85).all()
    # Rotation vectors are close to (pitch, yaw, roll) here.
    yaw = torch.rad2deg(views.rot[:, 1])
    assert yaw.min() < -25 and yaw.max() > 25 and yaw.abs().max() < 60
    parameters = views.parameters()[5]
    assert parameters.crop_box == tuple(views.crop_box[5].tolist())
    assert parameters.resolution == (160, 160) and parameters.expr.shape == (65,)


def test_same_state_same_views_other_state_others(renderer: SubjectRenderer) -> None:
    first, again, other = (
        family.render_views(renderer, 2, np.random.default_rng(k), size=32) for k in (2, 2, 3)
    )
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.expr, again.expr)
    assert not torch.equal(first.rgb, other.rgb)


def test_a_third_of_the_views_is_calm() -> None:
    fit = family.sample_fit(np.zeros(150), 600, np.random.default_rng(0))
    strength = np.abs(fit.expr[:, :22]).max(1)
    assert 0.25 < (strength < 0.35).mean() < 0.65
    assert (strength > 1.0).mean() > 0.2


def test_crop_boxes_are_the_pipelines(renderer: SubjectRenderer) -> None:
    fit = family.sample_fit(renderer.subject.shape, 6, np.random.default_rng(4))
    t = {k: torch.as_tensor(getattr(fit, k)) for k in ("expr", "rot", "tra", "eye_rot")}
    posed = renderer.head_model(
        renderer.shape, t["expr"], t["rot"], t["tra"], eye_rot=t["eye_rot"]
    ).vertices
    ids = head_vertex_ids(build_demo_head())
    p = posed[:, ids].double().numpy() * [1, -1, -1]
    xy = p[..., :2] / p[..., 2:] * fit.fx[0, 0] + fit.cx[0, 0]
    expected = [crop_box_from_points(frame) for frame in xy]
    boxes = family.crop_boxes(renderer, family.views_of(fit))
    assert [tuple(box) for box in boxes.tolist()] == expected


def test_pictures_are_those_of_an_image_set(
    renderer: SubjectRenderer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("held_out")
    fit = world.write_demo_held_out(folder, SEED, num_views=3, crop_size=48, supersample=2)
    full = SubjectRenderer(make_subject(SEED))
    views = family.render_fit(full, fit, size=48)
    for i, item in enumerate(read_image_set(folder)):
        assert np.abs(read_rgb(item.image).astype(int) - views.rgb[i].numpy()).max() <= 1
        assert item.matte is not None
        np.testing.assert_array_equal(read_grey(item.matte), views.matte[i].numpy())
        np.testing.assert_array_equal(item.parameters.crop_box, views.crop_box[i].numpy())
        np.testing.assert_array_equal(item.parameters.expr, views.expr[i].numpy())


def test_batches_do_not_matter(renderer: SubjectRenderer) -> None:
    one, many = (
        family.render_views(renderer, 3, np.random.default_rng(5), size=32, batch=b) for b in (1, 8)
    )
    # Sums of matrix products may be ordered differently.
    assert (one.rgb.int() - many.rgb.int()).abs().max() <= 1


def test_rasterizers_give_the_same_picture() -> None:
    subject = make_subject(SEED, texture_size=256)
    views = [
        family.render_views(
            SubjectRenderer(subject, backend=name), 2, np.random.default_rng(6), size=48
        )
        for name in ("numba", "torch")
    ]
    assert torch.equal(views[0].rgb, views[1].rgb) and torch.equal(views[0].matte, views[1].matte)


def test_low_precision_around_it_does_not_blur_geometry(renderer: SubjectRenderer) -> None:
    """A trainer renders inside autocast."""
    plain = family.render_views(renderer, 2, np.random.default_rng(7), size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = family.render_views(renderer, 2, np.random.default_rng(7), size=32)
    assert torch.equal(plain.rgb, inside.rgb)
    assert torch.equal(plain.crop_box, inside.crop_box)


def test_worker_processes_make_the_same_people() -> None:
    with family.subject_pool(1) as pool:
        there = list(family.make_subjects([4, 5], texture_size=64, executor=pool))
    here = list(family.make_subjects([4, 5], texture_size=64))
    for a, b in zip(there, here, strict=True):
        assert a.traits.seed == b.traits.seed
        np.testing.assert_array_equal(a.texture, b.texture)
        for p, q in zip(a.attachments, b.attachments, strict=True):
            np.testing.assert_array_equal(p.vertices, q.vertices)


def test_runs_without_numba() -> None:
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from cap4d_core.demo import family, world
from cap4d_core.demo.head import build_demo_head, head_vertex_ids
from cap4d_core.demo.rendering import SubjectRenderer
subject = next(family.make_subjects([3], texture_size=64))
views = family.render_views(SubjectRenderer(subject), 1, np.random.default_rng(0), size=32)
assert (views.matte > 0).any()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
