"""Conditioning maps: what the denoiser is told about pose, expression and camera of each frame.

The head mesh is rasterized into the crop at a multiple of the latents' resolution; each pixel takes
its place on the neutral head (positional encoding) and its displacement by the expression. Encoding
comes before averaging down, as in the released model.

Channels, last axis: positional encoding | 3 displacement | 3 ray direction | 1 reference | 1 crop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.embeddings import POSITION_FREQUENCIES, encode_positions
from cap4d_core.diffusion.frames import crop_mask, head_in_crops, ray_maps
from cap4d_core.diffusion.model_config import ConditioningConfig, MMDMConfig
from cap4d_core.errors import UserError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.mesh_rasterizer import Fragments, rasterize

NUM_MOUTH_VERTICES = 200
# Views rendered together on a GPU, which a single one does not fill. Memory: about 0.15 GB each.
VIEWS_AT_ONCE = 16
# Maps of one shard at the released size are 90 MB; all 840 views would be 0.7 GB.
CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class RendererTables:
    """Constant tables: faces (F, 3) int64, face_mask (F,) bool, props (V, 3), frequencies (K,)."""

    faces: Tensor
    face_mask: Tensor
    props: Tensor
    frequencies: Tensor

    @classmethod
    def from_template(
        cls,
        vertices: NDArray[Any],
        faces: NDArray[Any],
        head_vertex_ids: NDArray[Any] | Iterable[int],
    ) -> RendererTables:
        """Tables of a head template with the mouth's vertices last.

        Positions are centred on the mean of all vertices and divided by their largest signed entry;
        faces count when any corner is a head or mouth vertex.
        """
        v = np.asarray(vertices, np.float64)
        props = v - v.mean(axis=0)
        props = (props / props.max()).astype(np.float32)
        inside = np.zeros(len(v), bool)
        inside[np.asarray(list(head_vertex_ids), np.int64)] = True
        inside[-NUM_MOUTH_VERTICES:] = True
        corners = np.asarray(faces, np.int64)
        return cls(
            torch.from_numpy(corners),
            torch.from_numpy(inside[corners].any(axis=1)),
            torch.from_numpy(props),
            torch.tensor(POSITION_FREQUENCIES),
        )

    @classmethod
    def from_weights(cls, tables: Mapping[str, Tensor]) -> RendererTables:
        """Tables stored with a model (`MMDM.tables`); they are what its weights were trained on."""
        return cls(tables["faces"], tables["face_mask"], tables["props"], tables["freqs"])

    def to(self, device: torch.device | str) -> RendererTables:
        """Same tables on a device."""
        return RendererTables(
            self.faces.to(device),
            self.face_mask.to(device),
            self.props.to(device),
            self.frequencies.to(device),
        )


def conditioning_maps(
    vertices: Tensor,
    offsets: Tensor,
    rays: Tensor,
    reference_mask: Tensor,
    crop_masks: Tensor,
    tables: RendererTables,
    config: ConditioningConfig,
) -> Tensor:
    """Conditioning maps of n frames.

    Args:
        vertices: (n, V, 3) in rasterizer coordinates of the crop.
        offsets: (n, V, 3) displacement by expression, metres.
        rays: (n, 3, size, size) ray directions; their size is that of the maps.
        reference_mask: (n, size, size) 1 for references.
        crop_masks: (n, size, size) 1 where the crop shows the image.
        tables: constant tables on the same device.
        config: super-resolution, scale of the displacement.

    Returns:
        (n, size, size, C) float32.
    """
    size = rays.shape[-1]
    fine = size * config.super_resolution
    fragments = rasterize(vertices, tables.faces, (fine, fine))
    surface = _surface_channels(fragments, offsets, tables, config)
    coarse = F.avg_pool2d(surface.movedim(-1, 1), config.super_resolution)
    parts = [
        coarse,
        rays.to(coarse),
        reference_mask.to(coarse)[:, None],
        crop_masks.to(coarse)[:, None],
    ]
    return torch.cat(parts, dim=1).movedim(1, -1).contiguous()


def _surface_channels(
    fragments: Fragments, offsets: Tensor, tables: RendererTables, config: ConditioningConfig
) -> Tensor:
    """(n, H, W, positional + 3); zero where no face or a masked one is seen."""
    shown = fragments.covered & tables.face_mask[fragments.face_index.clamp(min=0)]
    frame, row, column = torch.nonzero(shown, as_tuple=True)
    corners = tables.faces[fragments.face_index[frame, row, column]]
    weights = fragments.barycentrics[frame, row, column].unsqueeze(-1)
    position = (weights * tables.props[corners]).sum(1)
    displacement = offsets[frame[:, None], corners] / config.std_expr_deformation
    encoded = encode_positions(position, tables.frequencies, config.positional_multiplier)
    values = torch.cat([encoded, (weights * displacement).sum(1)], dim=-1)
    result = values.new_zeros(*shown.shape, values.shape[-1])
    result[frame, row, column] = values
    return result


class ConditioningRenderer:
    """Renders conditioning of planned views and references on the device of the head model.

    Args:
        head: head model with the mouth, on the device to render on.
        tables: constant tables.
        config: the diffusion model's.
        frame_extr: (4, 4) world-to-camera in whose axes ray directions are given: the base
            reference's.

    Raises:
        UserError: model and tables or head do not fit each other.
    """

    def __init__(
        self,
        head: HeadModel,
        tables: RendererTables,
        config: MMDMConfig,
        frame_extr: NDArray[Any],
    ) -> None:
        positional = 6 * len(tables.frequencies)
        stated = config.conditioning.positional_channels
        if positional != stated or config.condition_channels != positional + 8:
            raise UserError(
                f"The diffusion model takes {config.condition_channels} condition channels, "
                f"{stated} of them positional; its tables give {positional} + 8. "
                "Prepare the model again (rule prepare_mmdm)."
            )
        if len(tables.props) != head.num_vertices:
            raise UserError(
                f"The diffusion model knows {len(tables.props)} head vertices, the head model "
                f"has {head.num_vertices}: weights and head model (head_model.path) do not "
                "belong together."
            )
        self.head = head
        self.device = head.faces.device
        self.tables = tables.to(self.device)
        self.config = config
        self.frame_extr = np.asarray(frame_extr)

    def maps(self, views: Sequence[ViewParameters], is_reference: bool) -> Tensor:
        """(n, h, w, C) conditioning maps of views."""
        size = self.config.latent_size
        vertices, offsets = head_in_crops(self.head, views)
        shape = (len(views), size, size)
        if is_reference:
            masks = [crop_mask(view.resolution, view.crop_box, size) for view in views]
            inside = torch.from_numpy(np.stack(masks)).to(self.device)
        else:
            # Generated crops are complete wherever they lie.
            inside = torch.ones(shape, device=self.device)
        return conditioning_maps(
            vertices,
            offsets,
            ray_maps(views, size, self.frame_extr).to(self.device, torch.float32),
            torch.full(shape, float(is_reference), device=self.device),
            inside,
            self.tables,
            self.config.conditioning,
        )

    def references(self, views: Sequence[ViewParameters], latents: Tensor) -> FrameConditioning:
        """Conditioning of references with clean latents (n, 4, h, w)."""
        maps = torch.cat([self.maps([view], is_reference=True) for view in views])
        clean = latents.to(self.device, torch.float32)
        return FrameConditioning(maps, clean, torch.ones_like(clean[:, :1]))


class RenderedViews:
    """Conditioning of planned views, rendered when asked for and kept as far as memory allows.

    Bits of a view must not depend on what is asked for with it: a resumed job must see what the
    killed one saw. So views are rendered one by one or, on a GPU, always in the same equal blocks.

    Args:
        renderer: renders them.
        views: all views that ids refer to.
        cache_bytes: maps kept for the next time; 0 renders anew at every step.
    """

    def __init__(
        self,
        renderer: ConditioningRenderer,
        views: Sequence[ViewParameters],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.renderer = renderer
        self.views = list(views)
        config = renderer.config
        self.latent_shape = (config.in_channels, config.latent_size, config.latent_size)
        self._capacity = cache_bytes // (4 * config.condition_channels * config.latent_size**2)
        self._kept: dict[int, Tensor] = {}
        self._block = VIEWS_AT_ONCE if renderer.device.type == "cuda" else 1
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.views)

    def index(self, ids: Tensor | Sequence[int] | slice) -> FrameConditioning:
        """The views `ids`, in that order; latents and reference masks are zero."""
        if isinstance(ids, slice):
            ids = list(range(*ids.indices(len(self.views))))
        maps = torch.stack([self._map(int(i)) for i in ids])
        zeros = maps.new_zeros(len(maps), *self.latent_shape)
        return FrameConditioning(maps, zeros, zeros[:, :1])

    def _map(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        first = index - index % self._block
        if self._last is None or self._last[0] != first:
            views = self.views[first : first + self._block]
            filled = views + views[-1:] * (self._block - len(views))
            rendered = self.renderer.maps(filled, is_reference=False)
            self._last = first, rendered
            for i in range(first, first + len(views)):
                if len(self._kept) < self._capacity:
                    self._kept[i] = rendered[i - first]
        return self._last[1][index - first]
