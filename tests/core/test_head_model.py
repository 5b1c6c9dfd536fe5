"""Head model: laws of posing, the mouth, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cap4d_core.flame.model import HeadModel, read_flame_arrays
from cap4d_core.flame.mouth import NUM_MOUTH_VERTICES, half_sphere, half_sphere_faces
from cap4d_core.geometry.rotations import rodrigues
from tests.core.synthetic_head import head_folder


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return HeadModel.load(head_folder(), lower_jaw=True)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return read_flame_arrays(head_folder() / "flame.npz")


def _random(frames: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"expr": 65, "rot": 3, "tra": 3, "eye_rot": 3, "jaw_rot": 3, "neck_rot": 3}
    result = {
        name: torch.randn(frames, size, generator=generator) * 0.3 for name, size in sizes.items()
    }
    return {"shape": torch.randn(150, generator=generator), **result}


def _zeros(frames: int) -> dict[str, Tensor]:
    return {
        "shape": torch.zeros(150),
        "expr": torch.zeros(frames, 65),
        "rot": torch.zeros(frames, 3),
        "tra": torch.zeros(frames, 3),
    }


def test_zero_parameters_give_template_plus_a_constant_offset(
    model: HeadModel, arrays: dict[str, np.ndarray]
) -> None:
    output = model(**_zeros(2))
    constant = -np.einsum("vckii->vc", arrays["posedirs"].reshape(-1, 3, 4, 3, 3))
    assert np.allclose(output.vertices[1, :5023], arrays["v_template"] + constant, atol=1e-6)
    assert np.allclose(output.offsets[1, :5023], constant, atol=1e-6)
    assert (output.offsets[:, 5023:5223] == 0).all()
    # Without an expression the lower part's jaw rotation is exactly the identity.
    assert torch.allclose(output.vertices[:, 5223:], output.vertices[:, 5023:5223], atol=1e-7)


def test_agrees_with_a_plain_evaluation_in_float64(
    model: HeadModel, arrays: dict[str, np.ndarray]
) -> None:
    parameters = _random(2)
    output = model(**parameters)
    p = {name: value.double().numpy() for name, value in parameters.items()}
    a = {name: value.astype(np.float64) for name, value in arrays.items()}
    blink = np.load(head_folder() / "blink_blendshape.npy").astype(np.float64)
    expression = np.concatenate([a["shapedirs"][..., 300:364], blink[..., None]], -1)
    neutral = a["v_template"] + a["shapedirs"][..., :150] @ p["shape"]
    for t in range(2):
        rotation = {
            name: rodrigues(parameters[name][t].double()).numpy()
            for name in ("neck_rot", "jaw_rot", "eye_rot", "rot")
        }
        rotations = [
            rotation["neck_rot"], np.eye(3), rotation["jaw_rot"],
            rotation["eye_rot"], rotation["eye_rot"],
        ]  # fmt: skip
        vertices = neutral + expression @ p["expr"][t]
        features = np.stack([rotations[j] - 2 * np.eye(3) for j in (0, 2, 3, 4)]).ravel()
        corrected = vertices + a["posedirs"] @ features
        posed = np.zeros_like(vertices)
        for joint in range(5):
            pivot = a["J_regressor"][joint] @ vertices
            moved = (corrected - pivot) @ rotations[joint].T + pivot
            posed += a["weights"][:, joint : joint + 1] * moved
        result = posed @ rotation["rot"].T + p["tra"][t]
        assert np.allclose(output.vertices[t, :5023].numpy(), result, atol=1e-6)
        assert np.allclose(output.offsets[t, :5023].numpy(), posed - neutral, atol=1e-6)


def test_transforms_map_corrected_vertices_to_posed_ones(model: HeadModel) -> None:
    parameters = _random(3)
    still = {**parameters, "rot": torch.zeros(3, 3), "tra": torch.zeros(3, 3)}
    posed, local = model(**parameters), model(**still)
    base = torch.zeros(3, 1, 4, 4)
    base[..., :3, :3] = rodrigues(parameters["rot"])[:, None]
    base[..., :3, 3] = parameters["tra"][:, None]
    base[..., 3, 3] = 1
    assert posed.transforms.shape == (3, 5423, 4, 4)
    assert torch.allclose(posed.transforms, base @ local.transforms, atol=1e-6)
    # Skinning weights add up to 1.
    assert torch.allclose(posed.transforms[:, :5023, 3, 3], torch.tensor(1.0), atol=1e-5)
    homogeneous = torch.nn.functional.pad(
        torch.linalg.solve(
            local.transforms[:, :5023],
            torch.nn.functional.pad(local.vertices[:, :5023], (0, 1), value=1.0).unsqueeze(-1),
        ).squeeze(-1)[..., :3],
        (0, 1),
        value=1.0,
    )
    mapped = (posed.transforms[:, :5023] @ homogeneous.unsqueeze(-1)).squeeze(-1)[..., :3]
    assert torch.allclose(mapped, posed.vertices[:, :5023], atol=1e-5)


def test_parts_extend_each_other_and_frames_are_independent(model: HeadModel) -> None:
    parameters = _random(4)
    whole = model(**parameters)
    for kwargs, count in (({"mouth": False}, 5023), ({}, 5223)):
        part = HeadModel.load(head_folder(), **kwargs)
        assert part.num_vertices == count and part.faces.max() < count
        assert torch.equal(part(**parameters).vertices, whole.vertices[:, :count])
    assert model.num_vertices == 5423 and model.faces.max() < 5423
    one = model(**{k: v if k == "shape" else v[2:3] for k, v in parameters.items()})
    # Batched products may be summed in another order.
    assert torch.allclose(one.vertices[0], whole.vertices[2], atol=1e-6)
    per_frame = model(**{**parameters, "shape": parameters["shape"].expand(4, 150)})
    assert torch.allclose(per_frame.vertices, whole.vertices, atol=1e-6)
    assert torch.allclose(per_frame.offsets, whole.offsets, atol=1e-6)


def test_absent_rotations_are_the_identity(model: HeadModel) -> None:
    parameters = _random(2)
    bare = {name: parameters[name] for name in ("shape", "expr", "rot", "tra")}
    zero = torch.zeros(2, 3)
    explicit = model(**bare, eye_rot=zero, jaw_rot=zero, neck_rot=zero)
    assert torch.allclose(model(**bare).vertices, explicit.vertices, atol=1e-7)


def test_blink_replaces_the_last_expression(model: HeadModel) -> None:
    blink = torch.from_numpy(np.load(head_folder() / "blink_blendshape.npy"))
    parameters = _zeros(2)
    parameters["expr"][1, 64] = 0.5
    moved = model(**parameters).offsets[:, :5023]
    assert torch.allclose(moved[1] - moved[0], 0.5 * blink, atol=1e-6)
    plain = HeadModel.load(head_folder(), mouth=False, blink=False)(**parameters).offsets
    assert not torch.allclose(plain[1] - plain[0], 0.5 * blink, atol=1e-6)


def test_neck_rotation_leaves_what_joint_0_does_not_carry(
    model: HeadModel, arrays: dict[str, np.ndarray]
) -> None:
    parameters = _zeros(1)
    turned = model(**parameters, neck_rot=torch.tensor([[0.3, 0.2, 0.1]])).vertices[0, :5023]
    rest = model(**parameters).vertices[0, :5023]
    free = torch.from_numpy(
        (arrays["weights"][:, 0] == 0) & (np.abs(arrays["posedirs"][..., :9]).max((1, 2)) == 0)
    )
    moved = (turned - rest).norm(dim=-1)
    assert moved[torch.from_numpy(arrays["weights"][:, 0] > 0.9)].mean() > 1e-3
    assert not free.any() or torch.allclose(turned[free], rest[free], atol=1e-7)


def test_neutral_is_what_offsets_start_from(model: HeadModel) -> None:
    parameters = _random(2)
    still = {**parameters, "rot": torch.zeros(2, 3), "tra": torch.zeros(2, 3)}
    output = model(**still)
    neutral = model.neutral(parameters["shape"])
    assert neutral.shape == (5423, 3)
    assert torch.allclose(output.vertices - output.offsets, neutral.expand(2, -1, -1), atol=1e-6)
    assert model.neutral(parameters["shape"].expand(2, 150)).shape == (2, 5423, 3)


def test_gradients_reach_every_parameter_and_agree_with_differences(model: HeadModel) -> None:
    names = ("shape", "expr", "rot", "tra", "eye_rot", "jaw_rot", "neck_rot")
    double = HeadModel.load(head_folder(), lower_jaw=True).double()
    values = {name: value.double() for name, value in _random(1).items()}
    inputs = [values[name].requires_grad_() for name in names]
    weights = torch.randn(5423, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(*arguments: Tensor) -> Tensor:
        output = double(**dict(zip(names, arguments, strict=True)))
        return (output.vertices[0] * weights).sum() + (output.offsets[0] * weights).sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for position, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        assert gradient.abs().max() > 0, name
        step = torch.randn_like(gradient) * 1e-6
        moved = [value.detach().clone() for value in inputs]
        moved[position] += step
        forward = loss(*moved)
        moved[position] -= 2 * step
        numeric = (forward - loss(*moved)) / 2
        assert torch.allclose(numeric, (gradient * step).sum(), rtol=1e-4, atol=1e-10), name
    zero = [torch.zeros_like(value).requires_grad_() for value in inputs]
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss(*zero), zero))


def test_sizes_up_to_the_full_basis() -> None:
    full = HeadModel.load(head_folder(), num_shape=300, num_expr=100, mouth=False, blink=False)
    output = full(torch.ones(300), torch.ones(1, 100), torch.zeros(1, 3), torch.zeros(1, 3))
    assert torch.isfinite(output.vertices).all()
    with pytest.raises(ValueError, match="num_shape 301"):
        HeadModel.load(head_folder(), num_shape=301)
    with pytest.raises(ValueError, match="set mouth=True"):
        HeadModel.load(head_folder(), mouth=False, lower_jaw=True)
    with pytest.raises(ValueError, match="one row of its jaw regressor"):
        HeadModel.load(head_folder(), num_expr=40, lower_jaw=True)


def test_half_sphere_is_closed_and_faces_outwards() -> None:
    points, faces = half_sphere(), half_sphere_faces()
    assert len(points) == NUM_MOUTH_VERTICES and faces.shape == (340, 3)
    assert np.allclose(np.linalg.norm(points, axis=1), 1.0)
    assert np.allclose(points[:20], [0, 0, -1])
    assert np.allclose(points[0::20], points[19::20], atol=1e-12)
    # Turned half about x (as placed), so that the pole points to +z, normals keep one side.
    corners = (points * [1, -1, -1])[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = (normals * corners.mean(1)).sum(-1)
    solid = np.linalg.norm(normals, axis=1) > 1e-12
    assert (np.sign(facing[solid]) == np.sign(facing[solid][0])).all()


def test_loading_reports_the_file(tmp_path: Path) -> None:
    from cap4d_core.errors import InputFileError

    with pytest.raises(InputFileError, match=r"flame\.npz"):
        HeadModel.load(tmp_path)
