"""Settings of training the diffusion model and its autoencoder (rule train_mmdm).

Light on purpose, as `settings`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
        description="Tracking folders (fit.npz, reference_images.json, images/, bg/); every listed "
        "frame is used. `*` and `?` stand for any characters.",
    )
    demo_subjects: int = Field(0, ge=0, description="Procedural people, besides the folders.")
    demo_first_seed: int = Field(
        FIRST_TRAINING_SEED,
        ge=FIRST_TRAINING_SEED,
        description="Number of the first; lower numbers are kept for use and evaluation.",
    )
    demo_views: int = Field(24, ge=2, description="Pictures per demo subject.")
    demo_supersample: int = Field(2, ge=1, description="Samples per pixel and axis.")
    processes: int = Field(0, ge=0, description="Processes that make demo people; 0 = in place.")

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.folders and not self.demo_subjects:
            raise ValueError("name tracking folders, or set demo_subjects above 0")
        return self


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
    sample_every: int = Field(5_000, ge=1, description="Steps between grids of samples.")

    @model_validator(mode="after")
    def _has_references(self) -> Self:
        if sum(self.reference_weights) <= 0:
            raise ValueError("reference_weights are all 0")
        return self


class TrainingSettings(_Strict):
    """Everything about a training run."""

    name: str = Field(
        "mmdm", pattern=r"^[A-Za-z0-9_-]+$", description="Folder of the run below training/."
    )
    data: TrainingDataSettings | None = Field(None, description="What is trained on.")
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
    train_autoencoder: bool = Field(
        False, description="Train the autoencoder too, first; else the start weights' is used."
    )
    autoencoder: AutoencoderTrainingSettings = AutoencoderTrainingSettings(
        steps=50_000, batch_size=8, ema_decay=0.999
    )
    denoiser: DenoiserTrainingSettings = DenoiserTrainingSettings()
    seed: int = Field(0, ge=0, description="Of everything random.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 = mixed precision; auto = bf16 on GPUs that have it."
    )
    compile: bool = Field(False, description="Compile the networks (CUDA); faster after minutes.")
    keep_data_on: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="Where prepared frames are kept; auto = GPU where they fit."
    )
    stored_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type of the result.")
