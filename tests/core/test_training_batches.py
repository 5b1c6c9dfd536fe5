"""Training frames and batches say what the sampler says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cap4d_core.diffusion.conditioning import ConditioningRenderer, RendererTables
from cap4d_core.diffusion.frames import crop_mask, with_crop_boxes
from cap4d_core.diffusion.schedule import NoiseSchedule
from cap4d_core.diffusion.training.batches import (
    BatchSource,
    DrawSettings,
    TrainingBatch,
    batch_maps,
)
from cap4d_core.diffusion.training.frame_maps import ViewBatch, crop_masks, frames_of
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.diffusion.training.objective import DenoisingLoss
from cap4d_core.diffusion.view_cloud import pivot_of
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.geometry.cameras import pivot_camera
from tests.core.sampling_fixtures import TINY, world


def turned_views(num: int, seed: int = 0) -> tuple[list[ViewParameters], RendererTables, HeadModel]:
    """A head seen by cameras that went round it, with expressions; some leave the picture."""
    rng = np.random.default_rng(seed)
    folder = world().head_model
    head, template = HeadModel.load(folder), load_flame_template(folder)
    tra = np.array([0.03, -0.02, -1.0])
    extr = pivot_camera(
        np.eye(4), pivot_of(tra), rng.uniform(-30, 30, num), rng.uniform(-9, 9, num)
    )
    views = [
        ViewParameters(
            shape=np.linspace(-1, 1, 150).astype(np.float32),
            expr=rng.normal(size=65).astype(np.float32),
            rot=rng.normal(size=3).astype(np.float32) * 0.2,
            tra=tra,
            eye_rot=rng.normal(size=3).astype(np.float32) * 0.1,
            fx=400.0,
            fy=410.0,
            cx=50.0,
            cy=80.0,
            extr=extr[i],
            resolution=(120, 110),
            crop_box=(0, 0, 1, 1),
        )
        for i in range(num)
    ]
    views = with_crop_boxes(head, views, template.head_vertex_ids)
    tables = RendererTables.from_template(
        template.vertices, template.faces, template.head_vertex_ids
    )
    return views, tables, head


def random_table(counts: tuple[int, ...] = (5, 3), seed: int = 0) -> FrameTable:
    """Random frames with latents."""
    g = torch.Generator().manual_seed(seed)
    n, s, c = sum(counts), TINY.latent_size, TINY.in_channels
    eye = torch.linalg.qr(torch.randn(n, 3, 3, generator=g)).Q
    return FrameTable(
        surface=torch.rand(n, s, s, TINY.condition_channels - 5, generator=g).half() + 0.5,
        crop_masks=torch.randint(0, 2, (n, s, s), generator=g).to(torch.uint8),
        intrinsics=torch.rand(n, 4, generator=g) + 4,
        cameras=eye,
        heads=eye.flip(0),
        starts=torch.tensor([0, *np.cumsum(counts)]),
        means=torch.arange(n).float()[:, None, None, None].expand(n, c, s, s).half(),
        stds=torch.zeros(n, c, s, s).half(),
    )


def source(table: FrameTable | None = None, seed: int = 0, **settings: object) -> BatchSource:
    drawn = DrawSettings(**{"reference_weights": [1, 1], "dropout": 0.0, **settings})  # type: ignore[arg-type]
    return BatchSource(table or random_table(), TINY, drawn, seed)


def drawn_frames(batch: TrainingBatch) -> torch.Tensor:
    """(b, V) frame numbers, which the means hold."""
    return batch.clean[:, :, 0, 0, 0].div(TINY.autoencoder.scaling_factor).round().long()


def test_maps_are_those_of_the_sampler() -> None:
    views, tables, head = turned_views(3)
    table = frames_of(ViewBatch.of(views, "cpu"), None, torch.tensor([0, 3]), head, tables, TINY)
    frames = torch.arange(3)[None]
    is_reference = torch.tensor([[True, True, False]])
    made = batch_maps(table, frames, is_reference, torch.zeros_like(is_reference))[0]
    renderer = ConditioningRenderer(head, tables, TINY, views[0].extr)
    expected = torch.cat([renderer.maps([v], is_reference=i < 2) for i, v in enumerate(views)])
    # Surface maps are kept in half precision (1e-3 of values up to about 1, offsets up to 4).
    torch.testing.assert_close(made[..., :45], expected[..., :45], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(made[..., 45:], expected[..., 45:], rtol=0, atol=1e-5)


def test_crop_masks_are_those_of_the_references() -> None:
    views, _, _ = turned_views(6, seed=2)
    views = [replace(v, crop_box=(-40, -20, 60, 80)) for v in views[:1]] + views
    made = crop_masks(ViewBatch.of(views, "cpu"), 16).numpy()
    assert 0 < made[0].mean() < 1
    for mask, view in zip(made, views, strict=True):
        np.testing.assert_array_equal(mask, crop_mask(view.resolution, view.crop_box, 16))


def test_turned_cameras_say_the_same_as_turned_heads() -> None:
    """A head that turns before a still camera, described as a camera that goes round the head."""
    views, tables, head = turned_views(3)
    base = views[0]
    still = replace(base, rot=np.zeros(3, np.float32))
    from cap4d_core.geometry.rotations import rodrigues

    turn = rodrigues(torch.as_tensor(views[1].rot)).numpy().astype(np.float64)
    flip = np.diag([1.0, -1.0, -1.0])
    rotated = flip @ turn @ flip
    # The same relative pose from a moved camera: extr' = extr [R t] about the head's origin.
    extr = np.asarray(base.extr).copy()
    pivot = pivot_of(base.tra)
    moved = extr.copy()
    moved[:3, :3] = extr[:3, :3] @ rotated
    moved[:3, 3] = extr[:3, :3] @ (pivot - rotated @ pivot) + extr[:3, 3]
    turned_head = replace(still, rot=views[1].rot, expr=views[1].expr)
    turned_camera = replace(still, extr=moved, expr=views[1].expr)
    ids = load_flame_template(world().head_model).head_vertex_ids
    pair = with_crop_boxes(head, [still, turned_head, turned_camera], ids)
    assert pair[1].crop_box == pair[2].crop_box
    table = frames_of(ViewBatch.of(pair, "cpu"), None, torch.tensor([0, 3]), head, tables, TINY)
    frames, none = torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.bool)
    described = torch.tensor([[False, True, False]])
    maps = batch_maps(table, frames, none, described)[0]
    torch.testing.assert_close(maps[1, ..., 45:], maps[2, ..., 45:], rtol=0, atol=1e-4)
    plain = batch_maps(table, frames, none, none)[0]
    assert (plain[1, ..., 45:48] - maps[1, ..., 45:48]).abs().max() > 0.02


def test_samples_hold_different_frames_of_one_subject() -> None:
    batch = source().draw(0, 64)
    frames = drawn_frames(batch)
    first = frames < 5
    assert bool((first.all(1) == first.any(1)).all())
    assert bool(first.any()) and not bool(first.all())
    for row in frames[first.all(1)].tolist():
        assert len(set(row)) == TINY.views_per_call
    # Three frames for four views: one comes twice.
    for row in frames[~first.any(1)].tolist():
        assert len(set(row)) == 3


def test_references_come_first_and_hold_their_latents() -> None:
    batch = source(reference_weights=[1, 1, 2]).draw(3, 200)
    mask = batch.conditioning.ref_mask[:, :, 0, 0, 0]
    counts = mask.sum(1)
    assert set(counts.tolist()) == {1.0, 2.0, 3.0}
    assert bool((mask == (torch.arange(4) < counts[:, None])).all())
    assert 0.4 < (counts == 3).float().mean() < 0.6
    held = batch.conditioning.z_input
    factor = TINY.autoencoder.scaling_factor
    torch.testing.assert_close(held, batch.clean * mask[..., None, None, None])
    assert float(batch.clean.max()) == pytest.approx(7 * factor)


def test_dropped_samples_are_the_unconditional_branch_of_the_sampler() -> None:
    kept = source(seed=4).draw(0, 32)
    dropped = source(seed=4, dropout=1.0).draw(0, 32)
    expected = kept.conditioning.unconditional()
    for name in ("pos_enc", "z_input", "ref_mask"):
        assert torch.equal(getattr(dropped.conditioning, name), getattr(expected, name))
    assert torch.equal(dropped.clean, kept.clean)
    some = source(seed=4, dropout=0.3).draw(0, 400).conditioning.pos_enc.flatten(1).abs().amax(1)
    assert 0.2 < float((some == 0).float().mean()) < 0.4


def test_draws_depend_on_seed_rank_and_number_only() -> None:
    a, b = source().draw(7, 4), source().draw(7, 4)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.clean, b.clean)
    other = BatchSource(random_table(), TINY, DrawSettings([1, 1], 0.0), 0, rank=1)
    for changed in (source().draw(8, 4), source(seed=1).draw(7, 4), other.draw(7, 4)):
        assert not torch.equal(a.noise, changed.noise)


def test_frontal_first() -> None:
    table = random_table((6,))
    facing = (table.cameras @ table.heads)[:, 2, 2]
    batch = source(table, frontal_first=1.0).draw(0, 50)
    frames = drawn_frames(batch)
    assert bool((facing[frames].argmax(1) == 0).all())
    assert bool((frames.sort(1).values.diff(dim=1) > 0).all())


def test_only_generated_views_count() -> None:
    batch = source().draw(0, 8)
    objective = DenoisingLoss(NoiseSchedule(TINY.schedule))
    mask = batch.conditioning.ref_mask

    def off_by(value: float, where: torch.Tensor) -> float:
        return float(objective(lambda x, t, c: batch.noise + value * where, batch))

    assert off_by(3.0, mask) == 0.0
    assert off_by(3.0, 1 - mask) == pytest.approx(9.0)


def test_min_snr_weights() -> None:
    schedule = NoiseSchedule(TINY.schedule)
    snr = schedule.alphas_cumprod_f64 / (1 - schedule.alphas_cumprod_f64)
    weights = DenoisingLoss(schedule, "min_snr", 5.0).weights.numpy()
    np.testing.assert_allclose(weights[snr <= 5], 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights[snr > 5], 5.0 / snr[snr > 5], rtol=1e-5)
    assert weights.min() < 0.1


def test_weights_below_the_floor() -> None:
    """Errors of the clean views count alike below the floor, up to a largest weight."""
    schedule = NoiseSchedule(TINY.schedule)
    snr = schedule.alphas_cumprod_f64 / (1 - schedule.alphas_cumprod_f64)
    weights = DenoisingLoss(schedule, "min_snr", 5.0, 0.25).weights.numpy()
    low = (snr < 0.25) & (snr > 0.0026)
    np.testing.assert_allclose((weights * snr)[low], 0.25, rtol=1e-5)
    np.testing.assert_allclose(weights[snr < 0.0024], 100.0)
    plain = DenoisingLoss(schedule, "min_snr", 5.0).weights.numpy()
    np.testing.assert_array_equal(weights[snr > 0.26], plain[snr > 0.26])


def test_noise_follows_the_schedule() -> None:
    schedule = NoiseSchedule(TINY.schedule)
    batch = source().draw(0, 8)
    noised = DenoisingLoss(schedule).noised(batch)
    abar = torch.from_numpy(schedule.alphas_cumprod)[batch.timesteps][..., None, None, None]
    torch.testing.assert_close(noised, abar.sqrt() * batch.clean + (1 - abar).sqrt() * batch.noise)


def test_refusals() -> None:
    with pytest.raises(UserError, match="two frames"):
        source(random_table((4, 1)))
    with pytest.raises(UserError, match="at least one view must be generated"):
        source(reference_weights=[1, 1, 1, 1])


def test_tables_survive_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = random_table()
    table.write(tmp_path / "a.safetensors", {"k": "v"})
    back, metadata = FrameTable.read(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"} and back.images is None
    joined = FrameTable.cat([back, table.subjects(1, 2)])
    assert joined.counts().tolist() == [5, 3, 3]
    assert torch.equal(joined.surface[8:], table.surface[5:])
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputFileError):
        FrameTable.read(tmp_path / "b.safetensors")
