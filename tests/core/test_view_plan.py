"""Planning of views: where cameras stand, which expressions, the plan file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cap4d_core.diffusion.frames import reference_views
from cap4d_core.diffusion.view_cloud import (
    angle_off_front,
    camera_directions,
    draw_angles,
    frontal_centre,
    pivot_of,
    published_centre,
)
from cap4d_core.diffusion.view_plan import choose_rows, make_plan, most_frontal, plan_views
from cap4d_core.diffusion.view_plan_file import ViewPlan, read_plan, write_plan
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import read_npz, write_npz
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import read_tracked_subject
from cap4d_core.geometry.cameras import look_at, pivot_camera
from tests.core.sampling_fixtures import head, template, tiny_settings, world


def random_camera(rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A turned head somewhere, and a rolled camera that sees it off the picture's centre."""
    rot, tra = rng.normal(0, 0.4, 3), rng.normal(0, 0.2, 3)
    position = pivot_of(tra) + np.array([*rng.normal(0, 0.3, 2), -1.2])
    aim = pivot_of(tra) + rng.normal(0, 0.1, 3)
    return rot, tra, look_at(position, aim, up=[rng.normal(0, 0.2), -1, 0])


def test_frontal_centre_is_in_front_of_any_head() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rot, tra, extr = random_camera(rng)
        frontal = pivot_camera(extr, pivot_of(tra), *frontal_centre(rot, tra, extr))
        direction = camera_directions(rot, tra, frontal[None])[0]
        np.testing.assert_allclose(direction, [0, 0, 1], atol=1e-9)
        # The head keeps its place in the picture.
        np.testing.assert_allclose(
            frontal[:3, :3] @ pivot_of(tra) + frontal[:3, 3],
            extr[:3, :3] @ pivot_of(tra) + extr[:3, 3],
            atol=1e-9,
        )


def test_drawn_angles_are_angles_off_the_front() -> None:
    rot, tra = np.array([0.1, 0.3, 0.05]), np.array([0.02, -0.1, -0.1])
    extr = look_at(pivot_of(tra) + np.array([0.2, 0.1, -1.0]), pivot_of(tra))
    frontal = pivot_camera(extr, pivot_of(tra), *frontal_centre(rot, tra, extr))
    for yaw, pitch in ((40, 0), (-25, 0), (0, 15), (0, -10)):
        turned = pivot_camera(frontal, pivot_of(tra), yaw, pitch)
        assert angle_off_front(rot, tra, turned) == pytest.approx(abs(yaw + pitch), abs=1e-6)


def test_published_centre_misses_turned_heads_by_twice_their_angle() -> None:
    """The defect that `parity` reproduces."""
    angle = 0.3
    tra, extr = np.zeros(3), look_at([0, 0, -1.0], [0, 0, 0])
    rot = np.array([0.0, angle, 0.0])
    published = pivot_camera(extr, pivot_of(tra), *published_centre(rot, extr))
    assert angle_off_front(rot, tra, published) == pytest.approx(2 * np.degrees(angle), abs=1e-6)
    nod = np.array([angle, 0.0, 0.0])
    published = pivot_camera(extr, pivot_of(tra), *published_centre(nod, extr))
    assert angle_off_front(nod, tra, published) == pytest.approx(0, abs=1e-5)


def test_draws_fill_the_ellipse() -> None:
    source = np.random.default_rng(1)
    drawn = np.array([draw_angles(source, 55, 20) for _ in range(4000)]) / [55, 20]
    radius = (drawn**2).sum(1)
    assert radius.max() < 1
    # Uniform on the disc: squared radius is uniform in 0..1, standard error 0.005.
    assert abs(radius.mean() - 0.5) < 0.02
    before = source.bit_generator.state
    assert draw_angles(source, 0, 20) == (0.0, 0.0)
    assert source.bit_generator.state == before


def test_rows_start_over_with_new_pairs() -> None:
    expression, gaze = choose_rows(25, 10, 3, "ana")
    assert expression.tolist() == [i % 10 for i in range(25)]
    assert gaze[:10].tolist() == list(range(10))
    assert sorted(gaze[10:20]) == list(range(10)) and gaze[10:20].tolist() != list(range(10))
    longer = choose_rows(40, 10, 3, "ana")[1]
    assert longer[:25].tolist() == gaze.tolist()


@pytest.fixture(scope="module")
def references() -> list[ViewParameters]:
    return reference_views(
        read_tracked_subject(world().tracking), head(), template().head_vertex_ids
    )


def plan(references: list[ViewParameters], **changes: Any) -> ViewPlan:
    return make_plan(
        references, ["cam0"] * len(references), head(), template(), tiny_settings(**changes),
        "ana", world().head_model / "gen_data.npz",
    )  # fmt: skip


def extrinsics(p: ViewPlan) -> NDArray[Any]:
    return np.stack([view.extr for view in p.views])


def test_plan_is_deterministic_and_grows_at_the_end(references: list[ViewParameters]) -> None:
    first, more = plan(references), plan(references, num_views=16)
    assert len(first.views) == 8 and len(more.views) == 16
    np.testing.assert_array_equal(extrinsics(first), extrinsics(more)[:8])
    assert not np.allclose(extrinsics(plan(references, seed=1)), extrinsics(first))
    other = make_plan(
        references, ["cam0"] * len(references), head(), template(), tiny_settings(), "ben",
        world().head_model / "gen_data.npz",
    )  # fmt: skip
    assert not np.allclose(extrinsics(other), extrinsics(first))


