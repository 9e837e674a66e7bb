"""Euler and Euler-ancestral in sigma space (Karras et al. 2022, algorithm 2 without churn; Crowson's k-diffusion)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.strict import choices
from diffship.sampling.matrix import NOISE, Coefficients, X, as_matrix, seen, unit
from diffship.sampling.process import Sloped
from diffship.sampling.sampler import CONFIG, times_of
from diffship.sampling.schedule import F64
from diffship.sampling.solvers.levels import LevelSampler, RespacedSigmaSampler, SigmaSampler, ancestral


@dataclass(frozen=True)
class EulerSteps(LevelSampler):
    """x + (s_next - s) dx/ds, for any process whose flow is followed in s."""

    @property
    @abstractmethod
    def process(self) -> Sloped: ...

    def memory(self, step: int, steps: int) -> int:
        return 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        s, s_next = self.noise_levels(steps)[step : step + 2]
        x_next = unit(X, age) + (s_next - s) * self.process.slope(s, *seen(age))
        time = float(times_of(self, steps)[step])
        return Coefficients(self.process.input_scale(s), time, as_matrix(x_next))


@dataclass(frozen=True)
class Euler(RespacedSigmaSampler, EulerSteps):
    """diffusers' EulerDiscreteScheduler without churn."""

    rescale_betas_zero_snr: bool = False
    interpolation_type: str = field(default="linear", metadata=choices("linear", "log_linear"))
    timestep_type: str = field(default="discrete", metadata=choices("discrete", "continuous"))
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))

    diffusers_class: ClassVar[str] = "EulerDiscreteScheduler"
    refused: ClassVar[Mapping[str, bool]] = {}

    @property
    def name(self) -> str:
        return "euler"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(config)
        if sampler.interpolation_type != "linear" or sampler.timestep_type != "discrete":
            raise UnsupportedError(
                f"{CONFIG}: interpolation_type is {sampler.interpolation_type!r} and timestep_type "
                f"{sampler.timestep_type!r}; only 'linear' and 'discrete' are built"
            )
        return sampler

    def timesteps(self, steps: int) -> F64:
        return self.level_times(steps).astype(np.float32).astype(np.float64)

    def final_level(self) -> float:
        return float(self.sigmas()[0]) if self.final_sigmas_type == "sigma_min" else 0.0


@dataclass(frozen=True)
class EulerAncestral(SigmaSampler):
    """diffusers' EulerAncestralDiscreteScheduler: a step down to sigma_down, then noise up to the next sigma."""

    rescale_betas_zero_snr: bool = False

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

    def memory(self, step: int, steps: int) -> int:
        return 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        s, s_next = self.noise_levels(steps)[step : step + 2]
        down, up = ancestral(s, s_next)
        x_next = unit(X, age) + (down - s) * self.process.slope(s, *seen(age)) + up * unit(NOISE, age)
        return Coefficients(self.process.input_scale(s), float(times_of(self, steps)[step]), as_matrix(x_next))
