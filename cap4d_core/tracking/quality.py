"""Figures that tell whether a fit suits its pictures.

Angles in degrees, relative to the line of sight from camera to head: yaw > 0 when the face turns to
the right of the picture, pitch > 0 when it looks up; (0, 0) is a face that looks into the camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate
from cap4d_core.geometry.cameras import flip_head_opencv, project
from cap4d_core.geometry.crops import Box, box_inside_share, crop_box_from_points
from cap4d_core.geometry.mesh_rasterizer import rasterize, screen_to_ndc
from cap4d_core.geometry.rotations import rodrigues

# Below these, a frame is flagged; none of them stops the import.
MIN_CROP_SIDE_PX = 100
MIN_CROP_INSIDE = 0.6
MIN_MESH_IN_MATTE = 0.75
MAX_YAW_DEG = 80.0
MAX_STEP_M = 0.05
# Below this share of the crop inside the picture, camera and picture cannot belong together.
MIN_CROP_VISIBLE = 0.02


@dataclass(frozen=True)
class ProjectedHead:
    """A posed head in one picture.

    pixels (V, 3): u, v and a depth that only orders; depth_m: mean distance along the optical axis;
    box: crop box around the head, None when the head is not in front of the camera.
    """

    pixels: NDArray[np.float32]
    depth_m: float
    box: Box | None


def project_head(
    head_model: HeadModel, template: HeadTemplate, fit: Tracking, timestep: int, camera: int
) -> ProjectedHead:
    """Poses the head of one frame and projects it into one camera.

    Args:
        head_model: model whose vertices the template lists.
        template: matching template, for the vertices that the crop box encloses.
        fit: the fit; neck_rot is not used, as nowhere downstream.
        timestep: frame.
        camera: index into the fit's cameras.
    """
    frame = slice(timestep, timestep + 1)
    view = slice(camera, camera + 1)
    with torch.no_grad():
        posed = head_model(
            torch.from_numpy(np.asarray(fit.shape, np.float32)),
            *(
                torch.from_numpy(np.asarray(getattr(fit, name)[frame], np.float32))
                for name in ("expr", "rot", "tra", "eye_rot")
            ),
        ).vertices
        extr = torch.from_numpy(np.asarray(fit.extr[view], np.float32))
        depth = flip_head_opencv(posed)[0] @ extr[0, 2, :3] + extr[0, 2, 3]
        fx, fy, cx, cy = (
            torch.from_numpy(np.asarray(getattr(fit, name)[view], np.float32))
            for name in ("fx", "fy", "cx", "cy")
        )
        pixels = project(posed, fx, fy, cx, cy, extr)[0, 0].numpy()
    in_front = bool((depth > 1e-3).all())
    box = crop_box_from_points(pixels[template.head_vertex_ids]) if in_front else None
    return ProjectedHead(pixels, float(depth.mean()), box)


def head_angles(fit: Tracking, timestep: int, camera: int) -> tuple[float, float]:
    """Yaw and pitch in degrees of the face against the line of sight; see the module."""
    rotation = rodrigues(torch.from_numpy(np.asarray(fit.rot[timestep], np.float64))).numpy()
    extr = np.asarray(fit.extr[camera], np.float64)
    flip = np.array([1.0, -1.0, -1.0])
    facing = extr[:3, :3] @ (flip * rotation[:, 2])
    position = extr[:3, :3] @ (flip * np.asarray(fit.tra[timestep], np.float64)) + extr[:3, 3]
    sight = position / max(np.linalg.norm(position), 1e-9)
    right = np.cross([0.0, 1.0, 0.0], sight)
    right /= max(np.linalg.norm(right), 1e-9)
    down = np.cross(sight, right)
    yaw = np.degrees(np.arctan2(facing @ right, -(facing @ sight)))
    pitch = np.degrees(np.arcsin(np.clip(-(facing @ down), -1.0, 1.0)))
    return float(yaw), float(pitch)


def mesh_mask(
    head: ProjectedHead, faces: NDArray[np.int64], image_size: tuple[int, int], scale: float = 1.0
) -> NDArray[np.bool_]:
    """Pixels of a picture, reduced by `scale`, that the mesh covers."""
    height, width = (max(1, round(side * scale)) for side in image_size)
    points = torch.from_numpy(head.pixels * np.array([scale, scale, 1.0], np.float32))
    ndc = screen_to_ndc(points, (height, width))
    return rasterize(ndc[None], torch.from_numpy(faces), (height, width)).covered[0].numpy()


def frame_figures(
    fit: Tracking,
    head: ProjectedHead,
    faces: NDArray[np.int64],
    timestep: int,
    camera: int,
    matte: NDArray[np.uint8] | None,
) -> dict[str, Any]:
    """Figures and flags of one frame, ready for JSON.

    Args:
        fit: the fit.
        head: the head of this frame as projected into this camera.
        faces: triangles of the head.
        timestep: frame.
        camera: index into the fit's cameras.
        matte: (H, W) with 255 = foreground, None when there is none.
    """
    height, width = (int(side) for side in fit.resolutions[camera])
    yaw, pitch = head_angles(fit, timestep, camera)
    flags: list[str] = []
    figures: dict[str, Any] = {
        "camera": fit.camera_order[camera],
        "timestep": int(timestep),
        "yaw_deg": round(yaw, 2),
        "pitch_deg": round(pitch, 2),
        "distance_m": round(head.depth_m, 4),
    }
    if abs(yaw) > MAX_YAW_DEG:
        flags.append(f"face turned away ({yaw:.0f} degrees of yaw)")
    if head.box is None:
        flags.append("head not in front of the camera")
    else:
        side = head.box[2] - head.box[0]
        inside = box_inside_share(head.box, (height, width))
        figures["crop_box"] = list(head.box)
        figures["crop_side_px"] = side
        figures["crop_inside_image"] = round(inside, 4)
        if side < MIN_CROP_SIDE_PX:
            flags.append(f"small face (crop of {side} px)")
        if inside < MIN_CROP_INSIDE:
            flags.append(f"crop mostly outside the picture ({100 * inside:.0f} % inside)")
    if matte is not None:
        figures.update(_matte_figures(matte, head, faces, flags))
    figures["flags"] = flags
    return figures


def _matte_figures(
    matte: NDArray[np.uint8], head: ProjectedHead, faces: NDArray[np.int64], flags: list[str]
) -> dict[str, Any]:
    figures: dict[str, Any] = {"matte_coverage": round(float(matte.mean()) / 255.0, 4)}
    if head.box is None:
        return figures
    # Whole-picture resolution is not needed to tell a good matte from an inverted one.
    scale = min(1.0, 256.0 / max(matte.shape))
    mask = mesh_mask(head, faces, (matte.shape[0], matte.shape[1]), scale)
    rows = np.minimum(((np.arange(mask.shape[0]) + 0.5) / scale).astype(int), matte.shape[0] - 1)
    columns = np.minimum(((np.arange(mask.shape[1]) + 0.5) / scale).astype(int), matte.shape[1] - 1)
    small = matte[np.ix_(rows, columns)] / 255.0
    if not mask.any():
        return figures
    on_mesh = float(small[mask].mean())
    beside = float(small[~mask].mean()) if not mask.all() else 0.0
    figures["mesh_in_matte"] = round(on_mesh, 4)
    if on_mesh < 0.5 and beside > on_mesh:
        flags.append("matte looks inverted (255 must be foreground)")
    elif on_mesh < MIN_MESH_IN_MATTE:
        flags.append(
            f"head mesh and matte disagree ({100 * on_mesh:.0f} % of it in the foreground)"
        )
    return figures


def motion_flags(fit: Tracking) -> list[str]:
    """Signs of a broken driving sequence: jumps between frames, unusual expressions."""
    flags = []
    if fit.num_frames > 1:
        steps = np.linalg.norm(np.diff(fit.tra, axis=0), axis=1)
        jumps = np.flatnonzero(steps > MAX_STEP_M)
        if len(jumps):
            flags.append(
                f"the head jumps by more than {100 * MAX_STEP_M:.0f} cm after frames "
                f"{', '.join(str(int(i)) for i in jumps[:10])}{'...' if len(jumps) > 10 else ''}"
            )
    peak = float(np.abs(fit.expr).max(initial=0.0))
    if peak > 15.0:
        flags.append(f"an expression coefficient of {peak:.1f} (usual are up to about 8)")
    return flags
