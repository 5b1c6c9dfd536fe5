"""The Gaussian avatar: splats bound to the UV grid mesh of the head model, posed by its expression.

Frames: vertices and splats are in OpenCV axes (y down, z away from the viewer of a frontal face)
with the head at the origin; cameras move instead (`cap4d_core.geometry.cameras.head_to_origin`).
Lengths in metres, quaternions wxyz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.avatar.deformation import OFFSET_UNIT, DeformationUNet, positional_encoding
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.face_frames import FaceFrames, face_frames, gather_rows
from cap4d_core.avatar.uv_grid import UVGrid, splats_per_face
from cap4d_core.errors import UserError
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_avatar_template
from cap4d_core.geometry.rotations import quaternion_multiply, so3_exp, so3_log
from cap4d_core.settings import FittingSettings

INITIAL_OPACITY = 0.1
# Limit of the neck rotation derived from head rotations, radians (published).
NECK_LIMIT = 0.15


@dataclass
class HeadMaps:
    """The head model on the UV grid, before refinement.

    positions (B, R, R, 3) and offsets (B, R, R, 3) of the expression; metres, OpenCV axes.
    """

    positions: Tensor
    offsets: Tensor

    def index(self, rows: Tensor) -> HeadMaps:
        """The maps of some frames."""
        return HeadMaps(self.positions[rows].float(), self.offsets[rows].float())


@dataclass
class MeshMaps:
    """The refined mesh of B frames.

    vertices (B, R*R, 3); deformation (B, R, R, 3) added to the head model, metres; with
    regularisers also vertices_neutral: the mesh refined without knowledge of the expression.
    """

    vertices: Tensor
    deformation: Tensor
    vertices_neutral: Tensor | None = None


@dataclass
class PosedGaussians:
    """Splats of B frames, ready to render.

    means (B, N, 3), quats (B, N, 4) wxyz, scales (B, N, 3) metres, opacities (N,) 0..1, sh
    (N, 16, 3), vertices (B, R*R, 3). For training also: mesh, frames of the faces, face_scale
    (B, N, 1) of each splat, means_neutral and frames_neutral.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor
    vertices: Tensor
    mesh: MeshMaps
    frames: FaceFrames
    face_scale: Tensor
    means_neutral: Tensor | None = None
    frames_neutral: FaceFrames | None = None


def relative_neck_rotation(rot: Tensor, base_rot: Tensor) -> Tensor:
    """Neck rotation that leaves the shoulders where they are in a base frame.

    q = log(R(rot)^-1 R(base)), each component limited softly to 0.15 rad.

    Args:
        rot: (T, 3) head rotations.
        base_rot: (3,).
    """
    relative = so3_log(so3_exp(rot).transpose(-1, -2) @ so3_exp(base_rot))
    return NECK_LIMIT * torch.tanh(relative / NECK_LIMIT)


def world_means(splats: SplatTensors, frames: FaceFrames) -> Tensor:
    """Local to world, positions only: (B, N, 3)."""
    packed = torch.cat([(frames.rotation * frames.scale[..., None]).flatten(-2), frames.centre], -1)
    rotation, centre = gather_rows(packed, splats.binding).split([9, 3], dim=-1)
    return (rotation.unflatten(-1, (3, 3)) * splats.xyz[:, None, :]).sum(-1) + centre


