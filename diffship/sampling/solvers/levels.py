"""What samplers over noise levels share: the levels before each step and after the last, and their timesteps."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np

from diffship.core.registry import SPACINGS
from diffship.core.strict import bounds, choices
from diffship.sampling.process import Betas, Exploding
from diffship.sampling.sampler import BetasSampler, Sampler, times_of
from diffship.sampling.schedule import F64
from diffship.sampling.sigmas import chosen_grid


def log_step(before: float, after: float) -> float:
    """A step in log(alpha / sigma) between two values of sigma / alpha; infinite if no noise is left."""
    return math.log(before / after) if after else math.inf


def ancestral(s: float, s_next: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the level to step to, and the noise that leads up from there to s_next."""
    down = s_next**2 / s
    return down, (s_next**2 - down**2) ** 0.5


@dataclass(frozen=True)
class LevelSampler(Sampler):
    """Steps from one noise level to the next, in `calls_a_step` calls but for the last, which takes one."""

    @abstractmethod
    def noise_levels(self, steps: int) -> list[float]:
        """The level before each step, and after the last."""

    def noising(self, step: int, steps: int) -> tuple[float, float]:
        # diffusers counts the sample between the two calls of a step as at the next level, whatever the second sees
        level = self.process.level(self.noise_levels(steps)[-(-step // self.calls_a_step)])
        return level.alpha, level.sigma


@dataclass(frozen=True)
class BetasLevels(LevelSampler, BetasSampler):
    """Noise levels of betas."""

    timestep_spacing: str = field(default="linspace", metadata=choices(*SPACINGS))


@dataclass(frozen=True)
class Respaced(BetasLevels):
    """Noise levels may be those of another grid between the same ends, or between `sigma_max` and `sigma_min`."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = field(default=None, metadata=bounds(1e-6, 1e6))
    sigma_max: float | None = field(default=None, metadata=bounds(1e-6, 1e6))

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen_grid(self)

    def respaced(self, high: float, low: float, points: int) -> F64 | None:
        """The levels of the grid that the config asks for, None if it asks for none."""
        grid = chosen_grid(self)
        if grid is None:
            return None
        low = low if self.sigma_min is None else self.sigma_min
        return grid(low, high if self.sigma_max is None else self.sigma_max, points)


@dataclass(frozen=True)
class SigmaSampler(BetasLevels):
    """In the coordinates of Karras et al.: x = x0 + s noise, at timesteps with fractions."""

    @property
    def process(self) -> Exploding:
        return Exploding(self)

    def timesteps(self, steps: int) -> F64:
        # diffusers keeps these in float32, fractions included
        return self.grid(steps, self.num_train_timesteps / steps).astype(np.float32).astype(np.float64)

    def init_noise_sigma(self, steps: int) -> float:
        top = max(self.noise_levels(steps))
        return top if self.timestep_spacing in ("linspace", "trailing") else (top * top + 1.0) ** 0.5

    def noise_levels(self, steps: int) -> list[float]:
        return [float(level) for level in np.append(self.levels(steps), self.final_level()).astype(np.float32)]

    def levels(self, steps: int) -> F64:
        """The level before each step."""
        table = self.sigmas()
        grid = self.grid(steps, self.num_train_timesteps / steps).astype(np.float32)
        return np.interp(grid, np.arange(len(table)), table)

    def final_level(self) -> float:
        """The level after the last step."""
        return 0.0


@dataclass(frozen=True)
class RespacedSigmaSampler(Respaced, SigmaSampler):
    """A SigmaSampler whose levels may be respaced between the first and the last of them."""

    def levels(self, steps: int) -> F64:
        levels = SigmaSampler.levels(self, steps)
        respaced = self.respaced(float(levels[0]), float(levels[-1]), steps)
        return levels if respaced is None else respaced

    def level_times(self, steps: int) -> F64:
        """The timestep of each of `levels`."""
        if chosen_grid(self) is None:
            return SigmaSampler.timesteps(self, steps)
        return self.process.times(self.levels(steps))


@dataclass(frozen=True)
class LogSampler(Respaced):
    """In the coordinates that preserve variance, at whole timesteps; steps are measured in log(sigma / alpha)."""

    @property
    def process(self) -> Betas:
        return Betas(self)

    def timesteps(self, steps: int) -> F64:
        levels = self.other_levels(steps)
        if levels is not None:
            times = self.process.times(levels)
            return np.trunc(np.round(times) if self.rounds_times() else times)
        points = steps if self.timestep_spacing == "trailing" else steps + 1
        times = np.round(self.grid(points, self.num_train_timesteps / steps, self.last_timestep()))
        return times if self.timestep_spacing == "trailing" else times[:-1]

    def noise_levels(self, steps: int) -> list[float]:
        table = self.sigmas()
        levels = self.other_levels(steps)
        if levels is None:
            levels = np.interp(times_of(self, steps), np.arange(len(table)), table)
        return [float(level) for level in np.append(levels, self.final_level(levels)).astype(np.float32)]

    def other_levels(self, steps: int) -> F64 | None:
        """Levels that are not those of the timesteps, between the ends of the whole schedule."""
        table = self.sigmas()
        return self.respaced(float(table[-1]), float(table[0]), steps)

    @abstractmethod
    def final_level(self, levels: F64) -> float:
        """The level after the last step, where `levels` are those before each."""

    def rounds_times(self) -> bool:
        """Whether timesteps of other levels are rounded, and not cut."""
        return self.use_karras_sigmas

    def last_timestep(self) -> int:
        """How many of the schedule's timesteps are used."""
        return self.num_train_timesteps
