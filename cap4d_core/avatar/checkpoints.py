"""Import of released avatar checkpoints (`chkpnt{iteration}.pth`).

Layout: (dict, iteration); dict holds shape, base_rot, deform_net (state dict) and gaussians, a
tuple of 14: active SH degree, xyz, f_dc, f_rest, scaling, rotation, opacity, binding,
binding_counter, max_radii2D, gradient sums, counts, Adam state, spatial rate factor. Only tensors
and numpy arrays are unpickled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cap4d_core.avatar.deformation import DeformationUNet, network_size
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.gaussians import GaussianAvatar, head_template
from cap4d_core.avatar.uv_grid import UVGrid
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import require_file
from cap4d_core.flame.model import HeadModel

WHAT = "a released avatar checkpoint (chkpnt*.pth)"
RESOLUTIONS = (64, 128, 256, 512)
TUPLE_NAMES = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")


def find_released_checkpoint(folder: str | Path) -> Path:
    """The chkpnt{iteration}.pth of the largest iteration in a folder.

    Raises:
        InputFileError: there is none.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("chkpnt*.pth")
        if (match := re.fullmatch(r"chkpnt(\d+)\.pth", path.name))
    }
    if not found:
        raise InputFileError(folder, "no chkpnt*.pth", WHAT)
    return found[max(found)]


def _numpy_globals() -> list[Any]:
    """What a pickled numpy array consists of, under the names of numpy 1 and 2."""
    from numpy._core import multiarray

    allowed: list[Any] = [np.ndarray, np.dtype]
    for function in ("_reconstruct", "scalar"):
        constructor = getattr(multiarray, function)
        allowed += [constructor, (constructor, f"numpy.core.multiarray.{function}")]
    kinds = (np.float32, np.float64, np.int32, np.int64, np.bool_, np.uint8)
    allowed += [type(np.dtype(kind)) for kind in kinds]
    return allowed


def _tensor(value: Any, path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of the checkpoint, checked."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise InputFileError(path, f"'{name}' of type {type(value).__name__}", "a tensor")
    fits = value.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if s is None else s for s in shape)
        raise InputFileError(path, f"'{name}' of shape {tuple(value.shape)}", f"shape {wanted}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputFileError(path, f"'{name}' with NaN or infinity", "finite numbers")
    return value.detach().cpu()


def import_released_checkpoint(
    path: str | Path, head: HeadModel, device: torch.device | str = "cpu"
) -> GaussianAvatar:
    """Reads a released avatar checkpoint.

    Args:
        path: the file, or its folder (the largest iteration is taken).
        head: head model with both mouth parts and the released avatar template.
        device: where to put the avatar.

    Raises:
        InputFileError: not such a checkpoint, or its mesh does not fit the template.
    """
    path = Path(path)
    if path.is_dir():
        path = find_released_checkpoint(path)
    require_file(path, WHAT)
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a bad file
        raise InputFileError(path, f"unreadable content ({error})", WHAT) from None
    try:
        state, iteration = content
        capture = tuple(state["gaussians"])
        network_state, shape = state["deform_net"], state["shape"]
    except (TypeError, ValueError, KeyError) as error:
        raise InputFileError(path, f"another layout ({error!r})", WHAT) from None
    if len(capture) != 14:
        raise InputFileError(path, f"{len(capture)} entries of 'gaussians'", "14 entries")

    num = len(capture[1]) if isinstance(capture[1], Tensor) else None
    shapes = {"xyz": (3,), "f_dc": (1, 3), "f_rest": (None, 3), "scaling": (3,)}
    shapes |= {"rotation": (4,), "opacity": (1,)}
    tensors = {
        name: _tensor(value, path, name, (num, *shapes[name])).float()
        for name, value in zip(TUPLE_NAMES, capture[1:7], strict=True)
    }
    binding = _tensor(capture[7], path, "binding", (num,)).long()
    num_faces = len(_tensor(capture[8], path, "binding_counter", (None,)))
    if len(binding) and not 0 <= int(binding.min()) <= int(binding.max()) < num_faces:
        raise InputFileError(path, "'binding' out of range", f"faces 0 to {num_faces - 1}")
    grid = _matching_grid(head, num_faces, path)
    channels, layers = network_size(network_state)
    network = DeformationUNet(channels, layers)
    try:
        network.load_state_dict(network_state)
    except RuntimeError as error:
        raise InputFileError(path, f"another deformation network ({error})", WHAT) from None
    avatar = GaussianAvatar(
        head,
        grid,
        SplatTensors(tensors, binding, num_faces),
        network,
        _tensor(shape, path, "shape", (head.num_shape,)).float(),
        active_sh_degree=int(capture[0]),
    )
    avatar.meta = {"source": str(path), "iteration": int(iteration)}
    return avatar.to(device)


def _matching_grid(head: HeadModel, num_faces: int, path: Path) -> UVGrid:
    """The grid whose triangles the checkpoint counts: it does not say its resolution."""
    template, sizes = head_template(head), []
    for resolution in RESOLUTIONS:
        grid = UVGrid(template, resolution, num_vertices=head.num_vertices, separate_islands=False)
        if len(grid.faces) == num_faces:
            return grid
        sizes.append(f"{len(grid.faces)} at {resolution} px")
    raise InputFileError(
        path,
        f"a mesh of {num_faces} triangles; the template in {head.folder} gives {', '.join(sizes)}",
        "the head model that the avatar was fitted with",
    )
