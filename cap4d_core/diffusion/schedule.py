"""Noise schedule of the multi-view diffusion model and its DDIM grid.

The forward process is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with t = 0 .. T-1, where abar
(`alphas_cumprod`) falls from about 1 to about 0. Everything is computed in float64 and rounded to
float32 once, because float32 products lose the small abar at the noisy end.

Construction: "scaled linear" betas (Rombach et al. 2022), zero terminal SNR (Lin et al. 2023,
algorithm 1) with the last beta clipped, then a constant factor on the signal-to-noise ratio
abar / (1 - abar), smaller for more jointly denoised frames and larger images (Hoogeboom et al.
2023, Gao et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cap4d_core.diffusion.step_grid import ddim_step_count, ddim_timesteps

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]


class ScheduleConfig(BaseModel):
    """Parameters of the noise schedule; the defaults are those of the released model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_train_timesteps: int = Field(1000, ge=2)
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.0120, gt=0, lt=1)
    zero_snr: bool = Field(True, description="Rescale so that the last timestep is pure noise.")
    max_beta: float = Field(0.99, gt=0, lt=1, description="Betas are clipped to this afterwards.")
    shift_snr: bool = Field(True, description="Multiply the signal-to-noise ratio by a constant.")
    num_frames: int = Field(8, ge=1, description="Jointly denoised frames the shift is made for.")
    image_size: int = Field(64, ge=1, description="Side of the latents the shift is made for.")
    base_image_size: int = Field(64, ge=1, description="Latent side that needs no shift.")
    minus_one_shift: bool = Field(True, description="Count num_frames - 1 frames.")
    sqrt_shift: bool = Field(True, description="Use the square root of the ratio.")
    negative_shift: bool = Field(False, description="Use the inverse ratio.")

    @property
    def shift_ratio(self) -> float:
        """Factor on the signal-to-noise ratio.

        Raises:
            ValueError: one frame with `minus_one_shift`, where the ratio is infinite.
        """
        frames = self.num_frames - 1 if self.minus_one_shift else self.num_frames
        if frames < 1:
            raise ValueError("minus_one_shift needs num_frames >= 2 (it divides by num_frames - 1)")
        ratio = self.base_image_size**2 / (self.image_size**2 * frames)
        if self.sqrt_shift:
            ratio = math.sqrt(ratio)
        return 1.0 / ratio if self.negative_shift else ratio


@dataclass(frozen=True)
class DDIMGrid:
    """Factors of the deterministic (eta = 0) DDIM update on a grid of n timesteps.

    Index 0 is the last executed step (least noise); sampling runs the indices downwards and does
    x <- x_factor[i] * x + e_factor[i] * eps. The last step ends at abar_0, which is not exactly 1,
    as in the released sampler.
    """

    timesteps: NDArray[np.int64]
    alphas: Float32Array
    alphas_prev: Float64Array
    sigmas: Float64Array
    sqrt_one_minus_alphas: Float32Array
    x_factor: Float32Array
    e_factor: Float32Array

    def __len__(self) -> int:
        return len(self.timesteps)


