"""The tensor arithmetic of a training step as pure functions, so that it can be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cap4d_core.avatar import losses
from cap4d_core.avatar.compiled import varying
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.face_frames import FaceFrames
from cap4d_core.avatar.gaussians import (
    GaussianAvatar,
    HeadMaps,
    LocalSplats,
    MeshMaps,
    PosedGaussians,
)
from cap4d_core.avatar.lpips import Lpips
from cap4d_core.avatar.lpips_fast import FastLpips
from cap4d_core.settings import FittingSettings


def image_terms(
    rendered: Tensor,
    target: Tensor,
    mask: Tensor,
    lpips: Lpips | FastLpips | None,
    kept: Sequence[Tensor] = (),
    separable: bool = True,
) -> Tensor:
    """L1, 1 - SSIM and the mean LPIPS (0 without), (3,).

    Args:
        rendered: (B, H, W, 3).
        target: (B, 3, H, W) in 0..1.
        mask: (B, 1, H, W) bool.
        lpips: perceptual distance.
        kept: what `TargetFeatures` holds of the masked targets.
        separable: see `losses.ssim_map`.
    """
    have = rendered.permute(0, 3, 1, 2) * mask
    want = target * mask
    l1 = losses.l1_loss(have, want)
    dssim = 1 - losses.ssim(have, want, separable=separable)
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


def head_map_function(avatar: GaussianAvatar) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes `avatar.head_maps` as a function of and to tensors."""

    def head_maps(expr: Tensor, eye_rot: Tensor, neck: Tensor | None) -> tuple[Tensor, Tensor]:
        maps = avatar.head_maps(expr, eye_rot, neck)
        return maps.positions, maps.offsets

    return head_maps


def pose_function(avatar: GaussianAvatar) -> Callable[..., tuple[Tensor, ...]]:
    """Makes `avatar.pose_maps` with regularisers as a function of and to tensors."""

    def pose_maps(positions: Tensor, offsets: Tensor, splats: LocalSplats) -> tuple[Tensor, ...]:
        posed = avatar.pose_maps(HeadMaps(positions, offsets), True, splats)
        neutral = posed.frames_neutral
        assert posed.means_neutral is not None and neutral is not None
        return (
            posed.means, posed.quats, posed.scales, posed.opacities, posed.sh,
            posed.mesh.deformation, posed.frames.rotation, posed.face_scale,
            posed.means_neutral, neutral.rotation,
            # No loss looks at these: detached, they cost no gradient.
            posed.vertices.detach(), posed.frames.scale.detach(), posed.frames.centre.detach(),
        )  # fmt: skip

    return pose_maps


def pose_with(function: Callable[..., Any], maps: HeadMaps, splats: SplatTensors) -> PosedGaussians:
    """Calls a (compiled) `pose_function`."""
    tensors = {name: varying(p) for name, p in splats.groups().items()}
    local = LocalSplats(**tensors, binding=varying(splats.binding))
    (
        means, quats, scales, opacities, sh, deformation, rotation, face_scale,
        means_neutral, rotation_neutral, vertices, face_sizes, centre,
    ) = function(maps.positions, maps.offsets, local)  # fmt: skip
    return PosedGaussians(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        sh=sh,
        vertices=vertices,
        mesh=MeshMaps(vertices, deformation),
        frames=FaceFrames(rotation, face_sizes, centre),
        face_scale=face_scale,
        means_neutral=means_neutral,
        frames_neutral=FaceFrames(rotation_neutral, face_sizes, centre),
    )
