"""Settings of training the diffusion model and its autoencoder (rule train_mmdm).

Light on purpose, as `settings`.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cap4d_core.errors import UserError

# Demo subjects below this number are never trained on: they are for use and for evaluation.
FIRST_TRAINING_SEED = 10_000

PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingDataSettings(_Strict):
    """What is trained on: tracked people, demo people, or both."""

    folders: list[str] = Field(
        default_factory=list,
        description="Tracking folders (fit.npz, images/, bg/, reference_images.json), one person "
        "each; `*` and `?` stand for any characters.",
    )
    frames: Literal["all", "listed"] = Field(
        "all",
        description="all = every picture that the fit covers; listed = those in "
        "reference_images.json.",
    )
    frame_step: int = Field(1, ge=1, description="Every n-th frame of a recording.")
    max_frames: int | None = Field(
        None, ge=2, description="At most so many per folder, evenly spaced; null = all."
    )
    validation_folders: list[str] = Field(
        default_factory=list,
        description="Tracking folders that are not trained on but looked at: validation loss, "
        "quality and pictures on the way.",
    )
    demo_subjects: int = Field(0, ge=0, description="Procedural people, besides the folders.")
    demo_first_seed: int = Field(
        FIRST_TRAINING_SEED,
        ge=FIRST_TRAINING_SEED,
        description="Number of the first; lower numbers are kept for use and evaluation.",
    )
    demo_views: int = Field(24, ge=2, description="Pictures per demo subject.")
    demo_supersample: int = Field(2, ge=1, description="Samples per pixel and axis.")
    demo_validation: int = Field(
        4, ge=0, description="Demo people for validation, when there are some to train on."
    )
    processes: int = Field(0, ge=0, description="Processes that make demo people; 0 = in place.")

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.folders and not self.demo_subjects:
            raise ValueError("name tracking folders, or set demo_subjects above 0")
        return self


def expand_folders(patterns: Sequence[str], key: str = "training.data.folders") -> list[str]:
    """The folders that patterns stand for, each once, in the order of the patterns.

    Args:
        patterns: paths; those with `*`, `?` or `[` stand for all folders with a fit.npz that fit.
        key: the configuration key, for messages.

    Raises:
        UserError: a pattern that nothing fits.
    """
    found: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = sorted(f for f in glob.glob(pattern) if (Path(f) / "fit.npz").is_file())
        if not matches:
            raise UserError(f"{key}: no folder with a fit.npz fits {pattern!r}.")
        found += matches
    return list(dict.fromkeys(found))


class OptimizerSettings(_Strict):
    """How weights are changed; the rate rises during warm-up, then falls as a cosine."""

    steps: int = Field(100_000, ge=1, description="Length of the run.")
    batch_size: int = Field(8, ge=1, description="Samples per step and GPU.")
    accumulate: int = Field(1, ge=1, description="Batches summed before a step.")
    learning_rate: PositiveFloat = Field(1e-4, description="Highest rate.")
    final_rate: Share = Field(0.0, description="Rate at the end, as a share of the highest.")
    warmup_steps: int = Field(500, ge=0, description="Steps in which the rate rises.")
    weight_decay: float = Field(0.01, ge=0.0, description="Of AdamW.")
    betas: tuple[Share, Share] = Field((0.9, 0.99), description="Of AdamW.")
    clip_gradient: PositiveFloat = Field(1.0, description="Largest norm of the gradient.")
    ema_decay: Share = Field(0.9999, description="Of the averaged weights, which are what is used.")
    checkpoint_every: int = Field(1_000, ge=1, description="Steps between resumable states.")
    log_every: int = Field(50, ge=1, description="Steps between entries of metrics.jsonl.")
    sample_every: int = Field(
        5_000, ge=1, description="Steps between validations, with a picture each."
    )


class AutoencoderTrainingSettings(OptimizerSettings):
    """Training of the autoencoder; pictures per batch."""

    kl_weight: float = Field(
        1e-6, ge=0.0, description="Weight of the KL term, a mean over latent values."
    )
    l1_weight: float = Field(0.1, ge=0.0, description="Weight of absolute errors.")
    mse_weight: float = Field(1.0, ge=0.0, description="Weight of squared errors.")
    perceptual_weight: float = Field(
        0.0, ge=0.0, description="Weight of LPIPS; needs fitting.lpips_weights."
    )

    @model_validator(mode="after")
    def _has_loss(self) -> Self:
        if self.l1_weight + self.mse_weight <= 0:
            raise ValueError("l1_weight and mse_weight are both 0: nothing would be learned")
        return self


class DenoiserTrainingSettings(OptimizerSettings):
    """Training of the multi-view denoiser; samples of `views_per_call` views per batch."""

    reference_weights: list[Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=lambda: [1.0, 1.0, 1.0, 1.0],
        min_length=1,
        description="Relative frequency of 1, 2, ... references.",
    )
    dropout: Share = Field(
        0.1, description="Share of samples without conditions, for classifier-free guidance."
    )
    frontal_first: Share = Field(
        0.0, description="Share of samples whose first reference is the most frontal view drawn."
    )
    turned_cameras: Share = Field(
        0.0,
        description="Share of frames described as if the camera had moved instead of the head. "
        "Only where the light turns with the head, as in the demo world.",
    )
    loss_weighting: Literal["none", "min_snr"] = Field(
        "none", description="min_snr: errors at little noise count less (Hang et al. 2023)."
    )
    min_snr_gamma: PositiveFloat = Field(5.0, description="Signal-to-noise ratio from which on.")
    snr_floor: float = Field(
        0.0,
        ge=0.0,
        description="min_snr: ratio below which the weight of errors of the clean views stays as "
        "it is there, at most 100 per error of the noise. Above 0 the first steps of sampling, "
        "where little but the references is known, are learned better.",
    )
    sample_steps: int = Field(50, ge=1, description="Denoising steps of validation pictures.")
    sample_guidance: float = Field(2.0, ge=0.0, description="Their classifier-free guidance.")

    @model_validator(mode="after")
    def _has_references(self) -> Self:
        if sum(self.reference_weights) <= 0:
            raise ValueError("reference_weights are all 0")
        return self


class TrainingSettings(_Strict):
    """Everything about a training run."""

    name: str = Field(
        "mmdm",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        max_length=64,
        description="The run is results/training/{name}; its model is below that, in model/.",
    )
    data: TrainingDataSettings | None = Field(
        None, description="What is trained on; null = nothing, the rule is not used."
    )
    model: dict[str, Any] = Field(
        default_factory=dict,
        description="Sizes of the model (docs/training.md); default: the start weights', else the "
        "released model's.",
    )
    start: str | None = Field(
        None,
        description="Weights to start from: a folder of ours, a released .ckpt, or a folder in the "
        "layout of Stable Diffusion 2.1 (unet/, vae/); none = from scratch.",
    )
    autoencoder_start: str | None = Field(
        None,
        description="Autoencoder to start from instead of the start weights': any of the above, or "
        "a diffusers AutoencoderKL folder.",
    )
    train_autoencoder: bool = Field(
        False, description="Train the autoencoder too, first; else it is used as it is."
    )
    autoencoder: AutoencoderTrainingSettings = AutoencoderTrainingSettings(
        steps=50_000, batch_size=8, ema_decay=0.999
    )
    denoiser: DenoiserTrainingSettings = DenoiserTrainingSettings()
    seed: int = Field(0, ge=0, description="Of everything random.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 = mixed precision; auto = bf16 on GPUs that have it."
    )
    compile: bool = Field(
        False, description="Compile the networks (CUDA): minutes at the start, faster steps."
    )
    keep_data_on: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="cpu = memory-mapped files, which may be larger than the memory; gpu = a copy "
        "on every GPU; auto = gpu where they fit.",
    )
    stored_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type of the result.")
