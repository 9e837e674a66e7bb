"""Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.strict import bounds, choices
from diffship.sampling.matrix import NOISE, Coefficients, as_matrix, seen, unit
from diffship.sampling.process import split_rows
from diffship.sampling.sampler import BetasSampler, times_of
from diffship.sampling.schedule import F64

_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Lcm(BetasSampler):
    """diffusers' LCMScheduler; its grid is a subset of distillation's, so `timestep_spacing` has no say."""

    beta_start: float = field(default=0.00085, metadata=bounds(1e-12, 0.999))
    beta_end: float = field(default=0.012, metadata=bounds(1e-12, 0.999))
    beta_schedule: str = field(
        default="scaled_linear", metadata=choices("linear", "scaled_linear", "squaredcos_cap_v2")
    )
    original_inference_steps: int = field(default=50, metadata=bounds(1, 10_000))
    timestep_scaling: float = field(default=10.0, metadata=bounds(1e-6, 1e6))
    rescale_betas_zero_snr: bool = False

    diffusers_class: ClassVar[str] = "LCMScheduler"
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False, "clip_sample": False}

    @property
    def name(self) -> str:
        return "lcm"

    @property
    def spaced(self) -> bool:
        return False

    def timesteps(self, steps: int) -> F64:
        total = self.original_inference_steps
        if steps > total or total > self.num_train_timesteps:
            most = min(total, self.num_train_timesteps)
            raise ConfigError(f"lcm: steps is {steps}; at most {most} fit original_inference_steps {total}")
        origin = np.arange(total, 0, -1) * (self.num_train_timesteps // total) - 1
        picks = np.floor(np.linspace(0, total, steps, endpoint=False)).astype(np.int64)
        return origin[picks].astype(np.float64)

    def memory(self, step: int, steps: int) -> int:
        return 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        times = times_of(self, steps)
        t = int(times[step])
        x, output = seen(age)
        x0, _ = split_rows(self.process.at(t), self.prediction_type, x, output)
        c_skip, c_out = self._boundary(t)
        x_next = c_out * x0 + c_skip * x
        if step + 1 < len(times):
            x_next = self.process.at(int(times[step + 1])).mix(x_next, unit(NOISE, age))
        return Coefficients(1.0, float(t), as_matrix(x_next))

    def _boundary(self, t: int) -> tuple[float, float]:
        scaled = t * self.timestep_scaling
        total = scaled**2 + _SIGMA_DATA**2
        return _SIGMA_DATA**2 / total, scaled / total**0.5
