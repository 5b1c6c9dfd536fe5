"""Beards, glasses, clothes and earrings of demo subjects: how common, where, and how they move."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from cap4d_core.demo import (
    anatomy,
    attachments,
    clothing,
    expressions,
    facial_hair,
    family,
    glasses,
    head,
    jewellery,
    subject,
)
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import Subject, draw_traits, make_subject

COLOR = np.array([0.2, 0.1, 0.05])


def dressed(*parts: attachments.Attachment) -> SubjectRenderer:
    """An ordinary subject with nothing attached but the given parts."""
    plain = make_subject(24, 64)
    return SubjectRenderer(Subject(plain.traits, plain.shape, plain.texture, parts))


def moved(renderer: SubjectRenderer, part: int = 0, **units: float) -> np.ndarray:
    """How far (N,3) mm a part's vertices move with an expression."""
    expr = torch.as_tensor(np.stack([np.zeros(65), expressions.from_units(**units)])).float()
    v = renderer.geometry(expr, torch.zeros(2, 3))
    counts = [5023, *(len(a.vertices) for a in renderer.subject.attachments)]
    own = v.split(counts, 1)[part + 1]
    return 1e3 * (own[1] - own[0]).numpy()


def beard(name: str) -> attachments.Attachment:
    return facial_hair.build_beard(
        facial_hair.STYLES[name], COLOR, 3 * COLOR, np.random.default_rng(0)
    )


def test_rates_are_everyday() -> None:
    people = [draw_traits(k) for k in range(1200)]
    masculine = [p for p in people if p.masculinity > 0.62]
    assert all(p.face.beard is None for p in people if p.masculinity <= 0.62)
    grown = [p.face.beard.name for p in masculine if p.face.beard is not None]
    # 4 standard deviations of a share of 400 to 1200 draws are 0.05 to 0.1.
    assert len(grown) / len(masculine) == pytest.approx(0.36, abs=0.09)
    assert set(grown) == set(facial_hair.STYLES)
    worn = [p.glasses.name for p in people if p.glasses is not None]
    assert len(worn) / len(people) == pytest.approx(0.20, abs=0.05)
    assert set(worn) == set(glasses.STYLES)
    assert {p.garment.kind for p in people} == set(clothing.KINDS)
    assert {p.garment.pattern for p in people} == set(clothing.PATTERNS)
    assert {p.earrings.kind for p in people if p.earrings} == set(jewellery.KINDS)
    # The person of the demo wears nothing that hides the face.
    assert draw_traits(24).face.beard is None and draw_traits(24).glasses is None


