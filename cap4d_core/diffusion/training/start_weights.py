"""What training starts from: nothing, a model of ours, the released one, or Stable Diffusion."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.model_config import AutoencoderConfig, MMDMConfig
from cap4d_core.diffusion.model_weights import (
    find_checkpoint,
    is_prepared_folder,
    read_prepared,
    read_released,
    read_released_state,
)
from cap4d_core.diffusion.renderer_tables import typed_tables
from cap4d_core.diffusion.training.denoiser_pass import initialise
from cap4d_core.diffusion.training.diffusion_layouts import (
    COND_WEIGHT,
    is_diffusers_folder,
    is_finite,
    read_diffusers_folder,
    read_original_file,
)
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.training_settings import TrainingSettings

logger = logging.getLogger(__name__)

# Text has no place here: its attention and the norm before it are left out.
TEXT_PARTS = (".attn2.", ".norm2.")
SETTING = "training.start"


@dataclass(frozen=True)
class Source:
    """Weights read from one place.

    Attributes:
        kind: in words.
        path: where.
        sizes: partial `MMDMConfig` dictionary.
        denoiser, autoencoder: tensors in our names, None where the place has none.
        tables: of the conditioning renderer, None likewise.
    """

    kind: str
    path: str
    sizes: dict[str, Any]
    denoiser: dict[str, Tensor] | None = None
    autoencoder: dict[str, Tensor] | None = None
    tables: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Start:
    """Everything that a run starts from; see `Source`. The config is that of the new model."""

    config: MMDMConfig
    denoiser: Source | None
    autoencoder: Source | None

    @property
    def tables(self) -> dict[str, Tensor] | None:
        """Tables that the start weights were trained with."""
        return None if self.denoiser is None else self.denoiser.tables


@dataclass(frozen=True)
class Taken:
    """What of a network came from elsewhere.

    Attributes:
        copied: number of tensors taken over.
        zeroed: names of those that start at zero because the source has no such layer.
        fresh: names of those that start at random, because the source's do not fit.
        text: number of the source's tensors left out because they belong to text.
        unused: names of its others.
    """

    copied: int
    zeroed: list[str]
    fresh: list[str]
    text: int
    unused: list[str]

    def __str__(self) -> str:
        """One sentence."""
        parts = [f"{self.copied} tensors copied"]
        if self.zeroed:
            parts.append(f"{', '.join(self.zeroed)} start at zero")
        if self.fresh:
            parts.append(f"{len(self.fresh)} start at random ({_some(self.fresh)})")
        if self.text:
            parts.append(f"{self.text} of text attention left out")
        if self.unused:
            parts.append(f"{len(self.unused)} others not used ({_some(self.unused)})")
        return "; ".join(parts)


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def read_source(path: str | Path, setting: str = SETTING) -> Source:
    """Reads weights of any known layout; runs no code from them.

    Args:
        path: a folder of ours, a released .ckpt or a folder with one, a folder of diffusers, or a
            single file in the original layout of Stable Diffusion 2.1.
        setting: the configuration key, for messages.

    Raises:
        UserError: nothing there, or nothing known.
    """
    path = Path(path)
    if not path.exists():
        raise InputFileError(
            path,
            "nothing there",
            "a model folder of this program, a released .ckpt, or Stable Diffusion 2.1 (unet/, "
            "vae/)",
            f"Correct {setting}.",
        )
    if path.is_dir() and is_diffusers_folder(path):
        foreign = read_diffusers_folder(path)
        for note in foreign.notes:
            logger.warning("%s", note)
        return Source(
            "Stable Diffusion", str(path), foreign.sizes, foreign.denoiser, foreign.autoencoder
        )
    if path.is_dir() and is_prepared_folder(path):
        ours = read_prepared(path)
        tables = None if ours.tables is None else typed_tables(ours.tables)
        return Source(
            "a model folder", str(path), ours.config.to_dict(), ours.denoiser, ours.autoencoder,
            tables,
        )  # fmt: skip
    file = find_checkpoint(path)
    if file.suffix == ".safetensors" or COND_WEIGHT not in read_released_state(file):
        original = read_original_file(file)
        return Source(
            "Stable Diffusion", str(file), original.sizes, original.denoiser, original.autoencoder
        )
    released = read_released(file)
    tables = None if released.tables is None else typed_tables(released.tables)
    return Source(
        "a released checkpoint", str(file), released.config.to_dict(), released.denoiser,
        released.autoencoder, tables,
    )  # fmt: skip


def read_start(settings: TrainingSettings, trained: AutoencoderConfig | None = None) -> Start:
    """Reads the start weights and works out the model's config.

    Sizes come from the start weights, else from the released model; `training.model` overrides
    them. Unless that says otherwise, the schedule is made for the model's latent size and views.

    Args:
        settings: of the section `training`.
        trained: config of an autoencoder that was trained meanwhile.

    Raises:
        UserError: unreadable weights, impossible sizes, or no autoencoder to use.
    """
    denoiser = None if settings.start is None else read_source(settings.start)
    autoencoder = denoiser
    if settings.autoencoder_start is not None:
        key = "training.autoencoder_start"
        autoencoder = read_source(settings.autoencoder_start, key)
        if autoencoder.autoencoder is None:
            raise InputFileError(autoencoder.path, "no autoencoder", "one", f"Correct {key}.")
    if autoencoder is not None and autoencoder.autoencoder is None:
        autoencoder = None
    if autoencoder is None and not settings.train_autoencoder:
        raise UserError(
            "training: no autoencoder. Set training.train_autoencoder: true, or name one with "
            "training.start or training.autoencoder_start."
        )
    if denoiser is not None and denoiser.denoiser is None:
        logger.warning("%s holds no denoiser; it is trained from scratch.", denoiser.path)
        denoiser = None
    sizes = {} if denoiser is None else dict(denoiser.sizes)
    if autoencoder is not None:
        sizes["autoencoder"] = autoencoder.sizes.get("autoencoder", {})
    content = _overridden(sizes, settings.model)
    defaults = MMDMConfig.from_dict(
        {k: v for k, v in content.items() if k != "schedule"}, "training.model"
    )
    follows = {"image_size": defaults.latent_size, "num_frames": defaults.views_per_call}
    stated = sizes.get("schedule", {}) if not settings.model.keys() & _SHIFTING else {}
    own = settings.model.get("schedule", {})
    content["schedule"] = {**sizes.get("schedule", {}), **follows, **stated, **own}
    if trained is not None:
        content["autoencoder"] = trained.model_dump(mode="json")
    config = MMDMConfig.from_dict(content, "training.model")
    if config.condition_channels != config.conditioning.positional_channels + 8:
        raise UserError(
            f"training.model: condition_channels is {config.condition_channels}; with "
            f"{config.conditioning.positional_channels} positional channels it must be "
            f"{config.conditioning.positional_channels + 8}."
        )
    if config.in_channels != config.autoencoder.latent_channels:
        raise UserError(
            f"training.model: the denoiser takes {config.in_channels} channels, the autoencoder "
            f"makes {config.autoencoder.latent_channels}."
        )
    return Start(config, denoiser, autoencoder)


# Overriding these changes what the schedule is shifted for.
_SHIFTING = frozenset({"latent_size", "views_per_call"})


def _overridden(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _overridden(before, value)
        result[key] = value
    return result


def start_denoiser(start: Start, seed: int) -> MMDMDenoiser:
    """The denoiser before its first step, on the CPU, float32.

    Raises:
        UserError: start weights of which nothing fits, or which hold NaN.
    """
    torch.manual_seed(seed)
    denoiser = MMDMDenoiser(start.config)
    initialise(denoiser)
    if start.denoiser is not None:
        assert start.denoiser.denoiser is not None
        taken = take_over(denoiser, start.denoiser.denoiser, start.denoiser.path)
        logger.info("Denoiser from %s %s: %s.", start.denoiser.kind, start.denoiser.path, taken)
    return denoiser


def start_autoencoder(start: Start, seed: int, config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder before its first step, on the CPU, float32.

    Raises:
        UserError: as `start_denoiser`.
    """
    torch.manual_seed(seed)
    autoencoder = Autoencoder(config)
    if start.autoencoder is not None:
        assert start.autoencoder.autoencoder is not None
        taken = take_over(autoencoder.vae, start.autoencoder.autoencoder, start.autoencoder.path)
        logger.info(
            "Autoencoder from %s %s: %s.", start.autoencoder.kind, start.autoencoder.path, taken
        )
    return autoencoder


