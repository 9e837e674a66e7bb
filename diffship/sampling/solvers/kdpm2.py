"""DPM-Solver-2 as k-diffusion has it: a second call half way through each step in log(sigma), but for the last step.

The end of a step is reached from its start with what the second call found. History before it: the sample that the
step began from (and for `dpmpp-sde` the noise of the first call). Without it the second call steps on from half way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.strict import bounds
from diffship.sampling.matrix import HISTORY, NOISE, X, seen, unit
from diffship.sampling.schedule import F64
from diffship.sampling.sigmas import karras
from diffship.sampling.solvers.heun import TwoCalls
from diffship.sampling.solvers.levels import RespacedSigmaSampler, ancestral


@dataclass(frozen=True)
class HalfWay(RespacedSigmaSampler, TwoCalls):
    """What the three have in common: the levels half way, and their timesteps."""

    beta_start: float = field(default=0.00085, metadata=bounds(1e-12, 0.999))
    beta_end: float = field(default=0.012, metadata=bounds(1e-12, 0.999))

    refused: ClassVar[Mapping[str, bool]] = {}
    rounds_karras: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(config)
        if sampler.prediction_type == "sample":
            raise ConfigError(f"{sampler.name} has no 'sample' prediction (nor has diffusers); choose heun or euler")
        return sampler

    @abstractmethod
    def half_way(self, s: float, s_next: float) -> float:
        """The level of the second call."""

    def timesteps(self, steps: int) -> F64:
        levels, times = self.noise_levels(steps), self.level_times(steps)
        if self.use_karras_sigmas and self.rounds_karras:
            times = np.round(times)
        halves = np.array([self.half_way(*levels[i : i + 2]) for i in range(steps - 1)])
        mixed = np.empty(2 * steps - 1)
        mixed[::2], mixed[1::2] = times, self.process.times(halves)
        return mixed


@dataclass(frozen=True)
class Kdpm2(HalfWay):
    """diffusers' KDPM2DiscreteScheduler."""

    diffusers_class: ClassVar[str] = "KDPM2DiscreteScheduler"
    carried: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return "kdpm2"

    def half_way(self, s: float, s_next: float) -> float:
        return middle32(s, s_next)

    def first(self, s: float, s_next: float, age: int) -> tuple[F64, ...]:
        x = unit(X, age)
        return x + (self.half_way(s, s_next) - s) * self.process.slope(s, *seen(age)), x

    def second(self, s: float, s_next: float, age: int) -> tuple[float, tuple[F64]]:
        middle = self.half_way(s, s_next)
        return middle, (self._from(s, middle, s_next, age),)

    def _from(self, s: float, middle: float, end: float, age: int) -> F64:
        start, begun = (unit(HISTORY, age), s) if age else (unit(X, age), middle)
        return start + (end - begun) * self.process.slope(middle, *seen(age))


@dataclass(frozen=True)
class Kdpm2Ancestral(Kdpm2):
    """diffusers' KDPM2AncestralDiscreteScheduler: down to sigma_down, then noise up to the next level."""

    diffusers_class: ClassVar[str] = "KDPM2AncestralDiscreteScheduler"

    @property
    def name(self) -> str:
        return "kdpm2-a"

    def half_way(self, s: float, s_next: float) -> float:
        return middle32(s, ancestral32(s, s_next)[0])

    def second(self, s: float, s_next: float, age: int) -> tuple[float, tuple[F64]]:
        middle, (down, up) = self.half_way(s, s_next), ancestral32(s, s_next)
        return middle, (self._from(s, middle, down, age) + up * unit(NOISE, age),)


@dataclass(frozen=True)
class DpmPPSde(HalfWay):
    """diffusers' DPMSolverSDEScheduler with noise of our own generators in place of torchsde's Brownian tree.

    The second call's noise is that of the whole step. As in the tree, the first half of it is what the first call drew.
    """

    diffusers_class: ClassVar[str] = "DPMSolverSDEScheduler"
    carried: ClassVar[int] = 2
    rounds_karras: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "dpmpp-sde"

    def respaced(self, high: float, low: float, points: int) -> F64 | None:
        # this class of diffusers reads sigma_min and sigma_max for the other grids alone
        return karras(low, high, points) if self.use_karras_sigmas else super().respaced(high, low, points)

    def half_way(self, s: float, s_next: float) -> float:
        return float(np.sqrt(s * s_next))

    def first(self, s: float, s_next: float, age: int) -> tuple[F64, ...]:
        x, noise, middle = unit(X, age), unit(NOISE, age), self.half_way(s, s_next)
        return self._down(s, s, middle, x, noise, age), x, noise

    def second(self, s: float, s_next: float, age: int) -> tuple[float, tuple[F64]]:
        middle, fresh = self.half_way(s, s_next), unit(NOISE, age)
        if age < self.carried:
            return middle, (self._down(middle, middle, s_next, unit(X, age), fresh, age),)
        drawn = (s - middle) ** 0.5 * unit(HISTORY + 1, age) + (middle - s_next) ** 0.5 * fresh
        whole = drawn / (s - s_next) ** 0.5
        return middle, (self._down(s, middle, s_next, unit(HISTORY, age), whole, age),)

    def _down(self, s: float, level: float, end: float, x: F64, noise: F64, age: int) -> F64:
        """From level s to `end` with the x0 that the network gives at `level`, then noise."""
        down, up = ancestral(s, end)
        x0, _ = self.process.split(level, *seen(age))
        return down / s * x + (1.0 - down / s) * x0 + up * noise


def middle32(s: float, end: float) -> float:
    """exp of the mean logarithm, with diffusers' roundings to float32."""
    if end == 0.0:
        return 0.0
    high, low = np.log(np.float32(s)), np.log(np.float32(end))
    return float(np.exp(high - (high - low) * np.float32(0.5)))


def ancestral32(s: float, s_next: float) -> tuple[float, float]:
    """`ancestral` with diffusers' roundings to float32, which show if s_next is much less than s."""
    square, next_square = np.float32(s) * np.float32(s), np.float32(s_next) * np.float32(s_next)
    up = np.sqrt(next_square * (square - next_square) / square)
    return float(np.sqrt(np.maximum(next_square - up * up, 0))), float(up)
