"""Ancestral sampling of the first diffusion models (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffship.core.strict import choices
from diffship.sampling.matrix import NOISE, Coefficients, as_matrix, seen, unit
from diffship.sampling.process import cumulative, split_rows
from diffship.sampling.sampler import BetasSampler, times_of
from diffship.sampling.schedule import F64

_LEAST = 1e-20  # the least variance, so that its logarithm is finite


@dataclass(frozen=True)
class Ddpm(BetasSampler):
    """diffusers' DDPMScheduler; `clip_sample` is not linear and so refused, as are variances that a network learnt."""

    variance_type: str = field(default="fixed_small", metadata=choices("fixed_small", "fixed_small_log", "fixed_large"))
    rescale_betas_zero_snr: bool = False

    diffusers_class: ClassVar[str] = "DDPMScheduler"
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False, "clip_sample": True}

    @property
    def name(self) -> str:
        return "ddpm"

    def timesteps(self, steps: int) -> F64:
        return np.round(self.grid(steps, self.num_train_timesteps / steps))

    def memory(self, step: int, steps: int) -> int:
        return 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        times = times_of(self, steps)
        t = int(times[step])
        a = float(self.alphas_cumprod()[t])
        a_prev = float(self.alphas_cumprod()[int(times[step + 1])]) if step + 1 < len(times) else 1.0
        beta = 1 - a / a_prev  # of the whole step
        x, output = seen(age)
        x0, _ = split_rows(cumulative(a), self.prediction_type, x, output)
        x_prev = a_prev**0.5 * beta / (1 - a) * x0 + (a / a_prev) ** 0.5 * (1 - a_prev) / (1 - a) * x
        if t > 0:
            small = max((1 - a_prev) / (1 - a) * beta, _LEAST)
            x_prev = x_prev + (beta if self.variance_type == "fixed_large" else small) ** 0.5 * unit(NOISE, age)
        return Coefficients(1.0, float(t), as_matrix(x_prev))
