"""Avatar: binding to the mesh, saving, import of released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cap4d_core.avatar.checkpoints import find_released_checkpoint, import_released_checkpoint
from cap4d_core.avatar.gaussians import (
    NECK_LIMIT,
    GaussianAvatar,
    PosedGaussians,
    head_template,
    relative_neck_rotation,
)
from cap4d_core.avatar.uv_grid import UVGrid
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.rotations import so3_exp
from cap4d_core.job import Job
from cap4d_core.settings import FittingSettings
from tests.core.synthetic_head import head_folder
from workflow_scripts import import_avatar as import_script

SETTINGS = FittingSettings(
    uv_resolution=32, deform_net_channels=4, deform_net_layers=3, num_gaussians_init=2000
)
SHAPE = torch.linspace(-1, 1, 150)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return HeadModel.load(head_folder(), lower_jaw=True)


@pytest.fixture
def avatar(head: HeadModel) -> GaussianAvatar:
    return GaussianAvatar.create(head, SHAPE, SETTINGS)


def _frames(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    expr = torch.randn(count, 65, generator=generator)
    return expr, 0.2 * torch.randn(count, 3, generator=generator)


def _perturb(avatar: GaussianAvatar) -> None:
    """Makes every part of the avatar count."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in avatar.splats.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for parameter in avatar.deformation.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        avatar.rest_neck.copy_(torch.tensor([0.05, -0.02, 0.01]))
    avatar.active_sh_degree = 2


def _same(a: PosedGaussians, b: PosedGaussians, tolerance: float = 0.0) -> bool:
    names = ("means", "quats", "scales", "opacities", "sh", "vertices")
    return all(torch.allclose(getattr(a, n), getattr(b, n), atol=tolerance) for n in names)


def test_sizes(avatar: GaussianAvatar) -> None:
    expr, eyes = _frames()
    posed = avatar.pose(expr, eyes)
    count = len(avatar.splats)
    assert posed.means.shape == (2, count, 3) and posed.quats.shape == (2, count, 4)
    assert posed.scales.shape == (2, count, 3) and posed.opacities.shape == (count,)
    assert posed.sh.shape == (count, 16, 3)
    assert posed.vertices.shape == (2, avatar.uv_resolution**2, 3)
    assert avatar.grid_faces.max() < avatar.uv_resolution**2
    assert torch.bincount(avatar.binding, minlength=len(avatar.grid_faces)).min() >= 2


def test_fresh_splats_lie_on_their_faces(avatar: GaussianAvatar, head: HeadModel) -> None:
    """On the mesh they were sampled on (the rest template), inside the triangle."""
    template = head_template(head)
    rest = avatar.grid.interpolate(torch.from_numpy(template.vertices).float()[None])
    corners = rest.view(-1, 3)[avatar.grid_faces[avatar.binding]]
    from cap4d_core.avatar.face_frames import face_frames
    from cap4d_core.avatar.gaussians import world_splats

    frames = face_frames(rest.view(1, -1, 3), avatar.grid_faces)
    points = world_splats(avatar.splats, frames)[0][0]
    # Barycentrics by areas: sums to one and nowhere negative.
    v0, v1, v2 = corners.unbind(1)
    area = torch.linalg.cross(v1 - v0, v2 - v0).norm(dim=-1)
    parts = sum(
        torch.linalg.cross(a - points, b - points).norm(dim=-1)
        for a, b in ((v0, v1), (v1, v2), (v2, v0))
    )
    regular = area > 1e-9  # slivers have no usable frame
    assert regular.float().mean() > 0.95
    assert torch.allclose(parts[regular] / area[regular], torch.ones(int(regular.sum())), atol=0.02)


def test_empty_pixels_stay_zero(avatar: GaussianAvatar) -> None:
    _perturb(avatar)
    empty = ~avatar.grid.uv_mask.view(-1)
    assert empty.any()
    assert (avatar.pose(*_frames()).vertices[:, empty] == 0).all()


def test_splats_follow_the_mesh_rigidly(avatar: GaussianAvatar) -> None:
    """A head turned as a whole turns its splats."""
    _perturb(avatar)
    expr, eyes = _frames(1)
    neck = torch.zeros(1, 3)
    turn = so3_exp(torch.tensor([0.2, 0.4, -0.1]))
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    still = avatar.pose_maps(avatar.head_maps(expr, eyes, neck))
    maps = avatar.head_maps(expr, eyes, neck)
    rotation = flip @ turn @ flip
    maps.positions = maps.positions @ rotation.T
    # The network's offsets live in head axes; without them the mesh turns as a whole.
    with torch.no_grad():
        avatar.deformation.last_layer.weight.zero_()
        avatar.deformation.last_layer.bias.zero_()
    still, moved = avatar.pose_maps(avatar.head_maps(expr, eyes, neck)), avatar.pose_maps(maps)
    assert torch.allclose(moved.means, still.means @ rotation.T, atol=1e-5)
    assert torch.allclose(moved.scales, still.scales, atol=1e-6)


