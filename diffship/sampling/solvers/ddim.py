"""DDIM with eta 0 (Song et al. 2021, equation 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffship.sampling.matrix import Coefficients, as_matrix, seen
from diffship.sampling.process import Level, cumulative, split_rows
from diffship.sampling.sampler import BetasSampler, times_of
from diffship.sampling.schedule import F64


@dataclass(frozen=True)
class Ddim(BetasSampler):
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
        now, before = self._at(t), self._at(t - self.num_train_timesteps // steps)
        x_prev = before.mix(*split_rows(now, self.prediction_type, *seen(age)))
        return Coefficients(1.0, float(t), as_matrix(x_prev))

    def _at(self, t: int) -> Level:
        if t < 0 and self.set_alpha_to_one:
            return cumulative(1.0)
        return self.process.at(max(t, 0))
