"""DDIM with eta 0 (Song et al. 2021, equation 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffship.sampling.samplers import OUTPUT, Coefficients, Sampler, X, as_matrix, denoised, times_of, unit
from diffship.sampling.schedule import F64


@dataclass(frozen=True)
class Ddim(Sampler):
    """diffusers' DDIMScheduler; `clip_sample` is not linear and so refused."""

    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    diffusers_class: ClassVar[str] = "DDIMScheduler"
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False, "clip_sample": True}

    @property
    def name(self) -> str:
        return "ddim"

    def timesteps(self, steps: int) -> F64:
        return np.round(self.grid(steps, self.num_train_timesteps / steps))

    def memory(self, step: int, steps: int) -> int:
        return 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        t = int(times_of(self, steps)[step])
        a, a_prev = self._alpha(t), self._alpha(t - self.num_train_timesteps // steps)
        x, output = unit(X, age), unit(OUTPUT, age)
        x0 = denoised(self.prediction_type, a**0.5, (1 - a) ** 0.5, x, output)
        x_prev = a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * self._epsilon(a, x, output)
        return Coefficients(1.0, float(t), as_matrix(x_prev))

    def _epsilon(self, a: float, x: F64, output: F64) -> F64:
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return np.asarray(a**0.5 * output + (1 - a) ** 0.5 * x)
        return np.asarray((x - a**0.5 * output) / (1 - a) ** 0.5)

    def _alpha(self, t: int) -> float:
        if t < 0 and self.set_alpha_to_one:
            return 1.0
        return float(self.alphas_cumprod()[max(t, 0)])
