"""Parity of the avatar's geometry: UV grid, binding, initial splats, meshes, frames, losses."""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.avatar import losses
from cap4d_core.avatar.deformation import DeformationUNet
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.face_frames import FaceFrames
from cap4d_core.avatar.gaussians import (
    GaussianAvatar,
    initial_splats,
    relative_neck_rotation,
    world_splats,
)
from cap4d_core.avatar.uv_grid import UVGrid, splats_per_face
from cap4d_core.flame.template import load_avatar_template
from cap4d_core.settings import FittingSettings
from tests.parity.goldens import Golden, adapter
from tests.parity.head import load_head, prepared_head

PARITY = FittingSettings(parity=True)


def tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array))


def number(golden: Golden, name: str) -> int:
    return int(golden.input(name).reshape(-1)[0])


@functools.cache
def grid_of(head_folder: Path, resolution: int) -> UVGrid:
    return UVGrid(load_avatar_template(prepared_head(head_folder)), resolution, parity=True)


def rest_map(golden: Golden, grid: UVGrid) -> Tensor:
    template = load_avatar_template(prepared_head(golden.head_folder))
    return grid.interpolate(torch.from_numpy(template.vertices).float()[None])


@adapter("B1_uv_layout")
def check_uv_layout(golden: Golden) -> None:
    grid = grid_of(golden.head_folder, number(golden, "in.resolution"))
    golden.compare("out.pix_to_face", grid.face_index, max_outliers=1e-3)
    golden.compare("out.uv_mask", grid.uv_mask, max_outliers=1e-3)
    golden.compare("out.deform_mask", grid.deform_mask, max_outliers=1e-3)
    mask = torch.from_numpy(golden.peek("out.uv_mask"))
    same = grid.face_index == torch.from_numpy(golden.peek("out.pix_to_face")).long()
    golden.check(bool((same[mask]).float().mean() >= 0.999), "faces of covered pixels differ")
    # A pixel on an edge may take the other face, whose barycentrics then differ entirely.
    golden.compare("out.bary_on_mask", grid.barycentrics[mask], atol=1e-4, max_outliers=1e-3)
    positions = rest_map(golden, grid)[0]
    golden.compare("out.remeshed_template_on_mask", positions[mask], atol=1e-5)
    if not bool(mask.all()):
        golden.compare("out.empty_pixel_value", positions[~mask][0], atol=1e-5)


@adapter("B2_uv_mesh_binding")
def check_binding(golden: Golden) -> None:
    grid = grid_of(golden.head_folder, number(golden, "in.resolution"))
    golden.compare("out.faces", grid.faces)
    minimum = number(golden, "in.n_points_per_triangle")
    vertices = rest_map(golden, grid).view(-1, 3)
    for match, name in golden.match(r"out\.per_face_(\d+)"):
        count = splats_per_face(vertices, grid.faces, int(match[1]), minimum)
        golden.compare(name, count, max_outliers=5e-4)
        golden.check(
            int((count - torch.from_numpy(golden.peek(name)).long()).abs().max()) <= 1,
            f"{name}: counts differ by more than 1",
        )
        golden.compare(f"out.n_gaussians_{match[1]}", [int(count.sum())], atol=5e-4 * len(count))


@adapter("B4_init_params")
def check_initial_splats(golden: Golden) -> None:
    pins = golden.entry.get("pins", "")
    resolution = re.search(r"res (\d+)", pins)
    target = re.search(r"n_gaussians_init=(\d+)", pins)
    grid = grid_of(golden.head_folder, int(resolution[1]) if resolution else 128)
    vertices = rest_map(golden, grid).view(-1, 3)
    settings = PARITY
    if target:
        settings = settings.model_copy(update={"num_gaussians_init": int(target[1])})
    count = splats_per_face(
        vertices, grid.faces, settings.num_gaussians_init, settings.min_gaussians_per_face
    )
    splats = initial_splats(vertices, grid.faces, count, settings)
    rows = len(golden.peek("out.xyz"))
    golden.compare("out.N", [len(splats["xyz"])])
    for name in ("xyz", "f_dc", "scaling", "rotation", "opacity"):
        golden.compare(f"out.{name}", splats[name][:rows], atol=1e-6)
    golden.compare("out.f_rest_abs_max", splats["f_rest"].abs().max().reshape(1), atol=1e-6)
    golden.compare("out.f_rest_shape", list(splats["f_rest"].shape))
    of_each = count.repeat_interleave(count)[: len(golden.peek("out.counts"))]
    golden.compare("out.counts", of_each, atol=1e-6)