def world_splats(splats: SplatTensors, frames: FaceFrames) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local to world: means, quaternions, scales and the face scale of each splat, (B, N, ...)."""
    packed = torch.cat(
        [frames.rotation.flatten(-2), frames.quaternion, frames.scale, frames.centre], dim=-1
    )
    # One gather instead of four: its backward pass is the expensive part.
    rotation, quaternion, scale, centre = gather_rows(packed, splats.binding).split(
        [9, 4, 1, 3], dim=-1
    )
    local = splats.xyz * scale
    means = (rotation.unflatten(-1, (3, 3)) * local[..., None, :]).sum(-1) + centre
    # The product of unit quaternions is a unit quaternion.
    quats = quaternion_multiply(quaternion, F.normalize(splats.rotation, dim=-1))
    return means, quats, splats.scaling.exp() * scale, scale


class GaussianAvatar(nn.Module):
    """A fitted (or freshly initialised) avatar.

    Attributes:
        head: head model with both mouth parts. grid: UV grid. splats: local parameters.
        deformation: network of the expression-dependent refinement.
        shape: (150,) identity of the head model. rest_neck: (3,) mean learned neck rotation.
        active_sh_degree: harmonics in use.
    """

    shape: Tensor
    rest_neck: Tensor
    encoding: Tensor
    flip: Tensor

    def __init__(
        self,
        head: HeadModel,
        grid: UVGrid,
        splats: SplatTensors,
        deformation: DeformationUNet,
        shape: Tensor,
        *,
        active_sh_degree: int = 0,
        rest_neck: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.head, self.grid, self.splats, self.deformation = head, grid, splats, deformation
        self.active_sh_degree = active_sh_degree
        self.meta: dict[str, Any] = {}
        neck = torch.zeros(3) if rest_neck is None else rest_neck
        self.register_buffer("shape", torch.as_tensor(shape, dtype=torch.float32).clone())
        self.register_buffer("rest_neck", neck.detach().clone())
        self.register_buffer("encoding", positional_encoding(grid.resolution)[None])
        # A buffer, because building it from numbers on every call would stop the GPU.
        self.register_buffer("flip", torch.tensor([1.0, -1.0, -1.0]))
        head.requires_grad_(False)

    @classmethod
    def create(
        cls,
        head: HeadModel,
        shape: Tensor,
        settings: FittingSettings,
        template: HeadTemplate | None = None,
    ) -> GaussianAvatar:
        """A fresh avatar; everything random is drawn from `settings.seed`.

        Args:
            head: head model with both mouth parts (without the lower one when
                `settings.use_lower_jaw` is off).
            shape: (150,) identity.
            settings: sizes, seed, parity.
            template: avatar template; default: the one in the head model's folder.
        """
        template = head_template(head) if template is None else template
        grid = make_grid(head, template, settings)
        rest = torch.from_numpy(template.vertices).float()[None, : head.num_vertices]
        rest_map = grid.interpolate(rest.cpu()).view(-1, 3)
        count = splats_per_face(
            rest_map, grid.faces, settings.num_gaussians_init, settings.min_gaussians_per_face
        )
        generator = torch.Generator().manual_seed(settings.seed)
        network = DeformationUNet(settings.deform_net_channels, settings.deform_net_layers)
        network.initialise(generator)
        tensors = initial_splats(rest_map, grid.faces, count, settings)
        binding = torch.repeat_interleave(torch.arange(len(count)), count)
        splats = SplatTensors(tensors, binding, len(count))
        avatar = cls(head, grid, splats, network, shape)
        return avatar.to(head.template.device)

    @property
    def uv_resolution(self) -> int:
        """Side R of the UV grid."""
        return self.grid.resolution

    @property
    def grid_faces(self) -> Tensor:
        """(F, 3) triangles of the mesh."""
        return self.grid.faces

    @property
    def binding(self) -> Tensor:
        """(N,) face of each splat."""
        return self.splats.binding

    def head_maps(
        self,
        expr: Tensor,
        eye_rot: Tensor,
        neck_rot: Tensor | None = None,
        rot: Tensor | None = None,
        tra: Tensor | None = None,
    ) -> HeadMaps:
        """Runs the head model for B frames and resamples it on the UV grid.

        Args:
            expr: (B, 65).
            eye_rot: (B, 3).
            neck_rot: (B, 3).
            rot: (B, 3) head rotation; zero in all products of this package.
            tra: (B, 3) head translation; likewise.
        """
        batch = expr.shape[0]
        zero = torch.zeros_like(eye_rot)
        rot = zero if rot is None else rot
        tra = zero if tra is None else tra
        neck = zero if neck_rot is None else neck_rot
        # Expression and rest in one call.
        vertices = self.head(
            self.shape,
            torch.cat([expr, torch.zeros_like(expr)]),
            torch.cat([rot, rot]),
            torch.cat([tra, tra]),
            eye_rot=torch.cat([eye_rot, zero]),
            neck_rot=torch.cat([neck, neck]),
        ).vertices
        moved, rest = (vertices * self.flip).split(batch)
        both = self.grid.interpolate(torch.cat([moved, moved - rest], dim=-1))
        return HeadMaps(both[..., :3], both[..., 3:])

    def refine(self, maps: HeadMaps, with_regularisers: bool = False) -> MeshMaps:
        """Adds the network's deformation to the head model's mesh."""
        batch, size = maps.positions.shape[0], self.grid.resolution
        offsets = (maps.offsets.detach() / OFFSET_UNIT).permute(0, 3, 1, 2)
        offsets = offsets * self.grid.uv_mask
        # One extra sample without offsets serves all frames: what is not expression.
        inputs = torch.cat([offsets, torch.zeros_like(offsets[:1])])
        inputs = torch.cat([inputs, self.encoding.expand(batch + 1, -1, -1, -1)], dim=1)
        output = self.deformation(inputs).permute(0, 2, 3, 1) * OFFSET_UNIT
        expressive, neutral = output[:batch], output[batch:]
        deformation = torch.where(self.grid.deform_mask[..., None], expressive, neutral)
        mask = torch.ones_like(self.grid.uv_mask) if self.grid.parity else self.grid.uv_mask
        vertices = (maps.positions + deformation) * mask[..., None]
        result = MeshMaps(vertices.reshape(batch, size * size, 3), deformation)
        if with_regularisers:
            plain = (maps.positions + neutral) * mask[..., None]
            result.vertices_neutral = plain.reshape(batch, size * size, 3)
        return result

    def pose_maps(self, maps: HeadMaps, with_regularisers: bool = False) -> PosedGaussians:
        """Splats on given head maps; see `pose`."""
        mesh = self.refine(maps, with_regularisers)
        frames = face_frames(mesh.vertices, self.grid.faces)
        means, quats, scales, face_scale = world_splats(self.splats, frames)
        posed = PosedGaussians(
            means=means,
            quats=quats,
            scales=scales,
            opacities=self.splats.opacity.sigmoid()[:, 0],
            sh=torch.cat([self.splats.f_dc, self.splats.f_rest], dim=1),
            vertices=mesh.vertices,
            mesh=mesh,
            frames=frames,
            face_scale=face_scale,
        )
        if mesh.vertices_neutral is not None:
            posed.frames_neutral = face_frames(mesh.vertices_neutral, self.grid.faces)
            posed.means_neutral = world_means(self.splats, posed.frames_neutral)
        return posed

    def pose(
        self,
        expr: Tensor,
        eye_rot: Tensor,
        neck_rot: Tensor | None = None,
        *,
        with_regularisers: bool = False,
    ) -> PosedGaussians:
        """Splats and mesh of B frames, head at the origin.

        Args:
            expr: (B, 65).
            eye_rot: (B, 3) rotation vectors.
            neck_rot: (B, 3); default: the mean of those learned in the fit.
            with_regularisers: also what the regularisers compare with.
        """
        if neck_rot is None:
            neck_rot = self.rest_neck.expand(expr.shape[0], 3)
        return self.pose_maps(self.head_maps(expr, eye_rot, neck_rot), with_regularisers)

    def save(self, folder: str | Path) -> None:
        """Writes avatar.safetensors and avatar.json, see `cap4d_core.avatar.avatar_files`."""
        from cap4d_core.avatar.avatar_files import save_avatar

        save_avatar(self, folder)

    @classmethod
    def load(
        cls, folder: str | Path, head_model: HeadModel, device: torch.device | str = "cpu"
    ) -> GaussianAvatar:
        """Reads what `save` wrote; the head model must be the one of the fit."""
        from cap4d_core.avatar.avatar_files import load_avatar

        return load_avatar(folder, head_model, device)


def head_template(head: HeadModel) -> HeadTemplate:
    """The avatar template in the head model's folder."""
    if head.folder is None:
        raise ValueError("a head model without folder needs its avatar template given")
    return load_avatar_template(head.folder)


