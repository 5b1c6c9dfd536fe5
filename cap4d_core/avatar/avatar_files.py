"""A fitted avatar on disk: avatar.safetensors (tensors) and avatar.json (what they mean)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cap4d_core.avatar.deformation import DeformationUNet
from cap4d_core.avatar.densification import SplatTensors
from cap4d_core.avatar.gaussians import GaussianAvatar, head_template
from cap4d_core.avatar.optimizers import SPLAT_GROUPS
from cap4d_core.avatar.uv_grid import UVGrid
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, read_safetensors, write_json, write_safetensors
from cap4d_core.flame.model import HeadModel

FORMAT = "cap4d-avatar"
FORMAT_VERSION = 1
TENSOR_FILE = "avatar.safetensors"
DESCRIPTION_FILE = "avatar.json"
WHAT = "an avatar written by fit_avatar"


def save_avatar(
    avatar: GaussianAvatar, folder: str | Path, meta: dict[str, Any] | None = None
) -> None:
    """Writes an avatar; the description goes last, so where it is, the avatar is complete.

    Args:
        avatar: what to write.
        folder: receives avatar.safetensors and avatar.json.
        meta: further content of avatar.json (settings, provenance).
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {
        f"splats.{name}": tensor for name, tensor in avatar.splats.groups().items()
    }
    tensors["splats.binding"] = avatar.splats.binding.to(torch.int32)
    for name, tensor in avatar.deformation.state_dict().items():
        tensors[f"deformation.{name}"] = tensor
    tensors["shape"], tensors["rest_neck"] = avatar.shape, avatar.rest_neck
    tensors["grid_faces"] = avatar.grid.faces.to(torch.int32)
    grid = avatar.grid
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "num_gaussians": len(avatar.splats),
        "num_faces": len(grid.faces),
        "uv_resolution": grid.resolution,
        "separate_islands": grid.separate_islands,
        "parity": grid.parity,
        "deform_net_channels": avatar.deformation.channels,
        "deform_net_layers": avatar.deformation.num_layers,
        "active_sh_degree": avatar.active_sh_degree,
        "lower_jaw": avatar.head.lower_jaw,
        **(avatar.meta if meta is None else meta),
    }
    (folder / DESCRIPTION_FILE).unlink(missing_ok=True)
    write_safetensors(
        folder / TENSOR_FILE, tensors, {"format": FORMAT, "version": str(FORMAT_VERSION)}
    )
    write_json(folder / DESCRIPTION_FILE, description)


def load_avatar(
    folder: str | Path, head: HeadModel, device: torch.device | str = "cpu"
) -> GaussianAvatar:
    """Reads an avatar.

    Args:
        folder: as given to `save_avatar`.
        head: head model with the mouth parts that the avatar was fitted with.
        device: where to put it; the head model moves along.

    Raises:
        InputFileError: missing or damaged file, or one that belongs to another head model.
    """
    folder = Path(folder)
    description = read_json(folder / DESCRIPTION_FILE, WHAT)
    path = folder / TENSOR_FILE
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputFileError(folder / DESCRIPTION_FILE, "other content", WHAT)
    if description.get("version") != FORMAT_VERSION:
        found = f"format version {description.get('version')}"
        raise InputFileError(
            folder / DESCRIPTION_FILE, found, f"version {FORMAT_VERSION}", "Fit the avatar again."
        )
    if description["lower_jaw"] != head.lower_jaw:
        have, want = (
            "with" if x else "without" for x in (head.lower_jaw, description["lower_jaw"])
        )
        raise InputFileError(path, f"a head model {have} lower jaw", f"one {want} it")
    tensors, _ = read_safetensors(path, WHAT)
    grid = UVGrid(
        head_template(head),
        description["uv_resolution"],
        num_vertices=head.num_vertices,
        separate_islands=description["separate_islands"],
        parity=description["parity"],
    )
    try:
        faces = tensors["grid_faces"].long()
        if faces.shape != grid.faces.shape or not torch.equal(faces, grid.faces.cpu()):
            raise InputFileError(
                path,
                f"a mesh of {len(faces)} triangles; the template in {head.folder} gives another "
                f"({len(grid.faces)})",
                "the head model that the avatar was fitted with",
                "Set head_model.path to it, or fit again.",
            )
        splats = SplatTensors(
            {name: tensors[f"splats.{name}"] for name in SPLAT_GROUPS},
            tensors["splats.binding"].long(),
            len(faces),
        )
        network = DeformationUNet(
            description["deform_net_channels"], description["deform_net_layers"]
        )
        prefix = "deformation."
        network.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        avatar = GaussianAvatar(
            head,
            grid,
            splats,
            network,
            tensors["shape"],
            active_sh_degree=description["active_sh_degree"],
            rest_neck=tensors["rest_neck"],
        )
    except (KeyError, RuntimeError) as error:
        raise InputFileError(path, f"unexpected tensors ({error})", WHAT) from None
    avatar.meta = description
    return avatar.to(device)