def splats_from(golden: Golden, prefix: str, binding: Tensor, num_faces: int) -> SplatTensors:
    """Splats of a file that holds only some of their tensors."""
    xyz = tensor(golden.input(f"in.xyz{prefix}"))
    parts: dict[str, Tensor] = {
        "xyz": xyz,
        "scaling": tensor(golden.input(f"in.scaling{prefix}")),
        "rotation": tensor(golden.input(f"in.rotation{prefix}")),
    }
    shapes = {"f_dc": (1, 3), "f_rest": (15, 3), "opacity": (1,)}
    for name, shape in shapes.items():
        key = f"in.{name}{prefix}"
        parts[name] = tensor(golden.input(key)) if key in golden else torch.zeros(len(xyz), *shape)
    return SplatTensors(parts, binding, num_faces)


@adapter("D5_getters")
def check_world_splats(golden: Golden) -> None:
    frames = FaceFrames(
        rotation=tensor(golden.input("in.face_orien_mat"))[None],
        scale=tensor(golden.input("in.face_scaling"))[None],
        centre=tensor(golden.input("in.face_center"))[None],
    )
    golden.ignore("in.face_orien_quat_wxyz", "derived from face_orien_mat here")
    binding = tensor(golden.input("in.binding")).long()
    splats = splats_from(golden, "", binding, frames.scale.shape[1])
    means, quats, scales, _ = world_splats(splats, frames)
    golden.compare("out.get_xyz", means[0], atol=2e-6)
    golden.compare("out.get_scaling", scales[0], atol=2e-6)
    # The quaternion of a matrix is defined up to sign.
    sign = (quats[0] * tensor(golden.peek("out.get_rotation"))).sum(-1, keepdim=True).sign()
    golden.compare("out.get_rotation", quats[0] * sign, atol=2e-6)
    golden.compare("out.get_opacity", splats.opacity.sigmoid(), atol=2e-6)
    golden.compare("out.get_features", torch.cat([splats.f_dc, splats.f_rest], 1), atol=2e-6)


