"""The tensor arithmetic of a training step as pure functions, to be compiled or recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.avatar import losses
from cap4d_core.avatar.compiled import varying
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.face_frames import FaceFrames, face_frames, gather_rows
from cap4d_core.avatar.gaussians import GaussianAvatar, HeadMaps, MeshMaps, PosedGaussians
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.lpips_fast import FastLpips
from cap4d_core.geometry.rotations import quaternion_multiply
from cap4d_core.settings import FittingSettings

logger = logging.getLogger(__name__)


def image_terms(
    rendered: Tensor,
    target: Tensor,
    mask: Tensor,
    lpips: Lpips | FastLpips | None,
    kept: Sequence[Tensor] = (),
    blur: losses.Blur = "axes",
) -> Tensor:
    """L1, 1 - SSIM and the mean LPIPS (0 without), (3,).

    Args:
        rendered: (B, H, W, 3).
        target: (B, 3, H, W) in 0..1.
        mask: (B, 1, H, W) bool.
        lpips: perceptual distance.
        kept: what `TargetFeatures` holds of the masked targets.
        blur: see `losses.ssim_map`.
    """
    have = rendered.permute(0, 3, 1, 2) * mask
    want = target * mask
    l1 = losses.l1_loss(have, want)
    dssim = 1 - losses.ssim_map(have, want, blur).mean()
    if lpips is None:
        return torch.stack([l1, dssim, torch.zeros_like(l1)])
    distance = lpips(have, want, kept) if isinstance(lpips, FastLpips) else lpips(have, want)
    return torch.stack([l1, dssim, distance.mean()])


class RegulariserInputs(NamedTuple):
    """What the regularisers look at; see `PosedGaussians`."""

    xyz: Tensor
    scaling: Tensor
    scales: Tensor
    face_scale: Tensor
    visible: Tensor
    deformation: Tensor
    means: Tensor
    means_neutral: Tensor
    rotation: Tensor
    rotation_neutral: Tensor


def regulariser_inputs(
    splats: SplatTensors, posed: PosedGaussians, visible: Tensor
) -> RegulariserInputs:
    """Of a posed avatar; `visible` (B, N)."""
    assert posed.means_neutral is not None and posed.frames_neutral is not None
    return RegulariserInputs(
        varying(splats.xyz),
        varying(splats.scaling),
        varying(posed.scales, 1),
        varying(posed.face_scale, 1),
        varying(visible, 1),
        posed.mesh.deformation,
        varying(posed.means, 1),
        varying(posed.means_neutral, 1),
        posed.frames.rotation,
        posed.frames_neutral.rotation,
    )


REGULARISERS = ("xyz", "scale", "lap", "deform", "rot")


def regulariser_function(s: FittingSettings) -> Callable[[RegulariserInputs], Tensor]:
    """Makes the function that gives the weighted REGULARISERS, (5,); switched-off ones are zero."""
    # Plain numbers: a compiler must not have to look into the settings.
    weight_xyz, weight_scale, weight_lap = s.lambda_xyz, s.lambda_scale, s.lambda_laplacian
    weight_deform, weight_rot = s.lambda_relative_deform, s.lambda_relative_rot
    metric_xyz, metric_scale = s.metric_xyz, s.metric_scale
    limit_xyz, limit_scale = s.threshold_xyz, s.threshold_scale

    def regularisers(inputs: RegulariserInputs) -> Tensor:
        i = inputs
        terms = [i.xyz.new_zeros(())] * len(REGULARISERS)
        if weight_xyz > 0:
            if metric_xyz:
                value = losses.metric_position_loss(i.xyz, i.face_scale, i.visible, limit_xyz)
            else:
                value = losses.position_loss(i.xyz, i.visible, limit_xyz)
            terms[0] = weight_xyz * value
        if weight_scale > 0:
            scales = i.scales if metric_scale else i.scaling.exp()
            terms[1] = weight_scale * losses.scale_loss(scales, i.visible, limit_scale)
        if weight_lap > 0:
            terms[2] = weight_lap * losses.laplacian_loss(i.deformation)
        if weight_deform > 0:
            value = losses.relative_deformation_loss(i.means, i.means_neutral)
            terms[3] = weight_deform * value
        if weight_rot > 0:
            value = losses.relative_rotation_loss(i.rotation, i.rotation_neutral)
            terms[4] = weight_rot * value
        return torch.stack(terms)

    return regularisers


class MeshTensors(NamedTuple):
    """What a step needs of the refined meshes of B frames; see `MeshMaps` and `FaceFrames`."""

    deformation: Tensor
    rotation: Tensor
    scale: Tensor
    centre: Tensor
    quaternion: Tensor
    neutral_rotation: Tensor
    neutral_scale: Tensor
    neutral_centre: Tensor
    vertices: Tensor


class MeshFunction(nn.Module):
    """Meshes of some frames, with regularisers, as a function of tensors.

    All sizes are fixed during a fit (splats come and go elsewhere), so it can be recorded.

    Args:
        avatar: whose meshes; only its deformation network is trained here.
        from_maps: the arguments are head maps (positions, offsets) instead of (expr, eye_rot,
            neck_rot).
    """

    def __init__(self, avatar: GaussianAvatar, from_maps: bool) -> None:
        super().__init__()
        self.deformation = avatar.deformation
        # In a tuple, so that its other parameters are not taken for parameters of this function.
        self._avatar = (avatar,)
        self.from_maps = from_maps

    def forward(self, *inputs: Tensor) -> MeshTensors:
        """MeshTensors; gradients flow to the network and the neck."""
        (avatar,) = self._avatar
        maps = HeadMaps(*inputs) if self.from_maps else avatar.head_maps(*inputs)
        mesh = avatar.refine(maps, True)
        assert mesh.vertices_neutral is not None
        frames = face_frames(mesh.vertices, avatar.grid.faces)
        neutral = face_frames(mesh.vertices_neutral, avatar.grid.faces)
        return MeshTensors(
            mesh.deformation, frames.rotation, frames.scale, frames.centre, frames.quaternion,
            neutral.rotation, neutral.scale, neutral.centre, mesh.vertices.detach(),
        )  # fmt: skip


class SplatInputs(NamedTuple):
    """What `place_splats` needs: meshes (see `MeshTensors`) and local parameters."""

    rotation: Tensor
    scale: Tensor
    centre: Tensor
    quaternion: Tensor
    neutral_rotation: Tensor
    neutral_scale: Tensor
    neutral_centre: Tensor
    xyz: Tensor
    f_dc: Tensor
    f_rest: Tensor
    opacity: Tensor
    scaling: Tensor
    turn: Tensor
    binding: Tensor


def splat_inputs(mesh: MeshTensors, splats: SplatTensors) -> SplatInputs:
    """Splats, whose number changes during a fit, on meshes, whose size is fixed."""
    local = (
        splats.xyz, splats.f_dc, splats.f_rest, splats.opacity, splats.scaling, splats.rotation,
        splats.binding,
    )  # fmt: skip
    return SplatInputs(*mesh[1:8], *(varying(tensor) for tensor in local))


def place_splats(inputs: SplatInputs) -> tuple[Tensor, ...]:
    """means, quats, scales, face_scale, means_neutral, opacities, sh; see `PosedGaussians`.

    The same as `GaussianAvatar.pose_maps` with regularisers, but for one lookup of the frames of
    faces in both meshes, whose backward pass is the expensive part.
    """
    i = inputs
    table = torch.cat(
        [
            i.rotation.flatten(-2), i.quaternion, i.scale, i.centre,
            (i.neutral_rotation * i.neutral_scale[..., None]).flatten(-2), i.neutral_centre,
        ],
        dim=-1,
    )  # fmt: skip
    found = gather_rows(table, i.binding).split([9, 4, 1, 3, 9, 3], dim=-1)
    rotation, quaternion, scale, centre, neutral, neutral_centre = found
    local = i.xyz * scale
    means = (rotation.unflatten(-1, (3, 3)) * local[..., None, :]).sum(-1) + centre
    plain = (neutral.unflatten(-1, (3, 3)) * i.xyz[:, None, :]).sum(-1) + neutral_centre
    # The product of unit quaternions is a unit quaternion.
    quats = quaternion_multiply(quaternion, F.normalize(i.turn, dim=-1))
    return (
        means, quats, i.scaling.exp() * scale, scale, plain, i.opacity.sigmoid()[:, 0],
        torch.cat([i.f_dc, i.f_rest], dim=1),
    )  # fmt: skip


def pose_on(
    mesh: MeshTensors, splats: SplatTensors, place: Callable[..., tuple[Tensor, ...]]
) -> PosedGaussians:
    """The splats on given meshes; `place` is `place_splats`, perhaps compiled."""
    means, quats, scales, face_scale, plain, opacities, sh = place(splat_inputs(mesh, splats))
    frames = FaceFrames(mesh.rotation, mesh.scale, mesh.centre)
    frames.quaternion = mesh.quaternion
    return PosedGaussians(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        sh=sh,
        vertices=mesh.vertices,
        mesh=MeshMaps(mesh.vertices, mesh.deformation),
        frames=frames,
        face_scale=face_scale,
        means_neutral=plain,
        frames_neutral=FaceFrames(mesh.neutral_rotation, mesh.neutral_scale, mesh.neutral_centre),
    )


class Recorded:
    """A function on CUDA whose kernels are launched at once, as a recorded graph.

    The graph is made at the first call; where that fails, the function itself goes on. Results are
    overwritten by the next call.
    """

    def __init__(self, function: nn.Module, enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self._graph: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """As the function."""
        if not self.enabled:
            return self.function(*inputs)
        if self._graph is None:
            samples = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
            try:
                self._graph = _record(self.function, samples)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever cannot be recorded
                self.enabled = False
                reason = str(error).strip().partition("\n")[0]
                logger.warning("Fitting without recorded kernels, which is slower: %s", reason)
                return self.function(*inputs)
        return self._graph(*inputs)


def _record(function: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Any]:
    plain = function.forward
    # Recording runs on a stream of its own, once; torch warns in case that were for good.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
    try:
        return torch.cuda.make_graphed_callables(function, samples, allow_unused_input=True)
    except BaseException:
        function.forward = plain
        raise
