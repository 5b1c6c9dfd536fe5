"""Size and settings of a multi-view diffusion model: the released one, the demo or a tiny one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cap4d_core.diffusion.schedule import ScheduleConfig
from cap4d_core.errors import ConfigError


class AutoencoderConfig(BaseModel):
    """The KL autoencoder between images and latents (Stable Diffusion 1 and 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_channels: int = Field(3, ge=1)
    latent_channels: int = Field(4, ge=1)
    base_channels: int = Field(128, ge=1)
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    num_res_blocks: int = Field(2, ge=1, description="Per encoder level; the decoder has one more.")
    norm_groups: int = Field(32, ge=1)
    scaling_factor: float = Field(0.18215, gt=0, description="Latents are multiplied by this.")

    @property
    def downscale(self) -> int:
        """Image side divided by latent side."""
        return 2 ** (len(self.channel_mult) - 1)

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        for mult in self.channel_mult:
            if mult < 1 or (self.base_channels * mult) % self.norm_groups:
                raise ValueError(
                    f"base_channels * {mult} = {self.base_channels * mult} must be a positive "
                    f"multiple of norm_groups = {self.norm_groups}"
                )
        return self


class ConditioningConfig(BaseModel):
    """How head meshes become conditioning maps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positional_channels: int = Field(42, ge=6, multiple_of=6)
    positional_multiplier: float = Field(1.0, gt=0)
    super_resolution: int = Field(2, ge=1, description="Maps are rendered this much larger.")
    std_expr_deformation: float = Field(0.0104, gt=0, description="Metres; scales the offsets.")


class MMDMConfig(BaseModel):
    """A multi-view denoiser with its autoencoder and schedule; defaults are the released model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: int = Field(4, ge=1)
    out_channels: int = Field(4, ge=1)
    model_channels: int = Field(320, ge=1)
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    num_res_blocks: int = Field(2, ge=1)
    attention_levels: tuple[int, ...] = Field(
        (0, 1, 2), description="Levels with transformers; the middle block always has one."
    )
    multi_view_min_mult: int = Field(
        2, ge=1, description="Attention spans all views where channel_mult is at least this."
    )
    head_channels: int = Field(64, ge=1, description="Channels of one attention head.")
    transformer_depth: int = Field(1, ge=1)
    norm_groups: int = Field(32, ge=1)
    condition_channels: int = Field(50, ge=1)
    views_per_call: int = Field(8, ge=1, description="Views denoised together (V).")
    latent_size: int = Field(64, ge=1, description="Side of the latents, in latent pixels.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    autoencoder: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    conditioning: ConditioningConfig = Field(default_factory=ConditioningConfig)

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels."""
        return self.latent_size * self.autoencoder.downscale

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    def is_multi_view(self, level: int) -> bool:
        """Whether attention at `level` (-1: also the middle block) spans all views."""
        return self.channel_mult[level] >= self.multi_view_min_mult

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        problems = []
        levels = len(self.channel_mult)
        for level in self.attention_levels:
            if not 0 <= level < levels:
                problems.append(f"attention level {level}: there are levels 0 to {levels - 1}")
        for level, channels in enumerate(self.level_channels):
            if channels < 1 or channels % self.norm_groups:
                problems.append(
                    f"level {level} has {channels} channels, not a positive multiple of "
                    f"norm_groups = {self.norm_groups}"
                )
            attends = level in self.attention_levels or level == levels - 1
            if attends and channels % self.head_channels:
                problems.append(
                    f"level {level} has {channels} channels, not a multiple of "
                    f"head_channels = {self.head_channels}"
                )
        if self.latent_size % 2 ** (levels - 1):
            problems.append(
                f"latent_size = {self.latent_size} is not a multiple of {2 ** (levels - 1)}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the model config") -> MMDMConfig:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: unknown keys or impossible values, all listed.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']} (got {e['input']!r})"
                if e["loc"]
                else e["msg"]
                for e in error.errors()
            ]
            raise ConfigError(source, problems) from None
