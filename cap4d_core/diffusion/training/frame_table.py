"""Frames of many subjects as tensors: what a trainer needs to know about every picture.

Nothing here depends on which frames are drawn together: the reference channel and the axes of the
ray directions belong to a batch and are filled in by `batches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_safetensors, write_safetensors


@dataclass(frozen=True)
class FrameTable:
    """N frames of S subjects; those of a subject lie together. S' is the latents' side.

    Attributes:
        surface: (N, S', S', C - 5) float16 positional encoding and displacement.
        crop_masks: (N, S', S') uint8, 1 where the crop shows the photo (matters for references).
        intrinsics: (N, 4) float32 fx, fy, cx, cy of the crop, in latent pixels.
        cameras: (N, 3, 3) float32 world-to-camera rotations.
        heads: (N, 3, 3) float32 rotations of the heads, OpenCV axes.
        starts: (S + 1,) int64 on the CPU, first frame of every subject, and N.
        images: (N, 3, H, W) uint8, background white; None once encoded.
        means, stds: (N, C', S', S') float16 posterior of the unscaled latents; None before.
    """

    surface: Tensor
    crop_masks: Tensor
    intrinsics: Tensor
    cameras: Tensor
    heads: Tensor
    starts: Tensor
    images: Tensor | None = None
    means: Tensor | None = None
    stds: Tensor | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.surface)

    @property
    def num_subjects(self) -> int:
        """S."""
        return len(self.starts) - 1

    def counts(self) -> Tensor:
        """(S,) frames per subject."""
        return self.starts.diff()

    def to(self, device: torch.device | str) -> FrameTable:
        """Same frames on a device; `starts` stay on the CPU."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if f.name != "starts" and getattr(self, f.name) is not None
        }
        return replace(self, **moved)

    def subjects(self, first: int, last: int) -> FrameTable:
        """The subjects first..last-1; tensors are views."""
        a, b = int(self.starts[first]), int(self.starts[last])
        parts = {
            f.name: getattr(self, f.name)[a:b]
            for f in fields(self)
            if f.name != "starts" and getattr(self, f.name) is not None
        }
        return FrameTable(starts=self.starts[first : last + 1] - a, **parts)

    @classmethod
    def cat(cls, parts: Sequence[FrameTable]) -> FrameTable:
        """All subjects of all parts, in order."""
        starts, offset = [torch.zeros(1, dtype=torch.int64)], 0
        for part in parts:
            starts.append(part.starts[1:] + offset)
            offset += len(part)
        joined = {
            f.name: torch.cat([getattr(p, f.name) for p in parts])
            for f in fields(cls)
            if f.name != "starts" and getattr(parts[0], f.name) is not None
        }
        return cls(starts=torch.cat(starts), **joined)

    def write(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Writes a safetensors file."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        write_safetensors(path, {k: t for k, t in tensors.items() if t is not None}, metadata)

    @classmethod
    def read(cls, path: str | Path) -> tuple[FrameTable, dict[str, str]]:
        """What `write` wrote, with its metadata.

        Raises:
            InputFileError: unreadable, or another file.
        """
        what = "prepared training frames"
        tensors, metadata = read_safetensors(path, what)
        names = {f.name for f in fields(cls)}
        optional = {"images", "means", "stds"}
        if not names - optional <= set(tensors) <= names:
            raise InputFileError(
                path, f"tensors {', '.join(sorted(tensors))}", what, "Delete it and run again."
            )
        return cls(**tensors), metadata
