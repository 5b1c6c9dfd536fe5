"""Triangle rasterization: which face covers which pixel, and where on it.

Conventions (those of PyTorch3D's `rasterize_meshes`):
    Vertices are (x, y, z): x, y normalised with +x LEFT and +y UP, z > 0 a depth that only orders.
    A picture of H x W pixels spans [-1, 1] along its shorter side and [-s, s] along the longer one,
    s = longer / shorter. Square pictures: column j has its centre at x = 1 - (2j + 1) / W, row i at
    y = 1 - (2i + 1) / H.
    Front faces are counter-clockwise in the picture as seen.
    A pixel belongs to a face when all three barycentrics of its centre are strictly positive:
    pixels on an edge belong to no face. The smallest depth wins, equal depths the lower face index.
    No gradients, no clipping against the frustum (parts outside the picture are not sampled).

Backends give the same result; `rasterize` is the one place that chooses.
    numba      compiled z-buffer, CPU
    torch      fragments and a scatter reduction, CPU and CUDA
    pytorch3d  if that package is installed
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cap4d_core.errors import UserError

RasterizerBackend = Literal["auto", "builtin", "numba", "torch", "pytorch3d"]


@dataclass(frozen=True)
class Fragments:
    """What each pixel sees; empty pixels hold -1 everywhere.

    face_index (B, H, W) int64 into the faces; barycentrics (B, H, W, 3), depth (B, H, W) float32.
    """

    face_index: Tensor
    barycentrics: Tensor
    depth: Tensor

    @property
    def covered(self) -> Tensor:
        """(B, H, W) bool."""
        return self.face_index >= 0


def rasterize(
    vertices: Tensor,
    faces: Tensor,
    size: tuple[int, int],
    *,
    perspective: bool = False,
    cull_backfaces: bool = True,
    backend: RasterizerBackend = "auto",
) -> Fragments:
    """Rasterizes B meshes that share their faces.

    Args:
        vertices: (B, V, 3) normalised x, y and depth, see the module's conventions.
        faces: (F, 3) vertex indices.
        size: (height, width) in pixels.
        perspective: barycentrics correct for perspective, with z the camera depth, instead of
            affine in the picture.
        cull_backfaces: skip faces that are clockwise in the picture.
        backend: 'auto' = numba on the CPU (torch if it is not installed); on CUDA pytorch3d if
            installed, else torch. 'builtin' = numba or torch.

    Returns:
        Fragments on the device of `vertices`.

    Raises:
        UserError: a backend was named that cannot run here.
        ValueError: wrong shapes.
    """
    if vertices.ndim != 3 or vertices.shape[-1] != 3 or faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(
            f"rasterize takes vertices (B, V, 3) and faces (F, 3), got {tuple(vertices.shape)} "
            f"and {tuple(faces.shape)}"
        )
    vertices = vertices.detach().to(torch.float32)
    faces = faces.to(vertices.device, torch.int64)
    chosen = _choose_backend(backend, vertices.device)
    if chosen == "numba":
        from cap4d_core.geometry.mesh_rasterizer_numba import rasterize_numba

        arrays = rasterize_numba(vertices.numpy(), faces.numpy(), size, perspective, cull_backfaces)
        return Fragments(*(torch.from_numpy(array) for array in arrays))
    if chosen == "torch":
        return _rasterize_torch(vertices, faces, size, perspective, cull_backfaces)
    return _rasterize_pytorch3d(vertices, faces, size, perspective, cull_backfaces)


@lru_cache(maxsize=1)
def _numba_is_installed() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def _choose_backend(backend: RasterizerBackend, device: torch.device) -> str:
    installed = importlib.util.find_spec("pytorch3d") is not None
    if backend == "auto" and device.type == "cuda" and installed:
        return "pytorch3d"
    if backend in ("auto", "builtin"):
        return "numba" if device.type == "cpu" and _numba_is_installed() else "torch"
    if backend == "pytorch3d" and not installed:
        raise UserError(
            "The mesh rasterizer 'pytorch3d' was asked for, but pytorch3d is not installed. "
            "Use 'auto' or 'builtin' (same results), or install pytorch3d."
        )
    if backend == "numba" and device.type != "cpu":
        raise UserError(
            f"The mesh rasterizer 'numba' runs on the CPU, the mesh is on {device}. Use 'torch'."
        )
    if backend == "numba" and not _numba_is_installed():
        raise UserError(
            "The mesh rasterizer 'numba' was asked for, but numba is not installed. "
            "Use 'auto' or 'torch' (same results), or install numba."
        )
    return backend


def interpolate(fragments: Fragments, faces: Tensor, attributes: Tensor) -> Tensor:
    """Vertex attributes at every pixel; zero where no face is.

    Args:
        fragments: result of `rasterize`.
        faces: (F, 3) indices into the attributes' vertex axis (may differ from the positions', e.g.
            for texture coordinates).
        attributes: (V, C) or (B, V, C); gradients flow to them.

    Returns:
        (B, H, W, C).
    """
    covered = fragments.covered
    batch, row, column = torch.nonzero(covered, as_tuple=True)
    corners = faces.to(attributes.device)[fragments.face_index[batch, row, column]]
    values = (
        attributes[corners] if attributes.ndim == 2 else attributes[batch[:, None], corners]
    )  # (P, 3, C)
    weights = fragments.barycentrics[batch, row, column].to(attributes.dtype)
    pixels = (weights.unsqueeze(-1) * values).sum(1)
    result = attributes.new_zeros(*covered.shape, attributes.shape[-1])
    return result.index_put((batch, row, column), pixels)


def pixel_centers(count: int, other: int) -> tuple[float, float]:
    """Half range of an axis of `count` pixels, and the normalised size of a pixel."""
    half = count / other if count > other else 1.0
    return half, 2.0 * half / count


def screen_to_ndc(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel coordinates (x, y, further...) to normalised ones, for any aspect ratio.

    Args:
        points: (..., 2 or more); x to the right, y down, pixel edges at whole numbers.
        size: (height, width).
    """
    height, width = size
    result = points.clone()
    for axis, (count, other) in enumerate(((width, height), (height, width))):
        half, step = pixel_centers(count, other)
        result[..., axis] = half - points[..., axis] * step
    return result


