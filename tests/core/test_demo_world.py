"""The demo world: formats the pipeline reads, exact truth, determinism, different people."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from cap4d_core.demo import expressions, hair, world
from cap4d_core.demo.head import build_demo_head
from cap4d_core.demo.rendering import SubjectRenderer, Views
from cap4d_core.demo.subject import draw_traits, make_subject
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.files.tracking import read_fit, read_tracked_subject, read_trajectory

SEED = 3
NUM = 10


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    world.write_demo_subject(folder, SEED, num_references=NUM, resolution=80, supersample=2)
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    world.write_demo_held_out(folder, SEED, num_views=5, resolution=80, crop_size=64, supersample=2)
    return folder


def frontal(size: int = 64, expr: np.ndarray | None = None, turn: float = 0.0) -> Views:
    f = torch.full((1,), size * 3.2)
    c = torch.full((1,), size / 2)
    e = np.zeros(65) if expr is None else expr
    return Views(
        expr=torch.as_tensor(e, dtype=torch.float32)[None],
        eye_rot=torch.zeros(1, 3),
        rot=torch.tensor([[0.0, turn, 0.0]]),
        tra=torch.tensor([[0.0, -0.01, -1.1]]),
        extr=torch.eye(4)[None],
        fx=f,
        fy=f,
        cx=c,
        cy=c,
    )


def test_subject_is_readable_as_a_tracking_folder(subject: Path) -> None:
    tracked = read_tracked_subject(subject)
    assert len(tracked.references) == NUM
    fit = tracked.tracking
    assert fit.shape.shape == (150,) and fit.expr.shape == (NUM, 65) and fit.fps is None
    for reference in tracked.references:
        assert read_rgb(reference.image).shape == (80, 80, 3)
        assert reference.matte is not None
        matte = read_grey(reference.matte)
        assert 0.2 < (matte > 127).mean() < 0.9
    # The first photo is frontal and neutral: it is the camera that generated views start from.
    np.testing.assert_array_equal(fit.expr[0], 0)
    np.testing.assert_array_equal(fit.rot[0], 0)
    many = world.reference_fit(SEED, 64).expr
    assert many[:, expressions.index_of("jaw_open")].max() > 1.0
    assert many[:, expressions.BLINK].max() == 1.0


def test_photos_are_exact_under_their_matte(subject: Path) -> None:
    tracked = read_tracked_subject(subject)
    reference = tracked.references[0]
    rgb = read_rgb(reference.image).astype(float)
    assert reference.matte is not None
    matte = read_grey(reference.matte)
    # Where the matte is empty the photo is white; partly covered pixels hold the subject's colour.
    assert (rgb[matte == 0] == 255).all()
    edge = (matte > 0) & (matte < 255)
    assert edge.sum() > 50
    assert (rgb[edge].mean(-1) < 254).mean() > 0.95


def test_held_out_views_are_far_from_every_reference(subject: Path, held_out: Path) -> None:
    items = read_image_set(held_out)
    assert len(items) == 5
    assert all(read_rgb(i.image).shape == (64, 64, 3) and i.matte is not None for i in items)
    references = world.view_directions(world.reference_fit(SEED, 64))
    fit = world.held_out_fit(SEED, 16)
    unseen = world.view_directions(fit)
    angle = np.degrees(np.arccos(np.clip(unseen @ references.T, -1, 1)))
    assert angle.min() >= 10.0
    # ... but inside the range that references cover.
    assert angle.min(1).max() < 25.0
    seen = world.reference_fit(SEED, 64).expr
    assert np.abs(fit.expr[:, None] - seen[None]).max(-1).min() > 0.05


def test_held_out_crop_camera_sees_the_head_in_the_middle(held_out: Path) -> None:
    for item in read_image_set(held_out):
        assert item.matte is not None
        matte = read_grey(item.matte) > 127
        columns = np.where(matte[: matte.shape[0] // 2].any(0))[0]
        assert 3 < columns.min() < 24 and 40 < columns.max() < 61

        x0, y0, x1, y1 = item.parameters.crop_box
        assert x1 - x0 == y1 - y0 > 40


def test_head_turn_equals_camera_orbit() -> None:
    """Light is fixed to the head, so turning it is the same picture as moving the camera."""
    renderer = SubjectRenderer(make_subject(SEED, texture_size=256))
    turned = renderer.render(frontal(turn=0.4), (64, 64))
    still = frontal()
    c, s = np.cos(0.4), np.sin(0.4)
    f = np.diag([1.0, -1.0, -1.0])
    r = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    t = still.tra[0].numpy().astype(np.float64)
    extr = np.eye(4)
    # F (R v + t) = E F (v + t)
    extr[:3, :3] = f @ r @ f
    extr[:3, 3] = f @ t - extr[:3, :3] @ f @ t
    moved = Views(
        still.expr, still.eye_rot, still.rot, still.tra, torch.from_numpy(extr).float()[None],
        still.fx, still.fy, still.cx, still.cy,
    )  # fmt: skip
    orbited = renderer.render(moved, (64, 64))
    # Single samples may fall on the other side of an edge by rounding.
    assert (turned.matte - orbited.matte).abs().mean() < 1e-3
    inner = (turned.matte == 1) & (orbited.matte == 1)
    assert (turned.rgb - orbited.rgb).abs()[inner].mean() < 1e-3


def test_matte_is_coverage_and_finer_sampling_agrees() -> None:
    renderer = SubjectRenderer(make_subject(SEED, texture_size=256))
    coarse = renderer.render(frontal(), (64, 64), supersample=1)
    fine = renderer.render(frontal(), (64, 64), supersample=4)
    assert set(coarse.matte.unique().tolist()) == {0.0, 1.0}
    np.testing.assert_allclose((fine.matte * 16).numpy() % 1, 0, atol=1e-5)
    # The area of the silhouette does not depend on the sampling (edge pixels are a few percent).
    assert coarse.matte.mean().item() == pytest.approx(fine.matte.mean().item(), rel=0.01)
    assert ((fine.depth > 0) == (fine.matte > 0)).all()
    assert 0.95 < fine.depth[fine.matte == 1].min() < fine.depth.max() < 1.3


def test_expressions_show() -> None:
    renderer = SubjectRenderer(make_subject(SEED, texture_size=256))
    rest = renderer.render(frontal(), (96, 96)).rgb[0]
    for unit in ("jaw_open", "smile", "blink", "brow_raise", "pucker"):
        moved = renderer.render(frontal(expr=expressions.from_units(**{unit: 1.0})), (96, 96)).rgb[
            0
        ]
        assert (moved - rest).abs().max() > 0.05, unit
    look = frontal()
    object.__setattr__(look, "eye_rot", torch.tensor([[0.0, 0.4, 0.0]]))
    assert (renderer.render(look, (96, 96)).rgb[0] - rest).abs().max() > 0.2


def test_same_number_same_person_other_number_other_person() -> None:
    first = make_subject(4, 128)
    make_subject.cache_clear()
    again, other = make_subject(4, 128), make_subject(5, 128)

    def digest(s: object) -> str:
        h = hashlib.sha256(s.texture.tobytes() + s.shape.tobytes())  # type: ignore[attr-defined]
        for a in s.attachments:  # type: ignore[attr-defined]
            h.update(a.vertices.tobytes() + a.colors.tobytes())
        return h.hexdigest()

    assert digest(first) == digest(again) != digest(other)
    views = frontal(48)
    a = SubjectRenderer(first).render(views, (48, 48)).rgb
    b = SubjectRenderer(other).render(views, (48, 48)).rgb
    assert (a - b).abs().mean() > 0.02
    c = SubjectRenderer(again).render(views, (48, 48)).rgb
    assert torch.equal(a, c)


def test_family_is_varied() -> None:
    people = [draw_traits(k) for k in range(64)]
    assert len({p.hair_style.name if p.hair_style else "bald" for p in people}) >= 12
    skin = np.array([p.face.skin for p in people])
    assert skin.mean(1).min() < 0.15 and skin.mean(1).max() > 0.55
    shapes = np.array([p.shape for p in people])
    distance = np.linalg.norm(shapes[:, None, :40] - shapes[None, :, :40], axis=-1)
    assert distance[~np.eye(64, dtype=bool)].min() > 3.0


@pytest.mark.parametrize("name", sorted(hair.STYLES))
def test_hair_stays_near_the_head(name: str) -> None:
    demo = build_demo_head()
    skin = demo.rest[demo.points.skin]
    shell = hair.build_hair(hair.STYLES[name], np.full(3, 0.1), skin, np.random.default_rng(0))
    used = np.unique(shell.faces)
    assert np.isfinite(shell.vertices).all() and (shell.colors > 0).all()
    distance, _ = cKDTree(skin).query(shell.vertices[used])
    # Splats that sit on the skin must reach the hair.
    assert np.quantile(distance, 0.95) < 0.045
    front = shell.vertices[used][(shell.vertices[used, 2] > 0.03)]
    # No hair hangs over the eyes.
    assert len(front) == 0 or front[:, 1].min() > 0.030


def test_driving_sequence_shows_what_it_should(tmp_path: Path) -> None:
    world.write_demo_driving(tmp_path, num_frames=48, fps=24)
    fit, orbit = read_fit(tmp_path / "fit.npz"), read_trajectory(tmp_path / "orbit.npz")
    assert fit.num_frames == 48 and fit.fps == 24 and len(orbit.extr) == 48
    assert orbit.resolution == (160, 160)
    blink = fit.expr[:, expressions.BLINK]
    assert blink.max() > 0.9 and blink.min() == 0 and (blink > 0.5).mean() < 0.35
    assert np.ptp(fit.expr[:, expressions.index_of("jaw_open")]) > 0.6
    assert np.ptp(fit.rot[:, 1]) > 0.5 and np.ptp(fit.eye_rot[:, 1]) > 0.2
    # Smooth: no jump from frame to frame.
    assert np.abs(np.diff(fit.rot, axis=0)).max() < np.radians(6)
    assert np.abs(np.diff(fit.expr[:, expressions.index_of("jaw_open")])).max() < 0.75