def test_batch_equals_single_frames(avatar: GaussianAvatar) -> None:
    _perturb(avatar)
    expr, eyes = _frames(3)
    together = avatar.pose(expr, eyes)
    for i in range(3):
        alone = avatar.pose(expr[i : i + 1], eyes[i : i + 1])
        assert torch.allclose(together.means[i], alone.means[0], atol=1e-5)
        assert torch.allclose(together.vertices[i], alone.vertices[0], atol=1e-6)


def test_without_expression_nothing_differs_from_neutral(avatar: GaussianAvatar) -> None:
    _perturb(avatar)
    zero = torch.zeros(1, 65)
    posed = avatar.pose(zero, torch.zeros(1, 3), with_regularisers=True)
    assert posed.means_neutral is not None
    # The lower jaw's offset is rounding noise, not zero.
    assert torch.allclose(posed.means, posed.means_neutral, atol=1e-5)


def test_gradients_reach_everything_that_learns(avatar: GaussianAvatar) -> None:
    _perturb(avatar)
    expr, eyes = _frames()
    neck = torch.zeros(2, 3, requires_grad=True)
    posed = avatar.pose(expr, eyes, neck)
    values = (posed.means, posed.quats[..., 1:], posed.scales, posed.opacities, posed.sh)
    sum(v.square().sum() for v in values).backward()  # type: ignore[union-attr]
    learned = [*avatar.splats.parameters(), *avatar.deformation.parameters(), neck]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
    assert neck.grad is not None and neck.grad.abs().max() > 0
    assert avatar.splats.xyz.grad is not None and avatar.splats.xyz.grad.abs().max() > 0