def recipe_network(directory: Path, offset: int) -> DeformationUNet:
    """U-Net whose tensors are random, seeded by their names."""
    shapes = json.loads((directory / "unet_state_names.json").read_text("utf-8"))
    state = {name: recipe_tensor(name, shape, offset) for name, shape in shapes.items()}
    channels = state["model.model.0.weight"].shape[0]
    network = DeformationUNet(channels, sum(t.ndim == 4 for t in state.values()) // 2)
    network.load_state_dict(state)
    return network


def recipe_tensor(name: str, shape: list[int], offset: int) -> Tensor:
    random = np.random.RandomState((zlib.crc32(name.encode()) + offset) % 2**31)
    return torch.from_numpy((random.randn(*shape) * 0.02).astype(np.float32))


def recipe_avatar(golden: Golden, network: DeformationUNet) -> tuple[GaussianAvatar, Tensor]:
    """Avatar of a B6 or B7 file with its probed splats, and the neck rotations of all timesteps."""
    grid = grid_of(golden.head_folder, number(golden, "in.resolution"))
    num_splats, num_faces = golden.input("in.N_F").tolist()
    golden.check(len(grid.faces) == num_faces, f"{len(grid.faces)} faces, expected {num_faces}")
    binding = tensor(golden.input("in.binding_at_ids")).long()
    splats = splats_from(golden, "_at_ids", binding, num_faces)
    head = load_head(golden.head_folder, mouth=True, lower_jaw=True)
    avatar = GaussianAvatar(head, grid, splats, network, tensor(golden.input("in.shape")))
    rot, base = tensor(golden.input("in.rot")), tensor(golden.input("in.base_rot"))
    neck = relative_neck_rotation(rot, base) + tensor(golden.input("in.neck_offset"))
    ids = tensor(golden.input("in.gauss_ids"))
    golden.check(bool((ids < num_splats).all()), "gauss_ids beyond N")
    return avatar, neck


def compare_meshes(golden: Golden, avatar: GaussianAvatar, neck: Tensor, atol: float) -> None:
    """Compares all timesteps of a B6 or B7 file."""
    expr, eye_rot = tensor(golden.input("in.expr")), tensor(golden.input("in.eye_rot"))
    rot, tra = tensor(golden.input("in.rot")), tensor(golden.input("in.tra"))
    faces = tensor(golden.input("in.face_ids")).long()
    size = avatar.uv_resolution
    mask = avatar.grid.uv_mask.view(-1)
    frame_atol, frame_mean = (2e-3, 2e-5) if atol < 1e-5 else (5e-3, 5e-5)

    def quaternions(name: str, actual: Tensor) -> None:
        expected = torch.from_numpy(golden.peek(name))
        sign = (expected * actual).sum(-1, keepdim=True).sign()
        golden.compare(name, actual * sign, atol=frame_atol, mean_atol=frame_mean)

    for step in sorted({int(m[1]) for m, _ in golden.match(r"out\.t(\d+)\..*")}):
        row = slice(step, step + 1)
        with torch.no_grad():
            maps = avatar.head_maps(expr[row], eye_rot[row], neck[row], rot[row], tra[row])
            posed = avatar.pose_maps(maps, with_regularisers=True)
            # The network's two outputs, before they are combined by the mask.
            neutral = posed.mesh.vertices_neutral
            assert neutral is not None
            neutral_map = neutral.view(1, size, size, 3) - maps.positions
            frames = posed.frames
        name = f"out.t{step}."
        compare: dict[str, Callable[[], Tensor]] = {
            "verts_on_mask": lambda p=posed: p.vertices[0][mask],
            "empty_vert0": lambda p=posed: p.vertices[0][~mask][0],
            "face_center": lambda f=frames: f.centre[0, faces],
            "face_scaling": lambda f=frames: f.scale[0, faces],
            "get_xyz": lambda p=posed: p.means[0],
            "get_scaling": lambda p=posed: p.scales[0],
        }
        if f"{name}neck_rot_given_to_flame" in golden:
            golden.compare(f"{name}neck_rot_given_to_flame", neck[row], atol=2e-6)
        for key, value in compare.items():
            if name + key in golden:
                have, want = value(), golden.peek(name + key)
                # Files probe every covered pixel or every second one.
                if len(have) != len(want) and have.ndim == want.ndim > 1:
                    have = have[:: max(round(len(have) / len(want)), 1)]
                golden.compare(name + key, have, atol=atol)
        if f"{name}face_orien_mat" in golden:
            golden.compare(
                f"{name}face_orien_mat", frames.rotation[0, faces],
                atol=frame_atol, mean_atol=frame_mean,
            )  # fmt: skip
            quaternions(f"{name}face_orien_quat_wxyz", frames.quaternion[0, faces])
            quaternions(f"{name}get_rotation", posed.quats[0])
        for key, output in (
            ("deform_output", posed.mesh.deformation), ("neutral_output", neutral_map)
        ):  # fmt: skip
            if name + key in golden:
                stride = size // golden.peek(name + key).shape[-1]
                probe = output[0].permute(2, 0, 1)[:, ::stride, ::stride]
                golden.compare(name + key, probe, atol=2e-6)


@adapter("B6_mesh_initial_net")
def check_initial_mesh(golden: Golden) -> None:
    network = DeformationUNet(4, 2)
    network.initialise()
    avatar, neck = recipe_avatar(golden, network)
    compare_meshes(golden, avatar, neck, atol=5e-6)


@adapter("B7_mesh_recipe_net")
def check_recipe_mesh(golden: Golden) -> None:
    network = recipe_network(golden.directory, number(golden, "in.recipe_offset"))
    avatar, neck = recipe_avatar(golden, network)
    compare_meshes(golden, avatar, neck, atol=2e-5)
    golden.ignore("in.visible_at_ids", "used by C4_model_losses")


@adapter("C4_model_losses")
def check_model_losses(golden: Golden) -> None:
    source = golden.sibling("B7_mesh_recipe_net")
    network = recipe_network(golden.directory, number(source, "in.recipe_offset"))
    avatar, _ = recipe_avatar(source, network)
    ids = tensor(source.input("in.gauss_ids")).long()
    num_splats, num_faces = source.input("in.N_F").tolist()
    pins = golden.entry.get("pins", "")
    base = re.search(r"RandomState\((\d+)\+off\)", pins)
    offset = re.search(r"off = (\d+)", pins)
    random = np.random.RandomState(int(base[1] if base else 27) + int(offset[1] if offset else 0))
    xyz = random.randn(num_splats, 3) * 0.4
    scaling = random.randn(num_splats, 3) * 0.3 - 1
    rotation = random.randn(num_splats, 4)
    xyz[ids[:40]] *= 6
    scaling[ids[:40]] += 2
    neck = tensor(random.randn(len(source.input("in.expr")), 3) * 0.05).float()
    visible = tensor(random.rand(num_splats) < 0.7)[None]
    same = np.allclose(xyz[ids].astype(np.float32), source.input("in.xyz_at_ids"))
    golden.check(same, "the recipe does not give B7's splats")
    parts = {
        "xyz": tensor(xyz).float(),
        "scaling": tensor(scaling).float(),
        "rotation": tensor(rotation).float(),
        "f_dc": torch.zeros(num_splats, 1, 3),
        "f_rest": torch.zeros(num_splats, 15, 3),
        "opacity": torch.zeros(num_splats, 1),
    }
    binding = torch.arange(num_faces).repeat_interleave(num_splats // num_faces)
    avatar.splats = splats = SplatTensors(parts, binding, num_faces)
    golden.check(
        np.array_equal(binding[ids], source.input("in.binding_at_ids")), "binding of the recipe"
    )
    rot, base_rot = tensor(source.input("in.rot")), tensor(source.input("in.base_rot"))
    row = slice(0, 1)
    neck_offset = neck[row].clone().requires_grad_()
    maps = avatar.head_maps(
        tensor(source.input("in.expr"))[row],
        tensor(source.input("in.eye_rot"))[row],
        relative_neck_rotation(rot[row], base_rot) + neck_offset,
        rot[row],
        tensor(source.input("in.tra"))[row],
    )
    posed = avatar.pose_maps(maps, with_regularisers=True)
    assert posed.frames_neutral is not None and posed.means_neutral is not None
    limits = re.search(r"thresholds: xyz ([\d.]+), scale ([\d.]+); metric variants ([\d.]+) and "
                       r"([\d.]+)", pins)  # fmt: skip
    xyz_limit, scale_limit, xyz_metric, scale_metric = (
        map(float, (g.rstrip(".") for g in limits.groups())) if limits else (2.0, 1.0, 0.01, 0.005)
    )
    face_scale = posed.face_scale
    values = {
        "lap": losses.laplacian_loss(posed.mesh.deformation),
        "deform": losses.relative_deformation_loss(posed.means, posed.means_neutral),
        "rot": losses.relative_rotation_loss(posed.frames.rotation, posed.frames_neutral.rotation),
        "neck": losses.neck_loss(neck_offset),
        "xyz": losses.position_loss(splats.xyz, visible, xyz_limit),
        "scale": losses.scale_loss(splats.scaling.exp(), visible, scale_limit),
        "xyz_metric": losses.metric_position_loss(splats.xyz, face_scale, visible, xyz_metric),
        "scale_metric": losses.scale_loss(posed.scales, visible, scale_metric),
    }
    for name, value in values.items():
        golden.compare(f"out.{name}", value, rtol=1e-4)
    first, last = avatar.deformation.model.model[0], avatar.deformation.last_layer
    targets: dict[str, Tensor] = {
        "last_bias": last.bias, "first_weight_norm": first.weight, "xyz_at_ids": splats.xyz
    }  # type: ignore[dict-item]  # fmt: skip
    for match, name in golden.match(r"out\.(lap|deform|rot)\.grad_(.*)"):
        wanted = targets[match[2]]
        gradient = torch.autograd.grad(values[match[1]], wanted, retain_graph=True)[0]
        if match[2].endswith("norm"):
            gradient = gradient.norm().reshape(1)
        elif match[2].endswith("at_ids"):
            gradient = gradient[ids]
        # A constant shift changes none of these losses: the bias gradient is rounding noise.
        noise = 2e-7 if match[2] == "last_bias" else 0.0
        golden.compare(name, gradient, rel_to_peak=2e-3, atol=noise)
    cotangent = tensor(golden.input("in.cotangent_xyz_at_ids"))
    through_mesh = torch.autograd.grad((cotangent * posed.means[0, ids]).sum(), neck_offset)[0]
    golden.compare("out.neck_grad_row0", through_mesh[0], rel_to_peak=2e-3)
