"""Euler and Euler-ancestral in sigma space (Karras et al. 2022, algorithm 2 without churn; Crowson's k-diffusion)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.strict import bounds, choices
from diffship.sampling.samplers import NOISE, OUTPUT, Coefficients, Sampler, X, as_matrix, times_of, unit
from diffship.sampling.schedule import F64, SPACINGS, karras, sigma_to_t


@dataclass(frozen=True)
class _SigmaSampler(Sampler):
    timestep_spacing: str = field(default="linspace", metadata=choices(*SPACINGS))
    rescale_betas_zero_snr: bool = False

    def timesteps(self, steps: int) -> F64:
        # diffusers keeps these in float32, fractions included
        return self.grid(steps, self.num_train_timesteps / steps).astype(np.float32).astype(np.float64)

    def memory(self, step: int, steps: int) -> int:
        return 0

    def init_noise_sigma(self, steps: int) -> float:
        top = max(self.noise_levels(steps))
        return top if self.timestep_spacing in ("linspace", "trailing") else (top * top + 1.0) ** 0.5

    def noising(self, step: int, steps: int) -> tuple[float, float]:
        return 1.0, self.noise_levels(steps)[step]

    def noise_levels(self, steps: int) -> list[float]:
        """sigma before each call, and after the last."""
        return [float(level) for level in np.append(self._levels(steps), self._final()).astype(np.float32)]

    def _levels(self, steps: int) -> F64:
        table = self.sigmas()
        grid = self.grid(steps, self.num_train_timesteps / steps).astype(np.float32)
        return np.interp(grid, np.arange(len(table)), table)

    def _final(self) -> float:
        return 0.0

    def _slope(self, s: float, age: int) -> F64:
        """dx/dsigma = (x - x0) / sigma, as a row; sigma is never 0 before a call."""
        x, output = unit(X, age), unit(OUTPUT, age)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            scale = s * s + 1.0
            return np.asarray(s / scale * x + output / scale**0.5)
        return np.asarray((x - output) / s)


@dataclass(frozen=True)
class Euler(_SigmaSampler):
    """diffusers' EulerDiscreteScheduler without churn."""

    interpolation_type: str = field(default="linear", metadata=choices("linear", "log_linear"))
    timestep_type: str = field(default="discrete", metadata=choices("discrete", "continuous"))
    use_karras_sigmas: bool = False
    sigma_min: float | None = field(default=None, metadata=bounds(1e-6, 1e6))
    sigma_max: float | None = field(default=None, metadata=bounds(1e-6, 1e6))
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))

    diffusers_class: ClassVar[str] = "EulerDiscreteScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), False)

    @property
    def name(self) -> str:
        return "euler"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(config)
        if sampler.interpolation_type != "linear" or sampler.timestep_type != "discrete":
            raise UnsupportedError(
                f"interpolation_type is {sampler.interpolation_type!r} and timestep_type {sampler.timestep_type!r}; "
                "only 'linear' and 'discrete' are built"
            )
        return sampler

    def timesteps(self, steps: int) -> F64:
        if not self.use_karras_sigmas:
            return super().timesteps(steps)
        return sigma_to_t(self._levels(steps), self.sigmas()).astype(np.float32).astype(np.float64)

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        s, s_next = self.noise_levels(steps)[step : step + 2]
        x_next = unit(X, age) + (s_next - s) * self._slope(s, age)
        return Coefficients((s * s + 1.0) ** -0.5, float(times_of(self, steps)[step]), as_matrix(x_next))

    def _levels(self, steps: int) -> F64:
        levels = super()._levels(steps)
        if not self.use_karras_sigmas:
            return levels
        low = float(levels[-1]) if self.sigma_min is None else self.sigma_min
        return karras(low, float(levels[0]) if self.sigma_max is None else self.sigma_max, steps)

    def _final(self) -> float:
        return float(self.sigmas()[0]) if self.final_sigmas_type == "sigma_min" else 0.0


@dataclass(frozen=True)
class EulerAncestral(_SigmaSampler):
    """diffusers' EulerAncestralDiscreteScheduler: a step down to sigma_down, then noise up to the next sigma."""

    diffusers_class: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    refused: ClassVar[Mapping[str, bool]] = {}

    @property
    def name(self) -> str:
        return "euler-a"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(config)
        if sampler.prediction_type == "sample":
            raise ConfigError("euler-a has no 'sample' prediction (nor has diffusers); choose euler or ddim")
        return sampler

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        s, s_next = self.noise_levels(steps)[step : step + 2]
        down = s_next**2 / s
        up = (s_next**2 - down**2) ** 0.5
        x_next = unit(X, age) + (down - s) * self._slope(s, age) + up * unit(NOISE, age)
        return Coefficients((s * s + 1.0) ** -0.5, float(times_of(self, steps)[step]), as_matrix(x_next))
