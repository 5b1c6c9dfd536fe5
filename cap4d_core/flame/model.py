"""The morphable head: blendshapes, pose correctives, skinning, mouth interior.

Conventions:
    Head space: +x to the viewer's right when the face looks at the viewer, +y up, +z out of the
    face; metres. Rotations are rotation vectors in radians (`rodrigues`).
    Joints: 0 lower neck, 1 neck, 2 jaw, 3 eye at +x, 4 eye at -x.

The model follows FLAME (Li et al. 2017) with the peculiarities that released fits and weights
depend on:
    - the last expression is an own blink blendshape instead of FLAME's;
    - pose correctives see R - 2I instead of R - I, which adds a constant offset at rest;
    - joints turn independently (no kinematic chain), `neck_rot` acts on joint 0, joint 1 never
      turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_npz, require_file, take_array
from cap4d_core.flame.mouth import LOWER_LIP_VERTEX, place_mouth, rotate_about
from cap4d_core.flame.template import (
    NUM_HEAD_VERTICES,
    load_avatar_template,
    load_flame_template,
)
from cap4d_core.geometry.rotations import rodrigues

NUM_JOINTS = 5
MAX_SHAPE = 300
MAX_EXPRESSION = 100
# Joints that the pose correctives listen to: all but joint 1, which never turns.
NUM_CORRECTIVES = 4
_JAW_JOINT = 2

MODEL_FILE = "flame.npz"
BLINK_FILE = "blink_blendshape.npy"
JAW_REGRESSOR_FILE = "jaw_regressor.npy"


@dataclass
class HeadOutput:
    """Posed heads of T frames with V vertices.

    vertices (T, V, 3) posed; offsets (T, V, 3): displacement from the neutral head before rot and
    tra; transforms (T, V, 4, 4): see `HeadModel.forward`, computed when first asked for.
    """

    vertices: Tensor
    offsets: Tensor
    _make_transforms: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def transforms(self) -> Tensor:
        """(T, V, 4, 4) blended transform of every vertex, head pose included."""
        return self._make_transforms()


class HeadModel(nn.Module):
    """Morphable head with 5023 vertices, plus 200 for each mouth part.

    Attributes:
        faces: (F, 3) int64 triangles of all vertices.
        num_vertices: V.
        folder: where it was loaded from.
    """

    template: Tensor
    shape_basis: Tensor
    pose_basis: Tensor
    joint_template: Tensor
    joint_shape_basis: Tensor
    joint_expression_basis: Tensor
    skinning_weights: Tensor
    jaw_regressor: Tensor
    faces: Tensor

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        faces: np.ndarray,
        blink: np.ndarray | None,
        jaw_regressor: np.ndarray | None,
        num_shape: int = 150,
        num_expr: int = 65,
        mouth: bool = True,
        folder: Path | None = None,
    ) -> None:
        """Builds the model from arrays; `load` is the usual way.

        Args:
            arrays: content of flame.npz.
            faces: (F, 3) triangles.
            blink: (5023, 3) replacing the last expression, or None.
            jaw_regressor: (num_expr, 3) for the lower mouth part, None without it.
            num_shape: shape coefficients, up to 300.
            num_expr: expression coefficients, up to 100.
            mouth: append the upper mouth part.
            folder: where the arrays come from.

        Raises:
            ValueError: sizes that cannot be.
        """
        super().__init__()
        if not 0 < num_shape <= MAX_SHAPE or not 0 < num_expr <= MAX_EXPRESSION:
            raise ValueError(
                f"num_shape {num_shape}, num_expr {num_expr}: 1 to {MAX_SHAPE} and "
                f"{MAX_EXPRESSION} are possible"
            )
        if jaw_regressor is not None and not mouth:
            raise ValueError("the lower mouth part comes with the upper one: set mouth=True")
        if jaw_regressor is not None and jaw_regressor.shape != (num_expr, 3):
            raise ValueError(
                f"the lower mouth part needs one row of its jaw regressor "
                f"{jaw_regressor.shape} per expression, num_expr is {num_expr}"
            )
        self.num_shape, self.num_expr = num_shape, num_expr
        self.mouth, self.lower_jaw = mouth, jaw_regressor is not None
        self.folder = folder

        shapes = arrays["shapedirs"].astype(np.float64)
        identity = shapes[..., :num_shape]
        expression = shapes[..., MAX_SHAPE : MAX_SHAPE + num_expr].copy()
        if blink is not None:
            expression[..., -1] = blink
        regressor = arrays["J_regressor"].astype(np.float64)
        template = arrays["v_template"].astype(np.float64)

        def buffer(name: str, values: np.ndarray) -> None:
            tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
            self.register_buffer(name, tensor, persistent=False)

        # Bases act on row vectors of coefficients; coordinates are planar (x of all vertices, then
        # y, then z), which keeps the skinning arithmetic contiguous.
        def planar(basis: np.ndarray) -> np.ndarray:
            return basis.transpose(2, 1, 0).reshape(basis.shape[2], -1)

        buffer("template", template.T.reshape(-1))
        buffer("shape_basis", planar(identity))
        # Expression and pose correctives add up linearly: one product serves both.
        posedirs = arrays["posedirs"].astype(np.float64)
        buffer("pose_basis", np.concatenate([planar(expression), planar(posedirs)]))
        buffer("joint_template", regressor @ template)
        joint_bases = [
            np.einsum("jv,vcn->njc", regressor, basis).reshape(basis.shape[2], -1)
            for basis in (identity, expression)
        ]
        buffer("joint_shape_basis", joint_bases[0])
        buffer("joint_expression_basis", joint_bases[1])
        buffer("skinning_weights", arrays["weights"].T)
        buffer("jaw_regressor", np.zeros((0, 3)) if jaw_regressor is None else jaw_regressor)
        self.register_buffer(
            "faces", torch.from_numpy(np.asarray(faces, np.int64)), persistent=False
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        num_shape: int = 150,
        num_expr: int = 65,
        mouth: bool = True,
        lower_jaw: bool = False,
        blink: bool = True,
    ) -> HeadModel:
        """Loads a head model folder as written by `prepare_head_model`.

        Args:
            folder: the folder.
            num_shape: shape coefficients, up to 300.
            num_expr: expression coefficients, up to 100; the last one is the blink.
            mouth: append the upper mouth part (200 vertices).
            lower_jaw: append the lower one (200 more).
            blink: replace the last expression by the blink blendshape.

        Raises:
            InputFileError: a file is missing or wrong.
        """
        folder = Path(folder)
        arrays = read_flame_arrays(folder / MODEL_FILE)
        if lower_jaw:
            faces = load_avatar_template(folder).faces
        elif mouth:
            faces = load_flame_template(folder).faces
        else:
            faces = arrays["f"]
        return cls(
            arrays,
            faces,
            blink=read_companion_array(folder / BLINK_FILE, (NUM_HEAD_VERTICES, 3))
            if blink
            else None,
            jaw_regressor=(
                read_companion_array(folder / JAW_REGRESSOR_FILE, (None, 3)) if lower_jaw else None
            ),
            num_shape=num_shape,
            num_expr=num_expr,
            mouth=mouth,
            folder=folder,
        )

    @property
    def num_vertices(self) -> int:
        """V: 5023, 5223 or 5423."""
        return NUM_HEAD_VERTICES + 200 * (int(self.mouth) + int(self.lower_jaw))

    def neutral(self, shape: Tensor) -> Tensor:
        """Vertices of an identity before pose correctives: (S,) -> (V, 3), (T, S) -> (T, V, 3)."""
        head = self._neutral_planar(shape)
        parts = [head.unflatten(-1, (3, -1)).transpose(-1, -2)]
        if self.mouth:
            mouth = self._neutral_mouth(shape, head)
            parts += [mouth] * (2 if self.lower_jaw else 1)
        return torch.cat(parts, dim=-2)

    def forward(
        self,
        shape: Tensor,
        expr: Tensor,
        rot: Tensor,
        tra: Tensor,
        eye_rot: Tensor | None = None,
        jaw_rot: Tensor | None = None,
        neck_rot: Tensor | None = None,
    ) -> HeadOutput:
        """Poses T heads.

        Args:
            shape: (num_shape,) or (T, num_shape).
            expr: (T, num_expr).
            rot: (T, 3) head rotation.
            tra: (T, 3) head translation.
            eye_rot: (T, 3) rotation of both eyes.
            jaw_rot: (T, 3) rotation of the jaw joint.
            neck_rot: (T, 3) rotation of the lower neck (joint 0); the head stays.

        Returns:
            Vertices, offsets and transforms. In `transforms` the bottom right entry is the sum of
            the skinning weights; rows of the upper mouth part are zero, the lower one's hold the
            rotation of the jaw, but not the translation that goes with it.
        """
        frames = len(expr)
        eye = self._joint_rotation(eye_rot, frames)
        neck, jaw = self._joint_rotation(neck_rot, frames), self._joint_rotation(jaw_rot, frames)
        identity = torch.eye(3, dtype=expr.dtype, device=expr.device)
        still = identity.expand(frames, 3, 3)
        rotations = torch.stack([neck, still, jaw, eye, eye], dim=1)  # (T, 5, 3, 3)

        # The identity is subtracted twice: a slip of the published model that its fits contain.
        # Stacked, not picked by index: that would copy the index to the device every time.
        correctives = torch.stack([neck, jaw, eye, eye], dim=1)  # of joints 0, 2, 3, 4
        features = (correctives - 2.0 * identity).flatten(1)
        neutral = self._neutral_planar(shape)
        moved = neutral + torch.cat([expr, features], dim=-1) @ self.pose_basis
        moved = moved.unflatten(-1, (3, -1))  # (T, 3, V)

        joints = self.joint_template.flatten() + shape @ self.joint_shape_basis
        joints = (joints + expr @ self.joint_expression_basis).unflatten(-1, (NUM_JOINTS, 3))
        translations = joints - (rotations @ joints.unsqueeze(-1)).squeeze(-1)
        affine = torch.cat([rotations, translations.unsqueeze(-1)], dim=-1)  # (T, 5, 3, 4)
        blended = affine.flatten(2).transpose(1, 2) @ self.skinning_weights  # (T, 12, V)
        blended = blended.unflatten(1, (3, 4))
        posed = blended[:, :, 3]
        for axis in range(3):
            posed = torch.addcmul(posed, blended[:, :, axis], moved[:, None, axis])

        offsets = (posed - neutral.unflatten(-1, (3, -1))).transpose(1, 2)
        vertices = posed.transpose(1, 2)
        lower_rotation = None
        if self.mouth:
            upper = self._neutral_mouth(shape, neutral).expand(frames, -1, -1)
            parts, offset_parts = [vertices, upper], [offsets, torch.zeros_like(upper)]
            if self.lower_jaw:
                lower_rotation = rodrigues(expr @ self.jaw_regressor)
                lower = rotate_about(upper, self.jaw_joint(shape), lower_rotation)
                parts.append(lower)
                offset_parts.append(lower - upper)
            vertices, offsets = torch.cat(parts, dim=1), torch.cat(offset_parts, dim=1)
        head_rotation = rodrigues(rot)
        vertices = vertices @ head_rotation.transpose(1, 2) + tra.unsqueeze(1)

        def transforms() -> Tensor:
            return self._transforms(blended, head_rotation, tra, lower_rotation)

        return HeadOutput(vertices, offsets.contiguous(), transforms)

    def _transforms(
        self, blended: Tensor, head_rotation: Tensor, tra: Tensor, lower_rotation: Tensor | None
    ) -> Tensor:
        frames = len(blended)
        local = blended.new_zeros(frames, self.num_vertices, 4, 4)
        local[:, :NUM_HEAD_VERTICES, :3] = blended.permute(0, 3, 1, 2)
        local[:, :NUM_HEAD_VERTICES, 3, 3] = self.skinning_weights.sum(0)
        if lower_rotation is not None:
            local[:, -200:, :3, :3] = lower_rotation.unsqueeze(1)
            local[:, -200:, 3, 3] = 1.0
        base = blended.new_zeros(frames, 1, 4, 4)
        base[:, 0, :3, :3] = head_rotation
        base[:, 0, :3, 3] = tra
        base[:, 0, 3, 3] = 1.0
        return base @ local

    def _joint_rotation(self, rotvec: Tensor | None, frames: int) -> Tensor:
        if rotvec is None:
            return torch.eye(3, device=self.template.device).expand(frames, 3, 3)
        return rodrigues(rotvec)

    def _neutral_planar(self, shape: Tensor) -> Tensor:
        """Neutral head, (..., 3 * 5023) with all x first."""
        return self.template + shape @ self.shape_basis

    def jaw_joint(self, shape: Tensor) -> Tensor:
        """Jaw joint of an identity's neutral head: (S,) -> (3,), (T, S) -> (T, 3)."""
        joints = self.joint_template.flatten() + shape @ self.joint_shape_basis
        return joints.unflatten(-1, (NUM_JOINTS, 3))[..., _JAW_JOINT, :]

    def _neutral_mouth(self, shape: Tensor, neutral: Tensor) -> Tensor:
        lip = neutral.unflatten(-1, (3, -1))[..., LOWER_LIP_VERTEX]
        return place_mouth(self.jaw_joint(shape), lip)