def make_grid(head: HeadModel, template: HeadTemplate, settings: FittingSettings) -> UVGrid:
    """The UV grid of a fit."""
    if settings.deform_net_layers > int(math.log2(settings.uv_resolution)):
        raise UserError(
            f"fitting.deform_net_layers is {settings.deform_net_layers}; a UV resolution of "
            f"{settings.uv_resolution} allows at most {int(math.log2(settings.uv_resolution))}."
        )
    return UVGrid(
        template,
        settings.uv_resolution,
        num_vertices=head.num_vertices,
        separate_islands=not settings.parity,
        parity=settings.parity,
    )


def initial_splats(
    vertices: Tensor, faces: Tensor, count: Tensor, settings: FittingSettings
) -> dict[str, Tensor]:
    """Splats spread over their faces, grey, faint, smaller where a face has many.

    Args:
        vertices: (V, 3) rest positions.
        faces: (F, 3).
        count: (F,) splats per face.
        settings: seed; parity starts in one octant of the face's frame instead.
    """
    face = torch.repeat_interleave(torch.arange(len(count)), count)
    num = len(face)
    random = np.random.RandomState(settings.seed)
    draws = torch.from_numpy(random.random_sample((num, 3)))
    grey = torch.from_numpy(random.random_sample((num, 3)) / 255.0).float()
    if settings.parity:
        xyz = (draws * 0.4).float()
    else:
        # Uniform in the triangle (Osada et al. 2002), in the frame of its face.
        root = draws[:, 0].sqrt()
        weights = torch.stack([1 - root, root * (1 - draws[:, 1]), root * draws[:, 1]], -1).float()
        frames = face_frames(vertices[None], faces)
        points = (vertices[faces[face]] * weights[..., None]).sum(1)
        arm = points - frames.centre[0, face]
        local = (frames.rotation[0, face].transpose(-1, -2) @ arm[..., None])[..., 0]
        xyz = local / frames.scale[0, face].clamp(min=1e-8)
    size = torch.log(1.0 / count[face].float())
    rotation = torch.zeros(num, 4)
    rotation[:, 0] = 1.0
    opacity = torch.full((num, 1), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY)))
    return {
        "xyz": xyz,
        "f_dc": grey[:, None, :],
        "f_rest": torch.zeros(num, 15, 3),
        "opacity": opacity,
        "scaling": size[:, None].expand(num, 3).contiguous(),
        "rotation": rotation,
    }
