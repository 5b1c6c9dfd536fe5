"""The demo head: FLAME's format and counts, anatomy that works, an atlas without overlaps."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from cap4d_core.demo import (
    anatomy,
    atlas,
    expression_basis,
    expressions,
    head,
    identity_basis,
    topology,
)
from cap4d_core.demo.head import DemoHead, build_demo_head, write_demo_head
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel

import torch  # isort: skip


@pytest.fixture(scope="module")
def demo() -> DemoHead:
    return build_demo_head()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_head(tmp_path_factory.mktemp("demo_head"))


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> HeadModel:
    folder = tmp_path_factory.mktemp("prepared") / "head_model"
    prepare_head_model(source, None, folder)
    return HeadModel.load(folder, lower_jaw=True)


def pose(
    model: HeadModel, expr: np.ndarray, eye: tuple[float, float, float] = (0, 0, 0)
) -> np.ndarray:
    e = torch.as_tensor(expr, dtype=torch.float32)[None]
    zero = torch.zeros(1, 3)
    out = model(torch.zeros(150), e, zero, zero, eye_rot=torch.tensor([eye], dtype=torch.float32))
    return out.vertices[0].numpy().astype(np.float64)


def test_pickle_holds_flame_shapes(source: Path, demo: DemoHead) -> None:
    with open(source / "data/assets/flame/flame2023_no_jaw.pkl", "rb") as handle:
        stored = pickle.load(handle)
    v, n = stored["v_template"], len(demo.faces)
    assert v.shape == (5023, 3)
    assert stored["f"].shape == (n, 3)
    assert stored["shapedirs"].shape == (5023, 3, 400)
    assert stored["posedirs"].shape == (5023, 3, 36)
    assert stored["weights"].shape == (5023, 5)
    np.testing.assert_allclose(stored["weights"].sum(1), 1, atol=1e-12)
    assert stored["weights"].min() >= 0
    np.testing.assert_allclose(stored["J_regressor"].sum(1), 1, atol=1e-9)
    # Template and joints differ from the sculpted head by the correctives' offset at rest only.
    np.testing.assert_allclose(stored["J_regressor"] @ v, demo.joints, atol=1e-3)
    assert stored["kintree_table"][0, 0] == 2**32 - 1
    np.testing.assert_array_equal(np.unique(stored["f"]), np.arange(5023))


def test_template_carries_the_opposite_of_the_rest_offset(demo: DemoHead) -> None:
    pose_dirs = np.asarray(demo.model["posedirs"], dtype=np.float64).reshape(5023, 3, 4, 3, 3)
    offset = -np.einsum("vckii->vc", pose_dirs)
    template = np.asarray(demo.model["v_template"], dtype=np.float64)
    # float32 pose basis
    np.testing.assert_allclose(template + offset, demo.rest, atol=1e-8)
    assert np.abs(offset).max() > 1e-4  # the quirk is exercised, not avoided


def test_skin_is_a_closed_surface_but_for_neck_eyes_and_mouth(demo: DemoHead) -> None:
    faces = demo.faces[(demo.faces < topology.NUM_SKIN).all(1)]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    unique, count = np.unique(edges, axis=0, return_counts=True)
    assert count.max() == 2
    # A sphere with four holes has Euler characteristic -2.
    assert topology.NUM_SKIN - len(unique) + len(faces) == -2


def test_triangles_face_outwards(demo: DemoHead) -> None:
    eye = demo.faces[(demo.faces >= topology.NUM_SKIN + topology.NUM_EYE).all(1)]
    v = demo.rest[eye]
    normal = np.cross(v[:, 1] - v[:, 0], v[:, 2] - v[:, 0])
    centre = 1e-3 * anatomy.EYE_CENTRE * [-1, 1, 1]
    assert ((normal * (v.mean(1) - centre)).sum(1) > 0).all()
    skin = demo.faces[(demo.faces < topology.NUM_SKIN).all(1)]
    v = demo.rest[skin]
    # Divergence theorem: outward triangles enclose a positive volume, about a head's (litres).
    volume = (v[:, 0] * np.cross(v[:, 1], v[:, 2])).sum() / 6 * 1e3
    assert 3.0 < volume < 7.0


def test_head_is_mirror_symmetric(demo: DemoHead) -> None:
    from scipy.spatial import cKDTree

    distance, _ = cKDTree(demo.rest).query(demo.rest * [-1, 1, 1])
    # The lower lip vertex's fixed index and the seam aside, every vertex has a mirror image.
    assert distance.max() < 2e-4


def test_blink_closes_the_lids(demo: DemoHead, model: HeadModel) -> None:
    pts = demo.points
    blink = np.zeros(65)
    blink[expressions.BLINK] = 1.0
    for side in (1.0, -1.0):
        ring = (pts.lid_ring == 0) & (np.sign(pts.p[:, 0]) == side)
        upper, lower = ring & (pts.lid_side > 0), ring & (pts.lid_side < 0)

        def gap(v: np.ndarray, upper: np.ndarray = upper, lower: np.ndarray = lower) -> float:
            v = v[:5023]
            up, low = v[upper][np.argsort(v[upper, 0])], v[lower][np.argsort(v[lower, 0])]
            at = np.interp(up[:, 0], low[:, 0], low[:, 1])
            return float((up[:, 1] - at).max())

        assert gap(pose(model, np.zeros(65))) > 8e-3
        # Half a millimetre is under a fifth of a pixel of a 128 pixel crop.
        assert abs(gap(pose(model, blink))) < 5e-4


def test_lids_stay_outside_the_eyeball_when_closed(demo: DemoHead, model: HeadModel) -> None:
    blink = np.zeros(65)
    blink[expressions.BLINK] = 1.0
    v = pose(model, blink)
    pts = demo.points
    for side in (1.0, -1.0):
        rim = (pts.lid_ring == 0) & (np.sign(pts.p[:, 0]) == side)
        r = np.linalg.norm(v[:5023][rim] - 1e-3 * anatomy.EYE_CENTRE * [side, 1, 1], axis=1)
        assert r.min() > 1e-3 * anatomy.EYE_RADIUS


def test_jaw_open_parts_the_lips_and_turns_the_lower_teeth(
    demo: DemoHead, model: HeadModel
) -> None:
    rim = (demo.points.lip_ring == 0) & (np.abs(demo.points.p[:, 0]) < 1.0)
    up = np.where(rim & (demo.points.lip_side > 0))[0]
    low = np.where(rim & (demo.points.lip_side < 0))[0]
    assert topology.LOWER_LIP_VERTEX in low
    closed, opened = pose(model, np.zeros(65)), pose(model, expressions.from_units(jaw_open=1.5))
    assert abs(closed[up, 1].mean() - closed[low, 1].mean()) < 1e-3
    assert opened[up, 1].mean() - opened[low, 1].mean() > 8e-3
    lower_mouth = slice(5223, 5423)
    lip_drop = (closed - opened)[topology.LOWER_LIP_VERTEX, 1]
    mouth_drop = (closed - opened)[lower_mouth, 1].max()
    # The half-sphere turns by the jaw regressor about as far as the lip goes.
    assert 0.6 < mouth_drop / lip_drop < 1.1
    np.testing.assert_array_equal(closed[5023:5223], opened[5023:5223])


def test_eyes_turn_and_upper_lids_follow_the_gaze(demo: DemoHead, model: HeadModel) -> None:
    rest, down = pose(model, np.zeros(65)), pose(model, np.zeros(65), (0.3, 0.0, 0.0))
    for first in (topology.NUM_SKIN, topology.NUM_SKIN + topology.NUM_EYE):
        pupil = down[first] - rest[first]
        assert pupil[1] == pytest.approx(-1e-3 * anatomy.EYE_RADIUS * np.sin(0.3), rel=0.15)
    upper = (demo.points.lid_ring == 0) & (demo.points.lid_side > 0)
    assert (down - rest)[:5023][upper, 1].min() < -1.5e-3


def test_units_move_what_they_name(demo: DemoHead) -> None:
    units = expression_basis.expression_units(demo.points)
    p = demo.points.p
    corner = np.argmin(np.linalg.norm(p - anatomy.MOUTH_CORNER, axis=1))
    brow = np.argmin(np.linalg.norm(p - [30, 41, 50], axis=1))
    assert units["smile"][corner, 1] > 3 and units["smile"][corner, 0] > 3
    assert units["frown"][corner, 1] < -2
    assert units["pucker"][corner, 0] < -2
    assert units["brow_raise"][brow, 1] > 3 and units["brow_lower"][brow, 1] < -1
    right = p[:, 0] < -12
    assert np.abs(units["brow_raise_left"][right]).max() < 0.5
    eyes = ~demo.points.skin
    for name, field in units.items():
        assert np.abs(field[eyes]).max() == 0, name


def test_identity_keeps_eyeballs_rigid_up_to_scale(demo: DemoHead) -> None:
    dirs = np.asarray(demo.model["shapedirs"], dtype=np.float64)[..., :300]
    for ball in (slice(3931, 4477), slice(4477, 5023)):
        p = demo.rest[ball] - demo.rest[ball].mean(0)
        for k in (*range(len(identity_basis.SHAPE_UNITS)), 60, 150, 299):
            field = dirs[ball, :, k]
            centred = field - field.mean(0)
            # Best similarity: p -> p A with A = s I + skew.
            a = np.linalg.lstsq(p, centred, rcond=None)[0]
            similar = (np.trace(a) / 3) * np.eye(3) + (a - a.T) / 2
            assert np.abs(centred - p @ similar).max() < 3e-5, k


def test_atlas_is_counter_clockwise_inside_the_square_and_free_of_overlaps(source: Path) -> None:
    from cap4d_core.flame.obj import read_obj

    mesh = read_obj(source / "data/assets/flame/cap4d_avatar_template.obj")
    assert len(mesh.vertices) == 5423
    uv = mesh.uvs[mesh.uv_faces]
    assert uv.min() >= 0 and uv.max() <= 1
    e1, e2 = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    area = (e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]) / 2
    # Only the poles of the mouth parts (20 coincident vertices, columns 0 and 19) are degenerate.
    assert (area < -1e-12).sum() == 0
    assert (area[: len(area) - 680] > 0).all()
    # Count coverage at pixel centres: no pixel lies strictly inside two triangles.
    size = 160
    hits = np.zeros((size, size), int)
    for (a, b, c), s in zip(uv, area, strict=True):
        if s < 1e-12:
            continue
        lo, hi = (
            np.floor(np.min([a, b, c], 0) * size).astype(int),
            np.ceil(np.max([a, b, c], 0) * size).astype(int),
        )
        xs, ys = np.meshgrid(np.arange(lo[0], hi[0]), np.arange(lo[1], hi[1]), indexing="ij")
        p = (np.stack([xs, ys], -1) + 0.5) / size

        def side(u: np.ndarray, v: np.ndarray, p: np.ndarray = p) -> np.ndarray:
            return (v[0] - u[0]) * (p[..., 1] - u[1]) - (v[1] - u[1]) * (p[..., 0] - u[0])

        inside = (side(a, b) > 1e-12) & (side(b, c) > 1e-12) & (side(c, a) > 1e-12)
        hits[xs[inside], ys[inside]] += 1
    assert hits.max() == 1
    assert (hits > 0).mean() > 0.8


def test_face_gets_a_large_share_of_the_atlas(demo: DemoHead) -> None:
    e1 = demo.corner_uv[:, 1] - demo.corner_uv[:, 0]
    e2 = demo.corner_uv[:, 2] - demo.corner_uv[:, 0]
    area = np.abs(e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]) / 2
    c = demo.rest[demo.faces].mean(1)
    face = (c[:, 2] > 0.01) & (c[:, 1] > -0.095) & (c[:, 1] < 0.07)
    # Of the atlas, against a sixth of the surface.
    assert area[face].sum() > 0.30


def test_mouth_half_sphere_matches_the_head_model(demo: DemoHead, model: HeadModel) -> None:
    template = np.asarray(demo.model["v_template"], dtype=np.float64)
    upper, faces, _ = atlas.mouth_half_sphere(template[3533], demo.joints[2])
    zero = torch.zeros(1, 3)
    posed = model(torch.zeros(150), torch.zeros(1, 65), zero, zero).vertices[0].numpy()
    # The regressed joint of the template lies within a millimetre of the nominal one.
    np.testing.assert_allclose(posed[5023:5223], upper, atol=1e-3)
    np.testing.assert_array_equal(
        model.faces[len(demo.faces) : len(demo.faces) + 340], faces + 5023
    )


def test_generation_expressions_are_plausible(source: Path) -> None:
    data = np.load(source / "data/assets/datasets/gen_data.npz")
    expr, eye = data["expr"], data["eye_rot"]
    assert expr.shape == (1000, 65) and eye.shape == (1000, 3)
    assert expr.dtype == np.float32 and np.isfinite(expr).all() and np.abs(expr).max() < 4
    assert (expr[:, expressions.index_of("jaw_open")] > 1).mean() > 0.05
    assert (expr[:, expressions.BLINK] == 1).any() and (expr[:, expressions.BLINK] == 0).any()
    assert np.linalg.norm(eye, axis=1).max() < 0.6


def test_writing_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    head.build_demo_head.cache_clear()
    again = write_demo_head(tmp_path)
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(files) == 10
    for name in files:
        if name.suffix != ".npz":  # archives carry the time of writing
            assert (source / name).read_bytes() == (again / name).read_bytes(), name