def read_flame_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads and checks flame.npz.

    Raises:
        InputFileError: missing or wrong array.
    """
    arrays = read_npz(path, "a converted head model (flame.npz)")
    vertices = NUM_HEAD_VERTICES
    result = {
        name: take_array(arrays, path, name, shape)
        for name, shape in (
            ("v_template", (vertices, 3)),
            ("shapedirs", (vertices, 3, MAX_SHAPE + MAX_EXPRESSION)),
            ("posedirs", (vertices, 3, 9 * NUM_CORRECTIVES)),
            ("J_regressor", (NUM_JOINTS, vertices)),
            ("weights", (vertices, NUM_JOINTS)),
        )
    }
    result["f"] = take_array(arrays, path, "f", (None, 3), np.int64)
    result["kintree_table"] = take_array(arrays, path, "kintree_table", (2, NUM_JOINTS), np.int64)
    return result


def read_companion_array(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """Reads a .npy companion of known shape as float32.

    Raises:
        InputFileError: missing, no plain array, or another shape.
    """
    path = require_file(path, f"an array of shape {shape} (.npy)")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputFileError(path, f"no readable array ({error})", "a .npy file") from None
    if not isinstance(array, np.ndarray):
        raise InputFileError(path, "an archive", "a .npy file")
    return take_array({path.stem: array}, path, path.stem, shape)