def given_autoencoder(start: Start) -> Autoencoder:
    """The autoencoder of the start weights, to be used as it is.

    Raises:
        UserError: a tensor is missing or has another shape than the config says.
    """
    assert start.autoencoder is not None and start.autoencoder.autoencoder is not None
    autoencoder = Autoencoder(start.config.autoencoder)
    taken = take_over(autoencoder.vae, start.autoencoder.autoencoder, start.autoencoder.path)
    if taken.fresh or taken.zeroed:
        raise UserError(
            f"{start.autoencoder.path}: {len(taken.fresh)} tensors of the autoencoder are missing "
            f"or do not fit training.model.autoencoder ({_some(taken.fresh)}). Remove those sizes, "
            "or set training.train_autoencoder: true."
        )
    return autoencoder.eval().requires_grad_(False)


def take_over(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Taken:
    """Copies tensors of equal name and shape into a module.

    Layers for conditioning maps that the source does not have start at zero: the network begins as
    what it came from.

    Raises:
        UserError: nothing fits, or NaN in the source.
    """
    own = module.state_dict()
    fitting = {k: t for k, t in tensors.items() if k in own and own[k].shape == t.shape}
    if not fitting:
        raise UserError(
            f"{source}: none of its {len(tensors)} tensors fits the model. Are the sizes in "
            "training.model those of these weights?"
        )
    if not is_finite(fitting):
        raise UserError(f"{source}: weights with NaN or infinity; the file is damaged.")
    others = [name for name in own if name not in fitting]
    zeroed = [n for n in others if n.startswith("cond_linear.") and n not in tensors]
    unused = [name for name in tensors if name not in fitting]
    text = [n for n in unused if n not in own and any(part in n for part in TEXT_PARTS)]
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
        for name in zeroed:
            own[name].zero_()
    taken = Taken(
        copied=len(fitting),
        zeroed=zeroed,
        fresh=[name for name in others if name not in zeroed],
        text=len(text),
        unused=[name for name in unused if name not in text],
    )
    if taken.fresh or taken.unused:
        logger.warning("%s does not fit the model in all parts: %s.", source, taken)
    return taken