def test_number_of_views_is_rounded_up_and_said(
    references: list[ViewParameters], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        p = plan(references, num_views=9)
    assert len(p.views) == 12 and p.num_requested == 9
    assert "12 views instead of 9" in caplog.text


def test_views_surround_the_front(references: list[ViewParameters]) -> None:
    p = plan(references, num_views=40, yaw_range_deg=30, pitch_range_deg=10)
    base = references[p.base_reference]
    directions = camera_directions(base.rot, base.tra, extrinsics(p))
    assert np.degrees(np.arccos(directions[:, 2])).max() < 30.001
    assert abs(np.degrees(np.arcsin(directions[:, 0])).mean()) < 8  # 4 standard errors
    assert all(np.array_equal(v.rot, base.rot) and v.fx == base.fx for v in p.views)


def test_expression_factor_scales_expressions(references: list[ViewParameters]) -> None:
    once, twice = plan(references), plan(references, expression_factor=2.0)
    rows = read_npz(world().head_model / "gen_data.npz")
    np.testing.assert_array_equal(once.views[3].expr, rows["expr"][3])
    np.testing.assert_array_equal(twice.views[3].expr, 2 * rows["expr"][3])
    np.testing.assert_array_equal(twice.views[3].eye_rot, 2 * rows["eye_rot"][3])


def test_base_reference(references: list[ViewParameters]) -> None:
    angles = [angle_off_front(r.rot, r.tra, r.extr) for r in references]
    assert most_frontal(references) == int(np.argmin(angles))
    turned = [*references[1:], references[0]]
    assert plan(turned).base_reference == most_frontal(turned)
    assert plan(turned, parity=True).base_reference == 0
    chosen = plan(references, base_reference=2)
    assert chosen.reference_order == [2, 0, 1, 3]
    np.testing.assert_array_equal(chosen.views[0].rot, references[2].rot)
    with pytest.raises(UserError, match="base_reference = 9"):
        plan(references, base_reference=9)


def test_plan_file_round_trip(references: list[ViewParameters], tmp_path: Path) -> None:
    written = plan(references, num_views=16)
    write_plan(tmp_path / "plan.npz", written)
    read = read_plan(tmp_path / "plan.npz")
    for name in ("subject", "base_reference", "num_requested", "reference_cameras", "parity"):
        assert getattr(read, name) == getattr(written, name)
    for a, b in zip(
        [*written.views, *written.references], [*read.views, *read.references], strict=True
    ):
        for name in ViewParameters.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    arrays = read_npz(tmp_path / "plan.npz")
    write_npz(tmp_path / "old.npz", arrays | {"version": np.int64(0)})
    with pytest.raises(InputFileError, match="version 0"):
        read_plan(tmp_path / "old.npz")


def test_own_table_of_views(references: list[ViewParameters], tmp_path: Path) -> None:
    table = tmp_path / "views.tsv"
    header = "yaw_deg\tpitch_deg\texpression_row\n"
    table.write_text(f"# comment\n{header}0\t0\t5\n30\t0\t7\n0\t-10\t5\n")
    p = plan(references, plan=str(table), num_shards=1)
    assert p.num_requested == 3 and len(p.views) == 4
    base = references[p.base_reference]
    angles = [angle_off_front(base.rot, base.tra, v.extr) for v in p.views]
    # The camera turns about its own axes, and this head is a degree off the picture's centre.
    np.testing.assert_allclose(angles, [0, 30, 10, 0], atol=0.02)
    assert p.expression_rows.tolist() == [5, 7, 5, 5]
    table.write_text(f"{header}0\t0\t5000\n")
    with pytest.raises(UserError, match="expression_row out of range"):
        plan(references, plan=str(table))
    table.write_text("yaw\tpitch\n0\t0\n")
    with pytest.raises(InputFileError, match="columns yaw, pitch"):
        plan(references, plan=str(table))
    table.write_text("yaw_deg\tpitch_deg\n0\tx\n")
    with pytest.raises(InputFileError, match="no number"):
        plan(references, plan=str(table))


def test_own_cameras_and_expressions(references: list[ViewParameters], tmp_path: Path) -> None:
    base = references[0]
    extr = pivot_camera(base.extr, pivot_of(base.tra), [0, 20], [5, 0])
    expr = np.random.default_rng(0).normal(0, 0.3, (2, 65)).astype(np.float32)
    own = tmp_path / "views.npz"
    write_npz(own, {"extr": extr, "expr": expr})
    p = plan(references, plan=str(own), num_shards=1, expression_factor=3.0)
    np.testing.assert_allclose(extrinsics(p), extr)
    np.testing.assert_array_equal(p.views[1].expr, expr[1])
    assert np.isnan(p.yaw_deg).all() and not p.views[0].eye_rot.any()
    behind = extr.copy()
    behind[1, 2, 3] -= 10
    write_npz(own, {"extr": behind})
    with pytest.raises(UserError, match="head behind it"):
        plan(references, plan=str(own))


def test_plan_views_writes_plan_and_pictures(tmp_path: Path) -> None:
    settings = tiny_settings(num_views=4, num_shards=1)
    made = plan_views(world().tracking, world().head_model, tmp_path / "plan.npz", settings, "ana")
    assert len(read_plan(tmp_path / "plan.npz").views) == len(made.views) == 4
    for name in ("plan.png", "plan_conditioning.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_boxes_enclose_the_head(references: list[ViewParameters]) -> None:
    from cap4d_core.diffusion.frames import head_in_crops

    p = plan(references)
    points, _ = head_in_crops(head(), [replace(v) for v in p.views])
    inside = points[:, template().head_vertex_ids, :2].abs()
    # The box is a fifth larger than the head's bounding box.
    assert float(inside.max()) < 0.9 and float(inside.amax((1, 2)).min()) > 0.75
