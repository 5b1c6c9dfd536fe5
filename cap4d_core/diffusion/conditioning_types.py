"""What the denoiser is told about its frames.

Channel layout of `pos_enc` in the released model (channels last):
42 positional encoding | 3 expression offset | 3 ray direction | 1 reference mask | 1 crop mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameConditioning:
    """Conditioning of frames; the leading axes are (N,) frames or (b, V) batches of views.

    Attributes:
        pos_enc: (..., h, w, C) conditioning maps, zero in the unconditional branch.
        z_input: (..., 4, h, w) clean latents of references; ignored where `ref_mask` is 0.
        ref_mask: (..., 1, h, w) 1 at pixels of reference frames, else 0.
    """

    pos_enc: Tensor
    z_input: Tensor
    ref_mask: Tensor

    def __post_init__(self) -> None:
        lead, size = self.pos_enc.shape[:-3], self.pos_enc.shape[-3:-1]
        for name in ("z_input", "ref_mask"):
            shape = getattr(self, name).shape
            if shape[:-3] != lead or shape[-2:] != size:
                raise ValueError(
                    f"{name} of shape {tuple(shape)} does not fit pos_enc of shape "
                    f"{tuple(self.pos_enc.shape)} (frames and height, width must agree)"
                )

    def __len__(self) -> int:
        """Size of the first axis."""
        return len(self.pos_enc)

    def index(self, ids: Tensor | Sequence[int] | slice) -> FrameConditioning:
        """The frames `ids` of the first axis, in that order."""
        if not isinstance(ids, slice):
            ids = torch.as_tensor(ids, dtype=torch.long, device=self.pos_enc.device)
        return FrameConditioning(self.pos_enc[ids], self.z_input[ids], self.ref_mask[ids])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FrameConditioning:
        """Same frames on a device and in a floating-point type."""
        return FrameConditioning(
            self.pos_enc.to(device=device, dtype=dtype),
            self.z_input.to(device=device, dtype=dtype),
            self.ref_mask.to(device=device, dtype=dtype),
        )

    def unconditional(self) -> FrameConditioning:
        """Frames of the unconditional branch of classifier-free guidance.

        Everything is zero, the clean latents of references included; only `ref_mask` stays, so
        reference slots still are reference slots.
        """
        return FrameConditioning(
            torch.zeros_like(self.pos_enc), torch.zeros_like(self.z_input), self.ref_mask
        )

    @classmethod
    def stack(cls, parts: Sequence[FrameConditioning]) -> FrameConditioning:
        """Puts parts of equal shape along a new first axis."""
        return cls(
            torch.stack([p.pos_enc for p in parts]),
            torch.stack([p.z_input for p in parts]),
            torch.stack([p.ref_mask for p in parts]),
        )

    @classmethod
    def cat(cls, parts: Sequence[FrameConditioning]) -> FrameConditioning:
        """Joins parts along the first axis."""
        return cls(
            torch.cat([p.pos_enc for p in parts]),
            torch.cat([p.z_input for p in parts]),
            torch.cat([p.ref_mask for p in parts]),
        )
