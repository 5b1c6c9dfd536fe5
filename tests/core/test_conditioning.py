"""Conditioning maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cap4d_core.diffusion.conditioning import (
    ConditioningRenderer,
    RenderedViews,
    RendererTables,
    conditioning_maps,
)
from cap4d_core.diffusion.embeddings import encode_positions
from cap4d_core.diffusion.frames import reference_views
from cap4d_core.diffusion.model_config import ConditioningConfig, MMDMConfig
from cap4d_core.diffusion.view_cloud import FLIP, head_rotation
from cap4d_core.errors import UserError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import read_tracked_subject
from tests.core.sampling_fixtures import TINY, head, template, world

SIZE = 8


def square_tables(shown: bool = True) -> RendererTables:
    """Two triangles that cover everything at depth 1, and one small masked one before them."""
    return RendererTables(
        torch.tensor([[0, 2, 1], [2, 3, 1], [4, 6, 5]]),
        torch.tensor([True, True, not shown]),
        torch.tensor(
            [[-1.0, 0, 0], [1, 0, 0], [-1, 0.5, 0], [1, 0.5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
        ),
        2.0 ** torch.arange(7),
    )


# Corners left to right (+x is left), top to bottom; no pixel centre lies on the diagonal.
SQUARE = torch.tensor(
    [[1.5, 1.3, 1], [-1.5, 1.3, 1], [1.5, -1.3, 1], [-1.5, -1.3, 1],
     [0.5, 0.5, 0.5], [-0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]
)[None]  # fmt: skip


def maps(
    tables: RendererTables, offsets: torch.Tensor | None = None, scale: int = 2
) -> torch.Tensor:
    empty = torch.zeros(1, SIZE, SIZE)
    return conditioning_maps(
        SQUARE, torch.zeros_like(SQUARE) if offsets is None else offsets,
        torch.arange(3.0)[None, :, None, None].expand(1, 3, SIZE, SIZE), empty + 1, empty,
        tables, ConditioningConfig(super_resolution=scale),
    )  # fmt: skip


def test_channels_of_a_known_surface() -> None:
    result = maps(square_tables(shown=False), SQUARE * 0 + 0.0104, scale=1)
    assert result.shape == (1, SIZE, SIZE, 50)
    # Linear interpolation of props over the square: x from -1 to 1 over [-1.5, 1.5].
    centre = 1 - (2 * torch.arange(SIZE) + 1) / SIZE
    x = -centre / 1.5
    expected = encode_positions(torch.stack([x, 0 * x, 0 * x], -1))  # x comes first
    row = SIZE - 1  # below the masked triangle
    torch.testing.assert_close(result[0, row, :, :14], expected[:, :14], atol=1e-4, rtol=0)
    torch.testing.assert_close(result[0, row, :, 42:45], torch.ones(SIZE, 3))
    torch.testing.assert_close(result[0, 2, 2, 45:], torch.tensor([0.0, 1, 2, 1, 0]))


def test_masked_faces_occlude() -> None:
    hidden, visible = maps(square_tables(shown=True)), maps(square_tables(shown=False))
    # Face 2 is shown in one table set and masked in the other; it hides the square in both.
    different = (hidden - visible)[0, ..., :45].abs().amax(-1) > 0.1
    assert different.any() and not different[-1].any()
    covered = [(m[0, ..., :45] ** 2).sum(-1) > 0 for m in (hidden, visible)]
    assert covered[0].sum() != covered[1].sum()


def test_encoding_comes_before_averaging() -> None:
    fine, coarse = maps(square_tables(), scale=1), maps(square_tables(), scale=4)
    # sin(64 x) averages out over 4 pixels but not in one sample.
    row = SIZE - 1
    assert coarse[0, row, :, 6].abs().mean() < 0.5 * fine[0, row, :, 6].abs().mean()


def test_template_tables() -> None:
    vertices = np.random.default_rng(0).normal(size=(300, 3))
    faces = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 250]])
    tables = RendererTables.from_template(vertices, faces, [2, 9])
    assert float(tables.props.max()) == 1.0  # the signed maximum, so less than -1 may occur
    np.testing.assert_allclose(tables.props.mean(0), 0, atol=1e-6)
    # Any corner counts; the last 200 vertices are the mouth.
    assert tables.face_mask.tolist() == [True, False, True]


@pytest.fixture(scope="module")
def references() -> list[ViewParameters]:
    return reference_views(
        read_tracked_subject(world().tracking), head(), template().head_vertex_ids
    )


def renderer(references: list[ViewParameters], config: MMDMConfig = TINY) -> ConditioningRenderer:
    tables = RendererTables.from_template(
        template().vertices, template().faces, template().head_vertex_ids
    )
    return ConditioningRenderer(head(), tables, config, references[0].extr)


def test_references_and_views(references: list[ViewParameters]) -> None:
    r = renderer(references)
    latents = torch.randn(2, 4, 8, 8)
    ref = r.references(references[:2], latents)
    assert ref.pos_enc.shape == (2, 8, 8, 50) and torch.equal(ref.z_input, latents)
    assert ref.ref_mask.all() and ref.pos_enc[..., 48].eq(1).all()
    views = RenderedViews(r, references)
    gen = views.index([1, 0])
    assert not gen.ref_mask.any() and not gen.z_input.any()
    assert gen.pos_enc[..., 48].eq(0).all() and gen.pos_enc[..., 49].eq(1).all()
    torch.testing.assert_close(gen.pos_enc[0, ..., :48], ref.pos_enc[1, ..., :48])


def test_bits_do_not_depend_on_what_is_asked_for_together(
    references: list[ViewParameters],
) -> None:
    r = renderer(references)
    kept, bare = RenderedViews(r, references), RenderedViews(r, references, cache_bytes=0)
    expected = bare.index(slice(None)).pos_enc
    for ids in ([3], [1, 3], [0, 1, 2, 3, 3], [2]):
        for source in (kept, bare):
            assert torch.equal(source.index(ids).pos_enc, expected[ids])


def test_moving_head_and_camera_together_changes_nothing(
    references: list[ViewParameters],
) -> None:
    view = replace(references[0], rot=np.zeros(3, np.float32))
    turn = np.array([0.2, 0.5, -0.1])
    rotation = head_rotation(turn)
    world_turn = np.eye(4)
    world_turn[:3, :3] = FLIP[:, None] * rotation * FLIP  # the same turn in OpenCV axes
    moved = replace(
        view,
        rot=turn.astype(np.float32),
        tra=(rotation @ view.tra).astype(np.float32),
        extr=np.asarray(view.extr, np.float64) @ world_turn.T,
    )
    tables = renderer(references).tables
    still, turned = (
        ConditioningRenderer(head(), tables, TINY, v.extr).maps([v], False) for v in (view, moved)
    )
    error = (still - turned).abs()
    # Float32 noise of the vertices moves single silhouette pixels of 16 x 16.
    assert float(error.mean()) < 1e-3 and float(error[..., 45:].max()) < 1e-5


def test_model_and_head_must_fit(references: list[ViewParameters]) -> None:
    r = renderer(references)
    few = replace(r.tables, props=r.tables.props[:100])
    with pytest.raises(UserError, match="100 head vertices"):
        ConditioningRenderer(head(), few, TINY, np.eye(4))
    with pytest.raises(UserError, match="51 condition channels"):
        ConditioningRenderer(
            head(), r.tables, TINY.model_copy(update={"condition_channels": 51}), np.eye(4)
        )