def test_same_seed_same_avatar(head: HeadModel) -> None:
    a, b = (GaussianAvatar.create(head, SHAPE, SETTINGS) for _ in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = GaussianAvatar.create(head, SHAPE, SETTINGS.model_copy(update={"seed": 1}))
    assert not torch.equal(a.splats.xyz, other.splats.xyz)


def test_save_and_load(avatar: GaussianAvatar, head: HeadModel, tmp_path: Path) -> None:
    _perturb(avatar)
    avatar.meta = {"note": "kept"}
    avatar.save(tmp_path)
    loaded = GaussianAvatar.load(tmp_path, head)
    assert _same(avatar.pose(*_frames()), loaded.pose(*_frames()))
    assert loaded.active_sh_degree == 2 and loaded.meta["note"] == "kept"


def test_avatar_of_another_head_model_is_refused(
    avatar: GaussianAvatar, head: HeadModel, tmp_path: Path
) -> None:
    avatar.save(tmp_path)
    import json

    description = json.loads((tmp_path / "avatar.json").read_text())
    description["uv_resolution"] = 16
    (tmp_path / "avatar.json").write_text(json.dumps(description))
    with pytest.raises(InputFileError, match="triangles"):
        GaussianAvatar.load(tmp_path, head)
    with pytest.raises(InputFileError, match="lower jaw"):
        GaussianAvatar.load(tmp_path, HeadModel.load(head_folder()))
    (tmp_path / "avatar.safetensors").write_bytes(b"torn")
    description["uv_resolution"] = 32
    (tmp_path / "avatar.json").write_text(json.dumps(description))
    with pytest.raises(InputFileError, match="unreadable"):
        GaussianAvatar.load(tmp_path, head)


def test_too_many_layers_are_explained(head: HeadModel) -> None:
    settings = SETTINGS.model_copy(update={"deform_net_layers": 6})
    with pytest.raises(UserError, match="at most 5"):
        GaussianAvatar.create(head, SHAPE, settings)


def test_without_lower_jaw_its_triangles_are_left_out() -> None:
    head = HeadModel.load(head_folder())
    settings = SETTINGS.model_copy(update={"use_lower_jaw": False})
    smaller = GaussianAvatar.create(head, SHAPE, settings)
    both = UVGrid(head_template(head), settings.uv_resolution)
    assert 0 < len(smaller.grid_faces) < len(both.faces)
    smaller.pose(*_frames())


def test_relative_neck_is_limited() -> None:
    rot = torch.tensor([[0.0, 0, 0], [0, 0.05, 0], [0, 2.0, 0]])
    neck = relative_neck_rotation(rot, torch.zeros(3))
    assert torch.allclose(neck[0], torch.zeros(3), atol=1e-7)
    assert float(neck[1, 1]) == pytest.approx(-0.05, rel=0.05)
    assert float(neck[2, 1]) == pytest.approx(-NECK_LIMIT, rel=1e-3)


def _released(avatar: GaussianAvatar, as_numpy: bool) -> tuple[dict[str, object], int]:
    """The layout of a released checkpoint."""
    s, n = avatar.splats, len(avatar.splats)
    capture = (
        2, s.xyz, s.f_dc, s.f_rest, s.scaling, s.rotation, s.opacity, s.binding,
        s.binding_counter, torch.zeros(n), torch.zeros(n, 1), torch.zeros(n, 1),
        {"state": {}, "param_groups": [{"lr": 0.0, "params": [0]}]}, 1,
    )  # fmt: skip
    shape: object = avatar.shape.numpy() if as_numpy else avatar.shape
    base = np.zeros(3, np.float32) if as_numpy else torch.zeros(3)
    network = avatar.deformation.state_dict()
    return {
        "shape": shape, "base_rot": base, "deform_net": network, "gaussians": capture
    }, 1000  # fmt: skip


def _as_if_released(head: HeadModel) -> GaussianAvatar:
    settings = SETTINGS.model_copy(update={"uv_resolution": 64, "deform_net_layers": 6})
    source = GaussianAvatar.create(head, SHAPE, settings)
    # Released meshes stitch islands.
    grid = UVGrid(head_template(head), 64, separate_islands=False)
    source.grid = grid
    source.splats.binding_counter = torch.zeros(len(grid.faces), dtype=torch.int32)
    _perturb(source)
    source.rest_neck.zero_()
    return source


def test_import_job(head: HeadModel, tmp_path: Path) -> None:
    """A released checkpoint, and what was made of it, through the workflow's script."""
    source = _as_if_released(head)
    (tmp_path / "released").mkdir()
    torch.save(_released(source, False), tmp_path / "released" / "chkpnt1000.pth")

    def job(where: str, to: str, lower_jaw: bool = True) -> Job:
        outputs = {
            "avatar": [str(tmp_path / to / "avatar.safetensors")],
            "description": [str(tmp_path / to / "avatar.json")],
        }
        inputs = {"source": [str(tmp_path / where)], "head_model": [str(head_folder())]}
        return Job("import_avatar", inputs, outputs, {"lower_jaw": lower_jaw})

    import_script.main(job("released", "first"))
    import_script.main(job("first", "second"))
    for folder, origin in (("first", "chkpnt1000.pth"), ("second", "avatar.safetensors")):
        loaded = GaussianAvatar.load(tmp_path / folder, head)
        assert _same(source.pose(*_frames()), loaded.pose(*_frames()))
        note = json.loads((tmp_path / folder / "avatar.json").read_text())
        assert note["imported_from"]["source"].endswith(origin) and note["iteration"] == 1000
    with pytest.raises(InputFileError, match="lower jaw"):
        import_script.main(job("first", "third", lower_jaw=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="a folder without an avatar"):
        import_script.main(job("empty", "third"))
    with pytest.raises(InputFileError, match="nothing there"):
        import_script.main(job("nowhere", "third"))
    (tmp_path / "first" / "avatar.safetensors").unlink()
    with pytest.raises(InputFileError, match=r"avatar\.json without avatar\.safetensors"):
        import_script.main(job("first", "third"))


@pytest.mark.parametrize("as_numpy", [False, True])
def test_released_checkpoint(head: HeadModel, tmp_path: Path, as_numpy: bool) -> None:
    source = _as_if_released(head)
    torch.save(_released(source, as_numpy), tmp_path / "chkpnt1000.pth")
    torch.save(("older",), tmp_path / "chkpnt999.pth")
    assert find_released_checkpoint(tmp_path).name == "chkpnt1000.pth"
    imported = import_released_checkpoint(tmp_path, head)
    assert imported.uv_resolution == 64 and imported.active_sh_degree == 2
    assert _same(source.pose(*_frames()), imported.pose(*_frames()))
    imported.save(tmp_path / "saved")
    loaded = GaussianAvatar.load(tmp_path / "saved", head)
    assert _same(imported.pose(*_frames()), loaded.pose(*_frames()))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))  # type: ignore[return-value]


def test_other_files_are_refused(avatar: GaussianAvatar, head: HeadModel, tmp_path: Path) -> None:
    torch.save(_Harmful(), tmp_path / "chkpnt1.pth")
    with pytest.raises(InputFileError, match="unreadable"):
        import_released_checkpoint(tmp_path, head)
    assert not Path("harm").exists()
    torch.save(({"shape": SHAPE}, 3), tmp_path / "chkpnt2.pth")
    with pytest.raises(InputFileError, match="another layout"):
        import_released_checkpoint(tmp_path, head)
    content, iteration = _released(avatar, False)
    capture = list(content["gaussians"])  # type: ignore[call-overload]
    capture[8] = torch.zeros(77)
    torch.save(({**content, "gaussians": tuple(capture)}, iteration), tmp_path / "chkpnt3.pth")
    with pytest.raises(InputFileError, match="binding"):
        import_released_checkpoint(tmp_path, head)
    with pytest.raises(InputFileError, match=r"no chkpnt"):
        find_released_checkpoint(tmp_path / "nowhere")
