"""Head model, projection, mouth (A) and camera orbit (G7)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.mouth import half_sphere, half_sphere_faces, rotate_about
from cap4d_core.geometry.cameras import (
    flip_head_opencv,
    orbit_angles,
    orbit_extrinsics,
    pivot_camera,
    project,
)
from cap4d_core.geometry.rotations import rodrigues
from tests.parity.goldens import Golden, adapter
from tests.parity.head import load_head


def _tensor(g: Golden, name: str) -> Tensor:
    return torch.from_numpy(g.input(name))


def _model(g: Golden, num_shape: int, num_expr: int, num_vertices: int) -> HeadModel:
    """Model whose parts follow from the number of vertices, its sizes from the inputs."""
    return load_head(
        g.head_folder,
        num_shape=num_shape,
        num_expr=num_expr,
        mouth=num_vertices > 5023,
        lower_jaw=num_vertices > 5223,
        blink="noblink" not in g.stem,
    )


@adapter("A1_flame_bare", "A2_flame_mouth", "A3_flame_avatar", "A5_flame_full_noblink")
def flame(g: Golden) -> None:
    ids = g.input("in.transform_vertex_ids")
    parameters = {
        name.removeprefix("in."): torch.from_numpy(array)
        for name, array in g.inputs(r"in\.(shape|expr|rot|tra|(eye|neck|jaw)_rot)").items()
    }
    num_vertices = g.peek("out.verts").shape[1]
    model = _model(g, len(parameters["shape"]), parameters["expr"].shape[1], num_vertices)
    output = model(**parameters)
    g.compare("out.verts", output.vertices, atol=2e-6)
    g.compare("out.offsets", output.offsets, atol=2e-6)
    g.compare("out.transforms_at_ids", output.transforms[:, ids], atol=2e-6)


@adapter("A4_flame_rest")
def rest(g: Golden) -> None:
    model = _model(g, 150, 65, len(g.peek("out.verts_rest")))
    single = [(int(found[1]), name) for found, name in g.match(r"out\.offset_e(\d+)_minus_rest")]
    expr = torch.zeros(2 + len(single), 65)
    expr[1, -1] = float(g.input("in.blink_amount")[0])
    for row, (index, _) in enumerate(single, start=2):
        expr[row, index] = 1.0
    zero = torch.zeros(len(expr), 3)
    output = model(torch.zeros(150), expr, zero, zero)
    g.compare("out.verts_rest", output.vertices[0], atol=1e-6)
    g.compare("out.offsets_rest", output.offsets[0], atol=1e-6)
    g.compare("out.offset_blink_minus_rest", output.offsets[1] - output.offsets[0], atol=1e-6)
    for row, (_, name) in enumerate(single, start=2):
        g.compare(name, output.offsets[row] - output.offsets[0], atol=1e-6)


@adapter("A6_rodrigues")
def rotation(g: Golden) -> None:
    rotvec = _tensor(g, "in.rotvec").requires_grad_()
    matrix = rodrigues(rotvec)
    g.compare("out.R", matrix, atol=1e-6)
    (gradient,) = torch.autograd.grad(matrix, rotvec, _tensor(g, "in.cotangent"))
    g.compare("out.grad", gradient, atol=2e-4)


@adapter("A7_projection")
def projection(g: Golden) -> None:
    parameters = [_tensor(g, f"in.{name}") for name in ("shape", "expr", "rot", "tra", "eye_rot")]
    # The depth is relative to the mean over all vertices, those of the upper mouth included.
    model = _model(g, len(parameters[0]), parameters[1].shape[1], 5223)
    output = model(*parameters)
    camera = [_tensor(g, f"in.{name}") for name in ("fx", "fy", "cx", "cy", "extr")]
    ids = g.input("in.vertex_ids")
    g.compare("out.verts_2d_at_ids", project(output.vertices, *camera)[:, :, ids], atol=2e-3)
    g.compare("out.verts_3d_cv_at_ids", flip_head_opencv(output.vertices)[:, ids], atol=2e-6)
    g.compare("out.offsets_3d_at_ids", output.offsets[:, ids], atol=2e-6)


@adapter("A8_mouth")
def mouth(g: Golden) -> None:
    g.compare("out.unit_sphere_verts", half_sphere(), atol=1e-6)
    g.compare("out.faces", half_sphere_faces())
    shape = _tensor(g, "in.shape")
    model = _model(g, len(shape), 65, 5223)
    placed = model.neutral(shape)[5023:]
    g.compare("out.placed", placed, atol=1e-6)
    turned = rotate_about(placed, model.jaw_joint(shape), rodrigues(_tensor(g, "in.jaw_rot")))
    g.compare("out.placed_rotated", turned, atol=1e-6)


@adapter("G7_orbit")
def orbit(g: Golden) -> None:
    extr, tra = g.input("in.extr_f64"), g.input("in.tra_f64")
    fps = float(g.input("in.fps")[0])
    frames = len(g.peek("out.orbit_f64"))
    g.compare("out.angles_f64", orbit_angles(frames, fps), atol=1e-6)
    g.compare("out.orbit_f64", orbit_extrinsics(extr, tra, frames, fps), atol=1e-6)
    angles = g.input("in.angles_f64")
    target = tra * np.array([1.0, -1.0, -1.0])
    single = pivot_camera(np.repeat(extr[None], len(angles), 0), target, *angles.T)
    g.compare("out.single_f64", single, atol=1e-6)