@lru_cache(maxsize=64)
def axis_coordinates(count: int, other: int, device: torch.device) -> Tensor:
    """(count,) float32 normalised centres of the columns (or rows), from +half to -half.

    Evaluated in the order of operations of the reference implementation, so that centres, and with
    them the pixels on edges, agree to the last bit for every size. Cached: do not write to it.
    """
    span = 2.0 * count / other if count > other else 2.0
    span_f32 = torch.tensor(span, dtype=torch.float32, device=device)
    offset = span_f32 / 2.0
    index = torch.arange(count - 1, -1, -1, dtype=torch.float32, device=device)
    return -offset + (span_f32 * index + offset) / count


# Fragments expanded at once by the torch backend; bounds its memory to about 1 GB.
_MAX_FRAGMENTS = 1 << 22
# Pixels by which a face's box of pixel centres is widened: rounding must not lose one. A box of
# float32 pixel positions is off by less than 1e-6 of the picture's size.
_SLACK = 0.05


def _edge(px: Tensor, py: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor) -> Tensor:
    return (px - ax) * (by - ay) - (py - ay) * (bx - ax)


def _barycentrics(corners: Tensor, px: Tensor, py: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unclipped affine barycentrics of points (P,) in triangles (P, 3, 3)."""
    (x0, y0, _), (x1, y1, _), (x2, y2, _) = (corner.unbind(-1) for corner in corners.unbind(1))
    area = _edge(x2, y2, x0, y0, x1, y1) + 1e-8
    return (
        _edge(px, py, x1, y1, x2, y2) / area,
        _edge(px, py, x2, y2, x0, y0) / area,
        _edge(px, py, x0, y0, x1, y1) / area,
    )


def _normalised(
    weights: tuple[Tensor, Tensor, Tensor], z: tuple[Tensor, Tensor, Tensor], perspective: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Final barycentrics and depth of covered points."""
    w0, w1, w2 = weights
    z0, z1, z2 = z
    if perspective:
        w0, w1, w2 = w0 * z1 * z2, w1 * z0 * z2, w2 * z0 * z1
        total = (w0 + w1 + w2).clamp(min=1e-8)
        w0, w1, w2 = w0 / total, w1 / total, w2 / total
    total = (w0 + w1 + w2).clamp(min=1e-5)
    w0, w1, w2 = w0 / total, w1 / total, w2 / total
    return (w0, w1, w2), w0 * z0 + w1 * z1 + w2 * z2


def _chunks(ends: Tensor) -> list[tuple[int, int, int]]:
    """Parts of at most about _MAX_FRAGMENTS fragments: first face, last + 1, fragments.

    Args:
        ends: (K,) running sum of the faces' fragments.
    """
    total = int(ends[-1]) if len(ends) else 0
    steps = torch.arange(
        _MAX_FRAGMENTS, max(total, _MAX_FRAGMENTS), _MAX_FRAGMENTS, device=ends.device
    )
    # A face belongs to the part in which its last fragment lies.
    cuts = torch.searchsorted(ends, steps, right=True)
    before = torch.where(cuts > 0, ends[(cuts - 1).clamp(min=0)], 0)
    bounds = [[0, 0], *torch.stack([cuts, before], 1).tolist(), [len(ends), total]]
    return [
        (first[0], last[0], last[1] - first[1])
        for first, last in pairwise(bounds)
        if last[0] > first[0]
    ]


def _rasterize_torch(
    vertices: Tensor, faces: Tensor, size: tuple[int, int], perspective: bool, cull: bool
) -> Fragments:
    height, width = size
    batch, num_faces, device = len(vertices), len(faces), vertices.device
    columns = axis_coordinates(width, height, device)
    rows = axis_coordinates(height, width, device)
    triangles = vertices[:, faces].reshape(-1, 3, 3)  # (B F, corner, xyz)
    x, y, z = triangles.unbind(-1)
    area = _edge(x[:, 0], y[:, 0], x[:, 1], y[:, 1], x[:, 2], y[:, 2])
    usable = (area > 1e-8) if cull else (area.abs() > 1e-8)
    usable &= z.amin(1) >= 1e-8

    def pixel_range(values: Tensor, count: int, other: int) -> tuple[Tensor, Tensor]:
        half, step = pixel_centers(count, other)
        first = ((half - values.amax(1)) / step - 0.5 - _SLACK).ceil().clamp(0, count)
        last = ((half - values.amin(1)) / step - 0.5 + _SLACK).floor().clamp(-1, count - 1)
        usable.logical_and_(torch.isfinite(first) & torch.isfinite(last))
        return first.nan_to_num().int(), last.nan_to_num().int()

    left, right = pixel_range(x, width, height)
    top, bottom = pixel_range(y, height, width)
    box_width = (right - left + 1).clamp(min=0)
    counts = torch.where(usable, box_width * (bottom - top + 1).clamp(min=0), 0)
    picked = torch.nonzero(counts > 0).squeeze(1)
    empty = torch.iinfo(torch.int64).max
    buffer = torch.full((batch * height * width,), empty, dtype=torch.int64, device=device)

    for start, stop, total in _chunks(counts[picked].cumsum(0)):
        selected = picked[start:stop]
        number = counts[selected]
        # Where a fragment's face is among the selected ones, and its place in that face's box.
        face = torch.repeat_interleave(number, output_size=total)
        step = torch.arange(total, dtype=torch.int32, device=device)
        step -= (number.cumsum(0, dtype=torch.int32) - number)[face]
        span = box_width[selected][face]
        line = torch.div(step, span, rounding_mode="floor")
        column = left[selected][face] + (step - line * span)
        row = top[selected][face] + line
        px, py = columns[column], rows[row]
        shown = triangles[selected]
        low, high = shown[..., :2].amin(1)[face], shown[..., :2].amax(1)[face]
        inside = (px >= low[:, 0]) & (px <= high[:, 0]) & (py >= low[:, 1]) & (py <= high[:, 1])
        corners = shown[face]
        weights = _barycentrics(corners, px, py)
        inside &= (weights[0] > 0) & (weights[1] > 0) & (weights[2] > 0)
        keep = torch.nonzero(inside).squeeze(1)
        owner, row, column, corners = selected[face[keep]], row[keep], column[keep], corners[keep]
        kept = (weights[0][keep], weights[1][keep], weights[2][keep])
        cz = (corners[:, 0, 2], corners[:, 1, 2], corners[:, 2, 2])
        _, depth = _normalised(kept, cz, perspective)
        # Positive floats order like their bits: the smallest key is the nearest, lowest face.
        key = (depth.view(torch.int32).long() << 32) | (owner % num_faces)
        pixel = (torch.div(owner, num_faces, rounding_mode="floor") * height + row) * width + column
        buffer.scatter_reduce_(0, pixel, key, "amin")

    hit = torch.nonzero(buffer != empty).squeeze(1)
    face = buffer[hit] & 0xFFFFFFFF
    image = torch.div(hit, height * width, rounding_mode="floor")
    corners = triangles[image * num_faces + face]
    px = columns[hit % width]
    py = rows[torch.div(hit, width, rounding_mode="floor") % height]
    cz = (corners[:, 0, 2], corners[:, 1, 2], corners[:, 2, 2])
    weights, depth = _normalised(_barycentrics(corners, px, py), cz, perspective)

    face_index = torch.full_like(buffer, -1)
    face_index[hit] = face
    barycentrics = torch.full((len(buffer), 3), -1.0, device=device)
    barycentrics[hit] = torch.stack(weights, -1)
    depths = torch.full((len(buffer),), -1.0, device=device)
    depths[hit] = depth
    shape = (batch, height, width)
    return Fragments(face_index.view(shape), barycentrics.view(*shape, 3), depths.view(shape))


def _rasterize_pytorch3d(
    vertices: Tensor, faces: Tensor, size: tuple[int, int], perspective: bool, cull: bool
) -> Fragments:
    from pytorch3d.renderer.mesh import rasterize_meshes
    from pytorch3d.structures import Meshes

    meshes = Meshes(verts=vertices, faces=faces[None].expand(len(vertices), -1, -1))
    face_index, depth, barycentrics, _ = rasterize_meshes(
        meshes,
        image_size=size,
        blur_radius=0.0,
        faces_per_pixel=1,
        perspective_correct=perspective,
        clip_barycentric_coords=True,
        cull_backfaces=cull,
    )
    # Faces of a batch are numbered through.
    first = torch.arange(len(vertices), device=vertices.device) * len(faces)
    face_index = face_index[..., 0]
    face_index = torch.where(face_index >= 0, face_index - first[:, None, None], face_index)
    return Fragments(face_index, barycentrics[..., 0, :], depth[..., 0])
