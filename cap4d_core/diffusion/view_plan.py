"""Planning of the views to generate: cameras, expressions and gaze (rule plan_views).

Views are drawn in an ellipse of yaw and pitch about the front of the face, starting from the camera
of the base reference; expressions and gaze come from the companion file gen_data.npz of the head
model, row by row. Once its rows are used up they start over, with gaze dealt to expressions anew
and new cameras.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cap4d_core.diffusion.conditioning import ConditioningRenderer, RendererTables
from cap4d_core.diffusion.dealing import padded_view_count, views_per_iteration
from cap4d_core.diffusion.frames import reference_views, with_crop_boxes
from cap4d_core.diffusion.given_views import Expressions, GivenViews, read_given_views
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.pictures import conditioning_sheet, evenly_spaced, write_view_cloud
from cap4d_core.diffusion.seeding import derived_generator
from cap4d_core.diffusion.view_cloud import (
    angle_off_front,
    draw_angles,
    frontal_centre,
    pivot_of,
    published_centre,
)
from cap4d_core.diffusion.view_plan_file import ViewPlan, write_plan
from cap4d_core.errors import UserError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import read_tracked_subject
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_flame_template
from cap4d_core.geometry.cameras import pivot_camera
from cap4d_core.settings import SamplingSettings

logger = logging.getLogger(__name__)


def most_frontal(references: Sequence[ViewParameters]) -> int:
    """The reference whose camera stands closest to the front of the face; the first of equals."""
    angles = [angle_off_front(r.rot, r.tra, np.asarray(r.extr)) for r in references]
    return int(np.argmin(np.round(angles, 3)))


def _choose_base(references: Sequence[ViewParameters], settings: SamplingSettings) -> int:
    if settings.base_reference is None:
        # Published: the first listed.
        return 0 if settings.parity else most_frontal(references)
    if settings.base_reference >= len(references):
        raise UserError(
            f"sampling.base_reference = {settings.base_reference}, but the tracking lists "
            f"{len(references)} reference(s), numbered from 0. Choose one of them or null."
        )
    return settings.base_reference


def choose_rows(
    num_views: int, num_rows: int, seed: int, subject: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Expression and gaze row of every view.

    View i takes row i mod num_rows. In the first pass gaze comes from the same row (recorded
    pairs); in later passes from a permutation of the rows that depends on (seed, subject, pass).
    """
    expression = np.arange(num_views, dtype=np.int64) % num_rows
    passes = [np.arange(num_rows, dtype=np.int64)]
    for number in range(1, -(-num_views // num_rows)):
        passes.append(derived_generator("gaze", seed, subject, number).permutation(num_rows))
    return expression, np.concatenate(passes)[:num_views].astype(np.int64)


def view_cameras(
    base: ViewParameters,
    num_views: int,
    settings: SamplingSettings,
    subject: str,
    given: GivenViews | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Cameras (N, 4, 4) world-to-camera, and yaw and pitch (N,) about the front of the face.

    Published (parity): offsets are added to the drawn angles, with a yaw offset of the wrong sign.
    Otherwise the base camera is first brought in front of the face and then turned as drawn.
    """
    extr = np.asarray(base.extr)
    pivot = pivot_of(base.tra)
    if given is not None and given.extr is not None:
        unknown = np.full(num_views, np.nan)
        return given.extr[np.arange(num_views) % len(given)], unknown, unknown
    if given is not None:
        assert given.yaw_deg is not None and given.pitch_deg is not None
        rows = np.arange(num_views) % len(given)
        yaw, pitch = given.yaw_deg[rows], given.pitch_deg[rows]
    else:
        source = (
            np.random.RandomState(settings.seed)
            if settings.parity
            else derived_generator("cameras", settings.seed, subject)
        )
        ranges = settings.yaw_range_deg, settings.pitch_range_deg
        drawn = np.array([draw_angles(source, *ranges) for _ in range(num_views)])
        yaw, pitch = drawn[:, 0], drawn[:, 1]
    if settings.parity and given is None:
        yaw_centre, pitch_centre = published_centre(base.rot, extr)
        return pivot_camera(extr, pivot, yaw + yaw_centre, pitch + pitch_centre), yaw, pitch
    frontal = pivot_camera(extr, pivot, *frontal_centre(base.rot, base.tra, extr))
    return pivot_camera(frontal, pivot, yaw, pitch), yaw, pitch


def make_plan(
    references: Sequence[ViewParameters],
    reference_cameras: Sequence[str],
    head: HeadModel,
    template: HeadTemplate,
    settings: SamplingSettings,
    subject: str,
    generation_data: Path,
) -> ViewPlan:
    """The plan of a subject.

    Args:
        references: parameters of the references in the listed order, with crop boxes.
        reference_cameras: their camera names.
        head: head model with the mouth.
        template: its template.
        settings: numbers and ranges.
        subject: name, enters all draws.
        generation_data: gen_data.npz.

    Raises:
        UserError: impossible settings or unusable files.
    """
    given = read_given_views(settings.plan) if settings.plan else None
    requested = settings.num_views if given is None else len(given)
    if requested < 1:
        raise UserError("sampling.num_views = 0: there are no views to plan.")
    per_iteration = views_per_iteration(
        len(references), settings.max_references, settings.views_per_call
    )
    num_views = padded_view_count(requested, settings.num_shards, per_iteration)
    if num_views != requested:
        logger.info(
            "%s: %d views instead of %d, the next multiple of %d shard(s) x %d views per call.",
            subject, num_views, requested, settings.num_shards, per_iteration,
        )  # fmt: skip
    base_index = _choose_base(references, settings)
    base = references[base_index]
    extr, yaw, pitch = view_cameras(base, num_views, settings, subject, given)
    depth = extr[:, 2, :3] @ pivot_of(base.tra) + extr[:, 2, 3]
    if (depth <= 0).any():
        raise UserError(
            f"{settings.plan or 'the planned views'}: the camera of view {int(depth.argmin())} has "
            "the head behind it; cameras look along +z (OpenCV, world-to-camera)."
        )

    rows = np.arange(num_views) % (len(given) if given is not None else num_views)
    if given is not None and given.expressions is not None:
        source = given.expressions
        expression_rows = gaze_rows = rows
    else:
        source = Expressions.read(generation_data, settings.expression_factor)
        if given is not None and given.expression_rows is not None:
            expression_rows = gaze_rows = given.expression_rows[rows]
            if not 0 <= expression_rows.min() <= expression_rows.max() < len(source.expr):
                raise UserError(
                    f"{settings.plan}: expression_row out of range; {generation_data} has rows 0 "
                    f"to {len(source.expr) - 1}."
                )
        else:
            expression_rows, gaze_rows = choose_rows(
                num_views, len(source.expr), settings.seed, subject
            )
    views = [
        replace(
            base,
            expr=source.expr[expression_rows[i]],
            eye_rot=source.eye_rot[gaze_rows[i]],
            extr=extr[i],
            timestep_id=None,
        )
        for i in range(num_views)
    ]
    try:
        views = with_crop_boxes(head, views, template.head_vertex_ids)
    except ValueError as error:
        raise UserError(f"{subject}: a planned view does not show the head ({error}).") from None
    return ViewPlan(
        subject=subject,
        views=tuple(views),
        references=tuple(references),
        reference_cameras=tuple(reference_cameras),
        base_reference=base_index,
        num_requested=requested,
        yaw_deg=np.asarray(yaw, np.float64),
        pitch_deg=np.asarray(pitch, np.float64),
        expression_rows=np.asarray(expression_rows, np.int64),
        gaze_rows=np.asarray(gaze_rows, np.int64),
        parity=settings.parity,
    )


def plan_views(
    tracking_dir: str | Path,
    head_model_dir: str | Path,
    output: str | Path,
    settings: SamplingSettings,
    subject: str,
) -> ViewPlan:
    """Writes plan.npz, and beside it plan.png (view cloud) and plan_conditioning.png (maps).

    Args:
        tracking_dir: tracking folder of the subject.
        head_model_dir: folder written by prepare_head_model.
        output: the plan file.
        settings: numbers and ranges.
        subject: name of the subject; enters all random draws.

    Raises:
        UserError: unusable tracking, head model, table or settings.
    """
    output, head_model_dir = Path(output), Path(head_model_dir)
    tracked = read_tracked_subject(tracking_dir)
    head = HeadModel.load(head_model_dir)
    template = load_flame_template(head_model_dir)
    references = reference_views(tracked, head, template.head_vertex_ids)
    cameras = [reference.camera for reference in tracked.references]
    plan = make_plan(
        references, cameras, head, template, settings, subject, head_model_dir / "gen_data.npz"
    )
    logger.info(
        "%s: %d views around reference %d of %d.",
        subject, len(plan.views), plan.base_reference, len(references),
    )  # fmt: skip
    write_view_cloud(output.with_suffix(".png"), plan)
    write_image(
        output.with_name(f"{output.stem}_conditioning.png"),
        conditioning_picture(plan, head, template),
    )
    write_plan(output, plan)
    return plan


def conditioning_picture(
    plan: ViewPlan, head: HeadModel, template: HeadTemplate
) -> NDArray[np.uint8]:
    """Conditioning maps of the base reference and of a few views, at the released resolution."""
    base = plan.references[plan.base_reference]
    tables = RendererTables.from_template(
        template.vertices, template.faces, template.head_vertex_ids
    )
    config = MMDMConfig()
    renderer = ConditioningRenderer(head, tables, config, np.asarray(base.extr))
    maps: list[Any] = [renderer.maps([base], is_reference=True)]
    for i in evenly_spaced(len(plan.views), 4):
        maps.append(renderer.maps([plan.views[i]], is_reference=False))
    array = np.concatenate([m.cpu().numpy() for m in maps])
    return conditioning_sheet(array, config.conditioning.positional_channels)
