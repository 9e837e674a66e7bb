"""Trajectory consistency sampling (Zheng et al. 2024, arXiv 2402.19159, algorithm 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from diffship.core.strict import bounds
from diffship.sampling.matrix import NOISE, Coefficients, as_matrix, seen, unit
from diffship.sampling.process import Level, split_rows
from diffship.sampling.sampler import times_of
from diffship.sampling.solvers.lcm import Lcm


@dataclass(frozen=True)
class Tcd(Lcm):
    """diffusers' TCDScheduler, on LCM's timesteps.

    `eta` is the paper's gamma, the share of noise drawn anew. In diffusers it is no key of the config but an argument,
    for which the stock pipelines pass 0.
    """

    eta: float = field(default=0.0, metadata=bounds(0.0, 1.0))

    diffusers_class: ClassVar[str] = "TCDScheduler"

    @property
    def name(self) -> str:
        return "tcd"

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        times = times_of(self, steps)
        last = step + 1 == len(times)
        t, t_next = int(times[step]), 0 if last else int(times[step + 1])
        s = math.floor((1 - self.eta) * t_next)
        x0, noise = split_rows(self.process.at(t), self.prediction_type, *seen(age))
        x_next = self.process.at(s).mix(x0, noise)
        if self.eta and not last:
            kept = float(self.alphas_cumprod()[t_next]) / float(self.alphas_cumprod()[s])
            x_next = Level(kept**0.5, (1 - kept) ** 0.5).mix(x_next, unit(NOISE, age))
        return Coefficients(1.0, float(t), as_matrix(x_next))
