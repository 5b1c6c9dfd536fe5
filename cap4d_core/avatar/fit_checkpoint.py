"""Resumable state of a fit in one file, so that it can never be half old, half new.

All randomness depends on (seed, iteration), so no generator state is stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.avatar.densification import SplatStatistics, SplatTensors
from cap4d_core.avatar.optimizers import SPLAT_GROUPS
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "last.safetensors"
VERSION = 2
# Settings that do not change what is computed.
NEUTRAL_SETTINGS = {"checkpoint_every_s", "evaluate_every", "max_gaussians", "compile"}


def fit_fingerprint(trainer: AvatarTrainer) -> str:
    """Hash of settings, images and head model: a checkpoint of anything else is not resumed."""
    digest = hashlib.blake2b(digest_size=16)
    settings = trainer.settings.model_dump(mode="json", exclude=NEUTRAL_SETTINGS)
    digest.update(json.dumps([VERSION, settings], sort_keys=True).encode())
    digest.update(trainer.data.fingerprint().encode())
    digest.update(b"lpips" if trainer.lpips is not None else b"")
    for tensor in (*trainer.avatar.head.buffers(), *trainer.avatar.grid.buffers()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: str | Path, trainer: AvatarTrainer, iteration: int, fingerprint: str, history: Any
) -> None:
    """Writes the state after an iteration; `history` is anything JSON can hold."""
    avatar, adam = trainer.avatar, trainer.adam
    tensors: dict[str, Tensor] = {f"splats.{n}": t for n, t in avatar.splats.groups().items()}
    tensors["splats.binding"] = avatar.splats.binding
    tensors["splats.binding_counter"] = avatar.splats.binding_counter
    tensors |= {f"network.{n}": t for n, t in avatar.deformation.state_dict().items()}
    tensors["neck"] = trainer.neck_offsets
    for name, value in vars(trainer.statistics).items():
        tensors[f"statistics.{name}"] = value
    for group in adam.param_groups:
        for index, parameter in enumerate(group["params"]):
            for key, value in adam.state.get(parameter, {}).items():
                tensors[f"adam.{group['name']}.{index}.{key}"] = value
    if trainer.neck_adam is not None:
        tensors |= {f"neck_adam.{n}": t for n, t in trainer.neck_adam.tensors().items()}
    state = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "iteration": iteration,
        "active_sh_degree": avatar.active_sh_degree,
        "neck_steps": trainer.neck_adam.steps if trainer.neck_adam is not None else 0,
        "num_splits": trainer.num_splits,
        "history": history,
    }
    write_safetensors(path, tensors, {"state": json.dumps(state)})


def restore_checkpoint(
    path: str | Path, trainer: AvatarTrainer, fingerprint: str
) -> tuple[int, Any]:
    """Takes up a saved state; returns (iteration, history), (0, None) when there is none to use."""
    path = Path(path)
    if not path.exists():
        return 0, None
    try:
        tensors, metadata = read_safetensors(path)
        state = json.loads(metadata["state"])
    except (InputFileError, KeyError, json.JSONDecodeError) as error:
        logger.warning("unusable checkpoint, starting from the beginning: %s", error)
        return 0, None
    if state.get("version") != VERSION or state.get("fingerprint") != fingerprint:
        logger.info("%s belongs to other settings or inputs: starting from the beginning", path)
        return 0, None
    _restore(trainer, tensors, state)
    logger.info("resuming from iteration %d (%s)", state["iteration"], path)
    return int(state["iteration"]), state["history"]


def _restore(
    trainer: AvatarTrainer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    avatar, device = trainer.avatar, trainer.device
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    avatar.splats = SplatTensors(
        {name: moved[f"splats.{name}"] for name in SPLAT_GROUPS},
        moved["splats.binding"],
        len(moved["splats.binding_counter"]),
    )
    prefix = "network."
    avatar.deformation.load_state_dict(
        {name.removeprefix(prefix): t for name, t in moved.items() if name.startswith(prefix)}
    )
    avatar.active_sh_degree = int(state["active_sh_degree"])
    trainer.num_splits = int(state["num_splits"])
    with torch.no_grad():
        trainer.neck_offsets.copy_(moved["neck"])
    trainer.statistics = SplatStatistics(
        **{name: moved[f"statistics.{name}"] for name in vars(trainer.statistics)}
    )
    adam = trainer.adam
    for group in adam.param_groups:
        if group["name"] in SPLAT_GROUPS:
            group["params"] = [getattr(avatar.splats, group["name"])]
    adam.state.clear()
    for group in adam.param_groups:
        for index, parameter in enumerate(group["params"]):
            start = f"adam.{group['name']}.{index}."
            entries = {n.removeprefix(start): t for n, t in moved.items() if n.startswith(start)}
            if entries:
                adam.state[parameter] = _adam_entry(entries, parameter)
    if trainer.neck_adam is not None:
        parts = {n: moved[f"neck_adam.{n}"] for n in trainer.neck_adam.tensors()}
        trainer.neck_adam.restore(parts, int(state["neck_steps"]))


def _adam_entry(entries: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Optimiser state of one tensor, contiguous as the fused kernel wants it."""
    return {
        name: tensor.contiguous() if tensor.shape == parameter.shape else tensor
        for name, tensor in entries.items()
    }