class NoiseSchedule:
    """All arrays derived from a `ScheduleConfig`; float32 unless the name says `_f64`.

    Attributes:
        config: the parameters.
        base_betas_f64: (T,) scaled linear betas.
        unclipped_betas_f64: (T,) betas after the zero-SNR rescaling, before clipping.
        alphas_cumprod_before_shift_f64: (T,) abar of the clipped betas, before the shift.
        shift_ratio: the factor on the signal-to-noise ratio (1 without shift).
        alphas_cumprod_f64: (T,) final abar.
        betas_f64: (T,) final betas. With a shift betas_f64[0] is 0 although abar_0 < 1.
    """

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = config = config or ScheduleConfig()
        roots = np.linspace(
            math.sqrt(config.beta_start), math.sqrt(config.beta_end), config.num_train_timesteps
        )
        betas: Float64Array = np.asarray(roots, dtype=np.float64) ** 2
        self.base_betas_f64: Float64Array = betas
        if config.zero_snr:
            betas = _rescale_to_zero_terminal_snr(betas)
        self.unclipped_betas_f64: Float64Array = betas
        clipped = np.minimum(betas, config.max_beta)
        self.alphas_cumprod_before_shift_f64: Float64Array = np.cumprod(
            1.0 - clipped, dtype=np.float64
        )
        if config.shift_snr:
            self.shift_ratio = config.shift_ratio
            self.alphas_cumprod_f64 = _shift_snr(
                self.alphas_cumprod_before_shift_f64, self.shift_ratio
            )
            abar = self.alphas_cumprod_f64
            # The first beta is 0 by convention of the released schedule; nothing at inference
            # reads it.
            self.betas_f64: Float64Array = np.concatenate([[0.0], 1.0 - abar[1:] / abar[:-1]])
        else:
            self.shift_ratio = 1.0
            self.alphas_cumprod_f64 = self.alphas_cumprod_before_shift_f64
            self.betas_f64 = clipped

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        """The schedule of these parameters (`MMDMConfig.schedule` for a model)."""
        return cls(config)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T."""
        return self.config.num_train_timesteps

    @cached_property
    def betas(self) -> Float32Array:
        """(T,) final betas."""
        return self.betas_f64.astype(np.float32)

    @cached_property
    def alphas_cumprod(self) -> Float32Array:
        """(T,) abar."""
        return self.alphas_cumprod_f64.astype(np.float32)

    @cached_property
    def alphas_cumprod_prev_f64(self) -> Float64Array:
        """(T,) abar of the timestep before; 1 before the first."""
        return np.concatenate([[1.0], self.alphas_cumprod_f64[:-1]])

    @cached_property
    def alphas_cumprod_prev(self) -> Float32Array:
        """(T,) abar of the timestep before; 1 before the first."""
        return self.alphas_cumprod_prev_f64.astype(np.float32)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Float32Array:
        """(T,) factor of the clean latents in x_t."""
        return np.sqrt(self.alphas_cumprod_f64).astype(np.float32)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Float32Array:
        """(T,) factor of the noise in x_t."""
        return np.sqrt(1.0 - self.alphas_cumprod_f64).astype(np.float32)

    @cached_property
    def posterior_variance(self) -> Float32Array:
        """(T,) variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        abar, prev = self.alphas_cumprod_f64, self.alphas_cumprod_prev_f64
        return (self.betas_f64 * (1.0 - prev) / (1.0 - abar)).astype(np.float32)

    @cached_property
    def posterior_mean_coef1(self) -> Float32Array:
        """(T,) factor of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        abar, prev = self.alphas_cumprod_f64, self.alphas_cumprod_prev_f64
        return (self.betas_f64 * np.sqrt(prev) / (1.0 - abar)).astype(np.float32)

    @cached_property
    def posterior_mean_coef2(self) -> Float32Array:
        """(T,) factor of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        abar, prev = self.alphas_cumprod_f64, self.alphas_cumprod_prev_f64
        return ((1.0 - prev) * np.sqrt(1.0 - self.betas_f64) / (1.0 - abar)).astype(np.float32)

    def num_steps_run(self, num_steps: int) -> int:
        """Number of steps that `ddim(num_steps)` really has.

        Raises:
            UserError: the grid would leave the schedule.
        """
        return ddim_step_count(num_steps, self.num_train_timesteps)

    def ddim(self, num_steps: int) -> DDIMGrid:
        """Timesteps and update factors for about `num_steps` denoising steps.

        Raises:
            UserError: the grid would leave the schedule; names step counts that work.
        """
        return self._grid(ddim_timesteps(num_steps, self.num_train_timesteps))

    def log_ratio_grid(self, num_steps: int) -> DDIMGrid:
        """As `ddim`, with as many steps between the same ends, evenly spaced in log(abar/(1-abar)).

        Solvers of second order extrapolate over such distances: at even timesteps the last but one
        is several times the one before, and they do worse than DDIM.

        Raises:
            UserError: as `ddim`.
        """
        even = ddim_timesteps(num_steps, self.num_train_timesteps)
        count, ratio = len(even), self._log_ratios
        wanted = np.linspace(ratio[even[0]], ratio[even[-1]], count)
        # The ratio falls with the timestep; np.interp wants it rising.
        found = np.rint(np.interp(-wanted, -ratio, np.arange(self.num_train_timesteps)))
        timesteps = [int(t) for t in found]
        for i in range(1, count):
            timesteps[i] = max(timesteps[i], timesteps[i - 1] + 1)
        timesteps = [min(t, even[-1] - (count - 1 - i)) for i, t in enumerate(timesteps)]
        return self._grid(timesteps)

    @cached_property
    def _log_ratios(self) -> Float64Array:
        return np.log(self.alphas_cumprod_f64) - np.log1p(-self.alphas_cumprod_f64)

    def _grid(self, ascending: Sequence[int]) -> DDIMGrid:
        timesteps = np.asarray(ascending, dtype=np.int64)
        alphas = self.alphas_cumprod[timesteps]
        prev = np.concatenate([self.alphas_cumprod[:1], alphas[:-1]]).astype(np.float64)
        # This root is float32 in the released sampler, everything around it float64.
        sqrt_one_minus = np.sqrt(np.float32(1.0) - alphas)
        sqrt_alphas = np.sqrt(alphas.astype(np.float64))
        x_factor = np.sqrt(prev) / sqrt_alphas
        e_factor = np.sqrt(1.0 - prev) - x_factor * sqrt_one_minus.astype(np.float64)
        return DDIMGrid(
            timesteps=timesteps,
            alphas=alphas,
            alphas_prev=prev,
            sigmas=np.zeros(len(timesteps)),
            sqrt_one_minus_alphas=sqrt_one_minus,
            x_factor=x_factor.astype(np.float32),
            e_factor=e_factor.astype(np.float32),
        )


def _rescale_to_zero_terminal_snr(betas: Float64Array) -> Float64Array:
    """Betas of the schedule shifted and scaled so that sqrt(abar) ends at 0."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1.0 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def _shift_snr(alphas_cumprod: Float64Array, ratio: float) -> Float64Array:
    """The abar whose signal-to-noise ratio is `ratio` times that of the given one."""
    log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod) + np.log(ratio)
    snr = np.exp(log_snr)
    return snr / (1.0 + snr)
