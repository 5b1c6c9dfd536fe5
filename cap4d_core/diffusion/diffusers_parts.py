"""The parts of diffusers in use, imported without the rest.

Each sampling job is a process of its own, and diffusers' packages import every model they hold and
whatever else is installed beside them (transformers, peft, ...): most of a job's start. While the
parts are imported, those packages are bare folders and those libraries count as absent.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

__all__ = [
    "Attention", "AttnProcessor2_0", "AutoencoderKL", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D",
    "DiagonalGaussianDistribution", "DownBlock2D", "TimestepEmbedding", "Timesteps",
    "UNetMidBlock2DCrossAttn", "UpBlock2D",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Their __init__ imports all models.
_FOLDERS = tuple(f"diffusers.models.{name}" for name in ("autoencoders", "transformers", "unets"))
# Optional to diffusers; nothing of them is needed here.
_UNUSED = (
    "accelerate", "bitsandbytes", "peft", "scipy", "torch._dynamo", "torchao", "transformers"
)  # fmt: skip


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


@contextmanager
def _only_what_is_asked_for() -> Iterator[None]:
    absent = [name for name in _UNUSED if name not in sys.modules]
    folders: dict[str, ModuleType] = {}
    disable = torch.compiler.disable
    distributions = importlib.metadata.packages_distributions
    try:
        # Reads the file lists of everything installed, to name packages that are not in use here.
        importlib.metadata.packages_distributions = dict
        # Only marks functions of theirs that are not in use here, and would import the compiler.
        torch.compiler.disable = _unchanged  # type: ignore[assignment]
        for name in absent:
            sys.modules[name] = None  # type: ignore[assignment]
        for name in _FOLDERS:
            if name in sys.modules:
                continue
            parent = importlib.import_module(name.rpartition(".")[0])
            folder = ModuleType(name)
            folder.__path__ = [f"{path}/{name.rpartition('.')[2]}" for path in parent.__path__]
            sys.modules[name] = folders[name] = folder
        yield
    finally:
        torch.compiler.disable = disable
        importlib.metadata.packages_distributions = distributions
        for name in absent:
            sys.modules.pop(name, None)
        for name, folder in folders.items():
            # Whoever imports the package later gets the real one.
            if sys.modules.get(name) is folder:
                del sys.modules[name]
                parent_name, _, child = name.rpartition(".")
                if sys.modules[parent_name].__dict__.get(child) is folder:
                    delattr(sys.modules[parent_name], child)


def _load(module: str, *names: str) -> list[Any]:
    loaded = importlib.import_module(f"diffusers.models.{module}")
    return [getattr(loaded, name) for name in names]


def _load_all() -> list[Any]:
    return [
        *_load("attention_processor", "Attention", "AttnProcessor2_0"),
        *_load("embeddings", "TimestepEmbedding", "Timesteps"),
        *_load("unets.unet_2d_blocks", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
        *_load("unets.unet_2d_blocks", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D"),
        *_load("autoencoders.autoencoder_kl", "AutoencoderKL"),
        *_load("autoencoders.vae", "DiagonalGaussianDistribution"),
    ]


if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps
    from diffusers.models.unets.unet_2d_blocks import (
        CrossAttnDownBlock2D,
        CrossAttnUpBlock2D,
        DownBlock2D,
        UNetMidBlock2DCrossAttn,
        UpBlock2D,
    )
else:
    try:
        with _only_what_is_asked_for():
            _parts = _load_all()
    except (ImportError, AttributeError, RuntimeError) as error:
        # Another layout of diffusers, or somebody imported it before: the slow way.
        logger.debug("importing diffusers as a whole: %s", error)
        _parts = _load_all()
    (
        Attention, AttnProcessor2_0, TimestepEmbedding, Timesteps, CrossAttnDownBlock2D,
        CrossAttnUpBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D, AutoencoderKL,
        DiagonalGaussianDistribution,
    ) = _parts  # fmt: skip
