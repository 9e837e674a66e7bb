"""Samplers as makers of small matrices: pure, stateless, exactly diffusers' schedulers.

`coefficients(step, steps, age)` gives what one model call needs and what it leads to: the scale of the model's input,
its timestep, and a matrix of plain floats whose rows are the next latents and the next history entries over the columns
(x, output, noise, *history). History is newest first; `age` is how many entries of it are there, so that a restart
without history falls back to lower order, as diffusers' `lower_order_nums` does.

A sampler has a process (`process.py`), which says what the network's output means; the sampler only steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.limits import LIMITS, check_range
from diffship.core.strict import load as load_fields
from diffship.core.strict import plain
from diffship.sampling.matrix import Coefficients
from diffship.sampling.process import Betas, Process
from diffship.sampling.schedule import F64, Schedule, known, remembered

CONFIG = "scheduler/scheduler_config.json"  # of a model's folder, and of a bundle


@dataclass(frozen=True)
class Sampler(ABC):
    """A scheduler config made executable; the fields are the keys of diffusers' class of the same kind."""

    diffusers_class: ClassVar[str]
    process_kind: ClassVar[str]
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False}  # config key that must be off -> diffusers' default
    promised: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what a name in SAMPLERS says, whatever the config says
    calls_a_step: ClassVar[int] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in SAMPLERS."""

    @property
    @abstractmethod
    def process(self) -> Process:
        """What the model was trained on."""

    @abstractmethod
    def timesteps(self, steps: int) -> F64:
        """The timestep of every model call."""

    @abstractmethod
    def check_times(self, times: F64, steps: int) -> None:
        """Raises ConfigError for timesteps that the model was not trained on."""

    def check_steps(self, steps: int) -> None:
        """Raises ConfigError for a number of steps that there cannot be."""
        check_range("steps", steps, *LIMITS.steps)

    @abstractmethod
    def memory(self, step: int, steps: int) -> int:
        """How many history entries an unbroken run holds before call `step`."""

    @abstractmethod
    def make(self, step: int, steps: int, age: int) -> Coefficients:
        """`coefficients` without the checks and the cache."""

    @abstractmethod
    def noising(self, step: int, steps: int) -> tuple[float, float]:
        """(a, b): before call `step` a picture's latents x0 are a x0 + b noise, as diffusers' `add_noise` has them."""

    @property
    def spacing(self) -> str | None:
        """`timestep_spacing`, or None for a class that has no such key."""
        return None

    @property
    def eta(self) -> float | None:
        """Share of each step's noise that is drawn anew, from 0 to 1, or None for a class that has no such choice."""
        return None

    @property
    def spaced(self) -> bool:
        """Whether the timesteps depend on `timestep_spacing`."""
        return self.spacing is not None

    def calls(self, steps: int) -> int:
        """Number of model calls for `steps` steps."""
        return len(times_of(self, steps))

    def init_noise_sigma(self, steps: int) -> float:
        """Standard deviation of the latents before the first call."""
        return 1.0

    def sized(self, tokens: int) -> Self:
        """The sampler for a picture of `tokens` tokens of the denoiser: the same, unless its levels depend on them."""
        return self

    def begins_at(self, strength: float, steps: int) -> int:
        """Index of the first call if only the share `strength` of the steps is made, as diffusers' `get_timesteps` has
        it.

        Raises:
            ConfigError: no call is left.
        """
        left = min(int(steps * strength), steps)
        if left < 1:
            raise ConfigError(
                f"strength {strength:g} of {steps} steps leaves no step to draw; give more steps, or strength 1"
            )
        return (steps - left) * self.calls_a_step

    def begun(self, call: int) -> Self:
        """The sampler for a picture whose first call is `call`: the same, unless its calls count from there.

        Raises:
            ConfigError: it cannot begin there.
        """
        return self

    def coefficients(self, step: int, steps: int, age: int = 0) -> Coefficients:
        """Coefficients of call `step` (from 0) of `calls(steps)`, with `age` history entries at hand.

        Raises:
            ConfigError: there is no such call or history, or the schedule has no such number of steps.
        """
        return remembered(_coefficients, self, step, steps, age)

    def to_config(self) -> dict[str, Any]:
        """A diffusers scheduler config that `make_sampler` reads back to an equal sampler."""
        said = {key: value for key, value in plain(self).items() if value is not None}
        return {"_class_name": self.diffusers_class, **dict.fromkeys(self.refused, False), **said}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """As diffusers' `from_config`: keys of other classes are ignored, absent ones take this class's defaults.

        Raises:
            ConfigError: a value that diffusers does not allow either.
            UnsupportedError: an option that diffusers has and that is not a matrix, or not built.
        """
        for key, default in cls.refused.items():
            if config.get(key, default):
                absent = "" if key in config else " (diffusers' default where the key is absent)"
                raise UnsupportedError(
                    f"{CONFIG}: {key} is on{absent} and is not supported with "
                    f"{cls.diffusers_class}: choose another sampler, or set {key} to false in the model's "
                    "folder before it is exported"
                )
        return load_fields(cls, known(config, {field.name for field in fields(cls)}), CONFIG)


@dataclass(frozen=True)
class BetasSampler(Schedule, Sampler):
    """A sampler for models that were trained on betas, at whole timesteps unless it says otherwise."""

    process_kind: ClassVar[str] = "betas"

    @property
    def process(self) -> Betas:
        return Betas(self)

    @property
    def spacing(self) -> str | None:
        return self.timestep_spacing

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if steps >= self.num_train_timesteps:
            raise ConfigError(
                f"steps is {steps}; this schedule has {self.num_train_timesteps} timesteps and needs fewer"
            )

    def check_times(self, times: F64, steps: int) -> None:
        if not np.isfinite(times).all() or times.min() < 0 or times.max() > self.num_train_timesteps - 1:
            raise ConfigError(
                f"{steps} steps with steps_offset {self.steps_offset} reach timestep {times.max():g}; "
                f"the last one is {self.num_train_timesteps - 1}: lower steps_offset or change timestep_spacing"
            )

    def noising(self, step: int, steps: int) -> tuple[float, float]:
        level = self.process.at(int(times_of(self, steps)[step]))
        return level.alpha, level.sigma


@lru_cache(maxsize=256, typed=True)
def _timesteps(sampler: Sampler, steps: int) -> F64:
    sampler.check_steps(steps)
    with np.errstate(all="ignore"):
        times = np.asarray(sampler.timesteps(steps), np.float64)
    sampler.check_times(times, steps)
    times.flags.writeable = False
    return times


@lru_cache(maxsize=4096, typed=True)
def _coefficients(sampler: Sampler, step: int, steps: int, age: int) -> Coefficients:
    check_range("step", step, 0, sampler.calls(steps) - 1)
    check_range("age", age, 0, sampler.memory(step, steps))
    try:
        with np.errstate(all="ignore"):
            made = sampler.make(step, steps, age)
        if np.isfinite([entry for row in made.matrix for entry in row]).all():
            return made
    except (ArithmeticError, ValueError, np.linalg.LinAlgError):
        pass
    time = times_of(sampler, steps)[step]
    raise ConfigError(
        f"{sampler.name} cannot step from timestep {time:g} of this schedule with {sampler.process.prediction} "
        "prediction (no signal is left at zero terminal SNR, or two noise levels are equal). Use v_prediction, or "
        "another timestep_spacing or final_sigmas_type"
    )


def times_of(sampler: Sampler, steps: int) -> F64:
    """`sampler.timesteps(steps)`, checked and cached; read-only."""
    return remembered(_timesteps, sampler, steps)
