"""Heun's method: a step of Euler, and one back at its start with the mean of both ends' slopes (Karras et al. 2022).

Every step but the last takes two calls. History before the second: the first slope, and the sample that the step
began from. Without it the second call leaves the sample where Euler's step has brought it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffship.core.strict import bounds
from diffship.sampling.matrix import HISTORY, Coefficients, X, as_matrix, seen, unit
from diffship.sampling.process import Sloped
from diffship.sampling.sampler import times_of
from diffship.sampling.schedule import F64
from diffship.sampling.solvers.levels import LevelSampler, RespacedSigmaSampler


@dataclass(frozen=True)
class TwoCalls(LevelSampler):
    """Two calls a step, but for the last step, which is Euler's."""

    calls_a_step: ClassVar[int] = 2
    carried: ClassVar[int]  # history before a second call

    @property
    @abstractmethod
    def process(self) -> Sloped: ...

    def memory(self, step: int, steps: int) -> int:
        return self.carried if step % 2 else 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        s, s_next = self.noise_levels(steps)[step // 2 : step // 2 + 2]
        last = step == 2 * steps - 2
        if step % 2:
            level, rows = self.second(s, s_next, age)
        else:
            level, rows = s, self.first(s, s_next, age)
        time = float(times_of(self, steps)[step])
        return Coefficients(self.process.input_scale(level), time, as_matrix(*(rows[:1] if last else rows)))

    @abstractmethod
    def first(self, s: float, s_next: float, age: int) -> tuple[F64, ...]:
        """The sample for the second call, and the history; if s_next is 0, the end of the step."""

    @abstractmethod
    def second(self, s: float, s_next: float, age: int) -> tuple[float, tuple[F64, ...]]:
        """(the level that the network sees, the end of the step)."""


@dataclass(frozen=True)
class HeunSteps(TwoCalls):
    """Heun's method on any process whose flow is followed in s."""

    carried: ClassVar[int] = 2

    def first(self, s: float, s_next: float, age: int) -> tuple[F64, ...]:
        x, slope = unit(X, age), self.process.slope(s, *seen(age))
        return x + (s_next - s) * slope, slope, x

    def second(self, s: float, s_next: float, age: int) -> tuple[float, tuple[F64]]:
        if age < self.carried:
            return s_next, (unit(X, age),)
        slope = (unit(HISTORY, age) + self.process.slope(s_next, *seen(age))) / 2
        return s_next, (unit(HISTORY + 1, age) + (s_next - s) * slope,)


@dataclass(frozen=True)
class Heun(RespacedSigmaSampler, HeunSteps):
    """diffusers' HeunDiscreteScheduler; `clip_sample` is not linear and so refused."""

    beta_start: float = field(default=0.00085, metadata=bounds(1e-12, 0.999))
    beta_end: float = field(default=0.012, metadata=bounds(1e-12, 0.999))

    diffusers_class: ClassVar[str] = "HeunDiscreteScheduler"
    refused: ClassVar[Mapping[str, bool]] = {"clip_sample": False}

    @property
    def name(self) -> str:
        return "heun"

    def timesteps(self, steps: int) -> F64:
        times = self.level_times(steps).astype(np.float32).astype(np.float64)
        return np.concatenate([times[:1], np.repeat(times[1:], 2)])
