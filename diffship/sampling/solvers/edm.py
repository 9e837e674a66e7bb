"""Samplers of models that were trained as Karras et al. (2022) propose: levels between two ends, no betas."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.strict import bounded, bounds, choices
from diffship.sampling.process import Edm
from diffship.sampling.sampler import CONFIG
from diffship.sampling.schedule import F32, F64, linspace
from diffship.sampling.solvers.dpmpp import SDE, DpmSteps
from diffship.sampling.solvers.euler import EulerSteps
from diffship.sampling.solvers.levels import LevelSampler


@dataclass(frozen=True)
@bounded
class EdmSampler(LevelSampler):
    """The config keys of both."""

    sigma_min: float = field(default=0.002, metadata=bounds(1e-6, 1e6))
    sigma_max: float = field(default=80.0, metadata=bounds(1e-6, 1e6))
    sigma_data: float = field(default=0.5, metadata=bounds(1e-6, 1e6))
    sigma_schedule: str = field(default="karras", metadata=choices("karras", "exponential"))
    num_train_timesteps: int = field(default=1000, metadata=bounds(2, 10_000))
    prediction_type: str = field(default="epsilon", metadata=choices("epsilon", "v_prediction"))
    rho: float = field(default=7.0, metadata=bounds(1e-3, 1e3))

    process_kind: ClassVar[str] = "edm"

    @property
    def process(self) -> Edm:
        return Edm(self.sigma_data, self.prediction_type)

    def timesteps(self, steps: int) -> F64:
        return self.process.times(self._levels(steps))

    def check_times(self, times: F64, steps: int) -> None:
        if not np.isfinite(times).all():
            raise ConfigError(
                f"levels from {self.sigma_max:g} (sigma_max) to {self.sigma_min:g} (sigma_min) are not finite"
            )

    def init_noise_sigma(self, steps: int) -> float:
        return float((self.sigma_max**2 + 1.0) ** 0.5)

    def noise_levels(self, steps: int) -> list[float]:
        levels = self._levels(steps)
        return [float(level) for level in np.append(levels, np.float32(self._final(levels)))]

    def _levels(self, steps: int) -> F32:
        """Largest first, in diffusers' float32."""
        if self.sigma_schedule == "exponential":
            return np.exp(linspace(math.log(self.sigma_min), math.log(self.sigma_max), steps))[::-1]
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return self._karras(high, low - high, steps)

    def _karras(self, start: float, span: float, steps: int) -> F32:
        return ((start + np.linspace(0, 1, steps) * span) ** self.rho).astype(np.float32)

    @abstractmethod
    def _final(self, levels: F32) -> float:
        """The level after the last step, where `levels` are those before each."""


@dataclass(frozen=True)
class EdmEuler(EdmSampler, EulerSteps):
    """diffusers' EDMEulerScheduler without churn."""

    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))

    diffusers_class: ClassVar[str] = "EDMEulerScheduler"
    refused: ClassVar[Mapping[str, bool]] = {}

    @property
    def name(self) -> str:
        return "edm-euler"

    def _final(self, levels: F32) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else float(levels[-1])


@dataclass(frozen=True)
class EdmDpmPP(EdmSampler, DpmSteps):
    """diffusers' EDMDPMSolverMultistepScheduler."""

    diffusers_class: ClassVar[str] = "EDMDPMSolverMultistepScheduler"
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False}

    @property
    def name(self) -> str:
        return "edm-dpmpp"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(config)
        if sampler.algorithm_type == SDE and sampler.solver_order == 3:
            raise UnsupportedError(f"{CONFIG}: solver_order is 3 with algorithm_type {SDE}, which diffusers lacks too")
        return sampler

    def _karras(self, start: float, span: float, steps: int) -> F32:
        # diffusers computes these in float32 throughout, which small levels show
        return (np.float32(start) + linspace(0.0, 1.0, steps) * np.float32(span)) ** np.float32(self.rho)

    def _final(self, levels: F32) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else self.sigma_min