def test_accessories_change_no_other_trait(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(k for k in range(100) if draw_traits(k).face.beard and draw_traits(k).glasses)
    before = draw_traits(seed)
    monkeypatch.setattr(subject, "_beard", lambda *_: (None, COLOR))
    monkeypatch.setattr(subject, "_glasses", lambda *_: (None, COLOR))
    after = draw_traits(seed)
    for f in fields(before.face):
        if not f.name.startswith("beard"):
            np.testing.assert_array_equal(getattr(before.face, f.name), getattr(after.face, f.name))
    np.testing.assert_array_equal(before.shape, after.shape)
    np.testing.assert_array_equal(before.shirt, after.shirt)
    assert before.garment.kind == after.garment.kind and before.hair_style == after.hair_style


def test_roots_of_a_beard_leave_the_rest_of_the_skin_alone() -> None:
    from cap4d_core.demo import skin_paint, skin_zones

    face = replace(make_subject(24, 64).traits.face, beard=None)
    bearded = replace(face, beard=facial_hair.STYLES["full"], beard_color=COLOR)
    one, two = (
        skin_paint.paint(f, 64, np.random.default_rng(1), np.random.default_rng(2))
        for f in (face, bearded)
    )
    changed = np.abs(one - two).max(-1) > 1e-6
    height = skin_zones.texels(64).y[skin_zones.texels(64).source].reshape(64, 64)
    assert changed.any() and height[changed].max() < 25


def test_a_chin_beard_moves_with_the_jaw_and_a_moustache_does_not() -> None:
    renderer = dressed(beard("van_dyke"), beard("moustache"))
    chin, lip = moved(renderer, 0, jaw_open=1.5), moved(renderer, 1, jaw_open=1.5)
    low = renderer.subject.attachments[0].vertices[:, 1] < -0.075
    assert low.sum() > 50
    # The chin's own skin moves by about this much.
    assert -22 < chin[low, 1].mean() < -6
    # Its ends lie at the corners of the mouth and go along; the middle stays.
    middle = np.abs(renderer.subject.attachments[1].vertices[:, 0]) < 0.014
    assert np.abs(lip[middle]).max() < 1.5
    assert moved(renderer, 1, upper_lip_raise=1.0)[:, 1].max() > 1.0


@pytest.mark.parametrize("name", sorted(facial_hair.STYLES))
def test_beards_stay_on_the_skin_and_off_the_lips(name: str) -> None:
    part = beard(name)
    demo = head.build_demo_head()
    assert len(part.faces) > 100 and (part.colors > 0).all() and np.isfinite(part.vertices).all()
    np.testing.assert_allclose(part.weights.sum(1), 1, atol=1e-12)
    # Roots: where the weights put the vertices on the skin.
    root = (demo.rest[part.binding] * part.weights[..., None]).sum(1)
    style = facial_hair.STYLES[name]
    reach = 1e-3 * (2.5 * max(style.length + style.chin, style.moustache) + style.drop + 3)
    assert np.linalg.norm(part.vertices - root, axis=1).max() < reach
    rim = demo.rest[demo.points.lip_ring == 0]
    front = np.abs(rim[:, 0]) < 0.018
    standing = np.linalg.norm(part.vertices - root, axis=1) > 1.2e-3
    distance, _ = cKDTree(root[standing]).query(rim[front])
    assert distance.min() > 2e-3


@pytest.mark.parametrize("name", sorted(glasses.STYLES))
@pytest.mark.parametrize("seed", [1, 40])
def test_glasses_are_rigid_and_clear_of_the_eyes(name: str, seed: int) -> None:
    demo = head.build_demo_head()
    traits = draw_traits(seed)
    shaped = head.shaped(demo, traits.shape)
    part = glasses.build_glasses(glasses.STYLES[name], COLOR, demo, shaped)
    person = replace(make_subject(seed, 64), attachments=(part,))
    renderer = SubjectRenderer(person)
    assert np.abs(moved(renderer, smile=1.5, jaw_open=1.0)).max() == 0
    v = renderer.geometry(torch.zeros(1, 65), torch.zeros(1, 3))[0, 5023:].numpy()
    assert len(v) == len(part.vertices)
    for side in (1.0, -1.0):
        ball = ~demo.points.skin & (np.sign(demo.points.x) == side)
        eye = shaped[ball].mean(0)
        front = v[np.abs(v[:, 0] - eye[0]) < 0.03]
        assert np.linalg.norm(front - eye, axis=1).min() > 1e-3 * (anatomy.EYE_RADIUS + 1.5)
        # The eye is seen through the rim: nothing lies in front of the pupil.
        ahead = v[(np.hypot(*(v[:, :2] - eye[:2]).T) < 0.008) & (v[:, 2] > eye[2])]
        assert len(ahead) == 0
    # Symmetric, and from the nose to behind the ears.
    assert np.ptp(v[:, 2]) > 0.085 and abs(v[:, 0].max() + v[:, 0].min()) < 2e-3
    assert 0.060 < v[:, 0].max() < 0.095


@pytest.mark.parametrize("kind", clothing.KINDS)
def test_garments_leave_the_face_free(kind: str) -> None:
    demo = head.build_demo_head()
    skin = demo.rest[demo.points.skin]
    for pattern in clothing.PATTERNS:
        garment = clothing.Garment(kind, pattern, 2 * COLOR, 18.0)
        parts = clothing.wear(garment, COLOR, 6.0, skin, np.random.default_rng(0))
        for part in parts:
            assert (part.colors > 0).all() and np.isfinite(part.vertices).all()
            front = part.vertices[part.vertices[:, 2] > 0]
            assert front[:, 1].max() < -0.095
        plain = np.ptp(parts[0].colors[:, 0]) / COLOR[0]
        assert (plain > 0.7) == (pattern != "plain")


def test_earrings_hang_at_the_lobes() -> None:
    demo = head.build_demo_head()
    for kind in jewellery.KINDS:
        what = jewellery.Earrings(kind, COLOR, 1.0)
        part = jewellery.build_earrings(what, demo, demo.rest)
        assert 0.06 < np.abs(part.vertices[:, 0]).min() < np.abs(part.vertices[:, 0]).max() < 0.095
        assert part.vertices[:, 1].max() < 0.0


def test_rasterizers_agree_on_somebody_with_beard_and_glasses() -> None:
    seed = next(k for k in range(100) if draw_traits(k).face.beard and draw_traits(k).glasses)
    person = make_subject(seed, 128)
    pictures = [
        family.render_views(
            SubjectRenderer(person, backend=name), 3, np.random.default_rng(0), size=64
        ).rgb
        for name in ("numba", "torch")
    ]
    assert torch.equal(*pictures)
    bare = replace(
        person, attachments=tuple(a for a in person.attachments if a.material != attachments.HAIR)
    )
    other = family.render_views(SubjectRenderer(bare), 3, np.random.default_rng(0), size=64).rgb
    assert (other.int() - pictures[0].int()).abs().float().mean() > 3
