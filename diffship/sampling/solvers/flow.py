"""Flow matching: Euler's and Heun's method from noise at level 1 to a picture at level 0 (Esser et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.strict import bounded, bounds, choices
from diffship.sampling.matrix import NOISE, Coefficients, as_matrix, seen, unit
from diffship.sampling.process import Flow
from diffship.sampling.sampler import times_of
from diffship.sampling.schedule import F32, F64
from diffship.sampling.sigmas import chosen_grid
from diffship.sampling.solvers.euler import EulerSteps
from diffship.sampling.solvers.heun import HeunSteps
from diffship.sampling.solvers.levels import LevelSampler

_SHIFTS = bounds(-1e3, 1e3)
_LENGTHS = bounds(1, 1 << 24)


@dataclass(frozen=True)
@bounded
class FlowSampler(LevelSampler):
    """The keys of FlowMatchEulerDiscreteScheduler, for both: time, and with it the noise, is shifted towards noise.

    A static `shift` is a factor of noise to signal, s / (1 - s). A dynamic one grows with the picture: `mu`, its
    logarithm, is linear in the number of tokens. `mu` is no key of diffusers' configs (there it is an argument of
    `set_timesteps`); it is filled in when a request is settled, and travels with the trajectory. So is `last_level`,
    for pipelines that hand levels from 1 to `last_level`, evenly spaced, to `set_timesteps` (FLUX); None stands for the
    levels of training.
    """

    num_train_timesteps: int = field(default=1000, metadata=bounds(2, 10_000))
    shift: float = field(default=1.0, metadata=bounds(1e-3, 1e3))
    use_dynamic_shifting: bool = False
    base_shift: float = field(default=0.5, metadata=_SHIFTS)
    max_shift: float = field(default=1.15, metadata=_SHIFTS)
    base_image_seq_len: int = field(default=256, metadata=_LENGTHS)
    max_image_seq_len: int = field(default=4096, metadata=_LENGTHS)
    shift_terminal: float | None = field(default=None, metadata=bounds(0.0, 0.999))
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = field(default="exponential", metadata=choices("exponential", "linear"))
    mu: float | None = field(default=None, metadata=bounds(-50.0, 50.0))
    last_level: float | None = field(default=None, metadata=bounds(1e-6, 1.0))

    process_kind: ClassVar[str] = "flow"
    refused: ClassVar[Mapping[str, bool]] = {"invert_sigmas": False}

    def __post_init__(self) -> None:
        chosen_grid(self)
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ConfigError(f"base_image_seq_len and max_image_seq_len are both {self.max_image_seq_len}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        unset = ("base_shift", "max_shift")  # null there means the default
        return super().from_config({key: v for key, v in config.items() if not (key in unset and v is None)})

    @property
    def process(self) -> Flow:
        return Flow(self.num_train_timesteps)

    def sized(self, tokens: int) -> Self:
        if not self.use_dynamic_shifting:
            return self
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return replace(self, mu=self.base_shift + slope * (tokens - self.base_image_seq_len))

    def calls(self, steps: int) -> int:
        self.check_steps(steps)
        return self.calls_a_step * (steps - 1) + 1

    def begins_at(self, strength: float, steps: int) -> int:
        super().begins_at(strength, steps)
        # pipelines of flow matching round the first step down, those of betas the number of steps that are left
        return int(max(steps - min(steps * strength, steps), 0)) * self.calls_a_step

    def timesteps(self, steps: int) -> F64:
        times = self.process.times(np.array(self.noise_levels(steps)[:-1]))
        return np.concatenate([times[:1], np.repeat(times[1:], self.calls_a_step)])

    def check_times(self, times: F64, steps: int) -> None:
        if not np.isfinite(times).all() or times.min() < 0 or times.max() > self.num_train_timesteps:
            raise ConfigError(
                f"{steps} steps do not stay between noise and picture: check shift, base_shift, max_shift and "
                "shift_terminal of the scheduler"
            )

    def noise_levels(self, steps: int) -> list[float]:
        return [float(level) for level in np.append(self._levels(steps), 0.0).astype(np.float32)]

    def _levels(self, steps: int) -> F64:
        levels = self._shifted(np.linspace(*self._ends(), steps))
        if self.shift_terminal:
            levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - self.shift_terminal))
        grid = chosen_grid(self)
        return levels if grid is None else grid(float(levels[-1]), float(levels[0]), steps)

    def _ends(self) -> tuple[float, float]:
        """The first and last level before the shift. Those of training diffusers shifts, if statically, beforehand."""
        if self.last_level is not None:
            return 1.0, self.last_level
        times: F32 = np.array([self.num_train_timesteps, 1], np.float32)
        ends = times / np.float32(self.num_train_timesteps)
        if not self.use_dynamic_shifting:
            ends = np.float32(self.shift) * ends / (np.float32(1) + np.float32(self.shift - 1) * ends)
        return float(ends[0]), float(ends[1])

    def _shifted(self, levels: F64) -> F64:
        if not self.use_dynamic_shifting:
            return self.shift * levels / (1 + (self.shift - 1) * levels)
        if self.mu is None:
            raise ConfigError("use_dynamic_shifting is on, and the size of the picture is not settled yet")
        factor = math.exp(self.mu) if self.time_shift_type == "exponential" else self.mu
        return factor / (factor + (1 / levels - 1))


@dataclass(frozen=True)
class FlowEuler(FlowSampler, EulerSteps):
    """diffusers' FlowMatchEulerDiscreteScheduler; with `stochastic_sampling` each step draws its noise anew."""

    stochastic_sampling: bool = False

    diffusers_class: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    @property
    def name(self) -> str:
        return "flow-euler"

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        if not self.stochastic_sampling:
            return super().make(step, steps, age)
        s, s_next = self.noise_levels(steps)[step : step + 2]
        x0, _ = self.process.split(s, *seen(age))
        row = self.process.level(s_next).mix(x0, unit(NOISE, age))
        return Coefficients(1.0, float(times_of(self, steps)[step]), as_matrix(row))


@dataclass(frozen=True)
class FlowHeun(FlowSampler, HeunSteps):
    """diffusers' FlowMatchHeunDiscreteScheduler, which has a static shift only; here it takes the dynamic one too."""

    diffusers_class: ClassVar[str] = "FlowMatchHeunDiscreteScheduler"

    @property
    def name(self) -> str:
        return "flow-heun"
