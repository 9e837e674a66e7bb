"""Samplers as makers of small matrices: pure, stateless, exactly diffusers' schedulers.

`coefficients(step, steps, age)` gives what one model call needs and what it leads to: the scale of the model's input,
its timestep, and a matrix of plain floats whose rows are the next latents and the next history entries over the columns
(x, output, noise, *history). History is newest first; `age` is how many entries of it are there, so that a restart
without history falls back to lower order, as diffusers' `lower_order_nums` does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.limits import LIMITS, check_range
from diffship.core.registry import load as load_class
from diffship.core.strict import load as load_fields
from diffship.core.strict import plain
from diffship.sampling.schedule import F64, Schedule, known, remembered

CONFIG = "scheduler/scheduler_config.json"  # of a model's folder, and of a bundle
X, OUTPUT, NOISE, HISTORY = 0, 1, 2, 3  # columns of the matrix
MAX_HISTORY = 5


@dataclass(frozen=True)
class Coefficients:
    """One model call: `input_scale * x` at `timestep`, then `matrix` times (x, output, noise, *history)."""

    input_scale: float
    timestep: float
    matrix: tuple[tuple[float, ...], ...]

    @property
    def noisy(self) -> bool:
        """Whether fresh noise is needed."""
        return any(row[NOISE] != 0.0 for row in self.matrix)


@dataclass(frozen=True)
class Sampler(Schedule):
    """A scheduler config made executable; the fields are the keys of diffusers' class of the same kind."""

    diffusers_class: ClassVar[str]
    refused: ClassVar[Mapping[str, bool]] = {"thresholding": False}  # config key that must be off -> diffusers' default

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in SAMPLERS."""

    @abstractmethod
    def timesteps(self, steps: int) -> F64:
        """The timestep of every model call."""

    @abstractmethod
    def memory(self, step: int, steps: int) -> int:
        """How many history entries an unbroken run holds before call `step`."""

    @abstractmethod
    def make(self, step: int, steps: int, age: int) -> Coefficients:
        """`coefficients` without the checks and the cache."""

    def calls(self, steps: int) -> int:
        """Number of model calls for `steps` steps."""
        return len(times_of(self, steps))

    def init_noise_sigma(self, steps: int) -> float:
        """Standard deviation of the latents before the first call."""
        return 1.0

    def noising(self, step: int, steps: int) -> tuple[float, float]:
        """(a, b): before call `step` a picture's latents x0 are a x0 + b noise, as diffusers' `add_noise` has them."""
        alpha = float(self.alphas_cumprod()[int(_timesteps(self, steps)[step])])
        return alpha**0.5, (1 - alpha) ** 0.5

    def begins_at(self, strength: float, steps: int) -> int:
        """The first call where only `strength` of the noise is drawn, as diffusers' `get_timesteps` counts it.

        Raises:
            ConfigError: no call is left.
        """
        left = min(int(steps * strength), steps)
        if left < 1:
            raise ConfigError(
                f"strength {strength:g} of {steps} steps leaves no step to draw; give more steps, or strength 1"
            )
        return steps - left

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


@lru_cache(maxsize=256, typed=True)
def _timesteps(sampler: Sampler, steps: int) -> F64:
    check_range("steps", steps, *LIMITS.steps)
    if steps >= sampler.num_train_timesteps:
        raise ConfigError(
            f"steps is {steps}; this schedule has {sampler.num_train_timesteps} timesteps and needs fewer"
        )
    with np.errstate(all="ignore"):
        times = np.asarray(sampler.timesteps(steps), np.float64)
    if not np.isfinite(times).all() or times.min() < 0 or times.max() > sampler.num_train_timesteps - 1:
        raise ConfigError(
            f"{steps} steps with steps_offset {sampler.steps_offset} reach timestep {times.max():g}; "
            f"the last one is {sampler.num_train_timesteps - 1}: lower steps_offset or change timestep_spacing"
        )
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
    except (ArithmeticError, ValueError):
        pass
    time = times_of(sampler, steps)[step]
    raise ConfigError(
        f"{sampler.name} cannot step from timestep {time:g} of this schedule with {sampler.prediction_type} prediction "
        "(no signal is left at zero terminal SNR). Use v_prediction or another timestep_spacing"
    )


def times_of(sampler: Sampler, steps: int) -> F64:
    """`sampler.timesteps(steps)`, checked and cached; read-only."""
    return remembered(_timesteps, sampler, steps)


def unit(column: int, age: int) -> F64:
    """The row that copies one column."""
    row = np.zeros(HISTORY + age)
    row[column] = 1.0
    return row


def denoised(prediction: str, alpha: float, sigma: float, x: F64, output: F64) -> F64:
    """x0 as a row, for x = alpha x0 + sigma eps."""
    if prediction == "epsilon":
        return (x - sigma * output) / np.float64(alpha)
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return output


def as_matrix(*rows: F64) -> tuple[tuple[float, ...], ...]:
    """Rows as plain floats."""
    return tuple(tuple(row.tolist()) for row in rows)


SAMPLERS: dict[str, str] = {
    "ddim": "diffship.sampling.ddim:Ddim",
    "dpmpp-2m": "diffship.sampling.dpmpp:DpmPP2M",
    "dpmpp-2m-karras": "diffship.sampling.dpmpp:DpmPP2M",
    "euler": "diffship.sampling.euler:Euler",
    "euler-a": "diffship.sampling.euler:EulerAncestral",
    "lcm": "diffship.sampling.lcm:Lcm",
    "pndm": "diffship.sampling.pndm:Pndm",
}
_BY_CLASS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
}
# Every class of diffusers whose noise is that of betas: their configs can be taken over by each other.
WITH_BETAS = (
    *_BY_CLASS,
    *("DDPMScheduler", "DEISMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
    *("DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverMultistepInverseScheduler"),
)
_OTHER_NOISE = ("sigma_data", "use_flow_sigmas", "use_dynamic_shifting")  # EDM and flow matching, where they are set
_PROMISED = {  # what a name says, whatever the config says
    "dpmpp-2m": {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    "dpmpp-2m-karras": {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
}


def make_sampler(config: Mapping[str, Any], name: str | None = None) -> Sampler:
    """The sampler of a diffusers scheduler config, or the one called `name` over the same config.

    With a name this is diffusers' `Scheduler.from_config(pipe.scheduler.config)`.

    Raises:
        ConfigError: unknown name or class, or a value that diffusers refuses too.
        UnsupportedError: an option that is not supported, named, or a model whose noise is not that of betas.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the scheduler config is a {type(config).__name__}; it must be a table")
    require_betas(config)
    if name is None:
        return _load(_name_of(config)).from_config(config)
    return _load(name).from_config({**config, **_PROMISED.get(name, {})})


def require_betas(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError, naming the key, for a model that was not trained on the noise of betas (EDM, flow)."""
    named = str(config.get("_class_name", ""))
    odd = [key for key in _OTHER_NOISE if config.get(key)]
    flow = str(config.get("prediction_type", "")).startswith("flow")
    if (named in WITH_BETAS or not named) and not odd and not flow:
        return
    key = odd[0] if odd else "prediction_type" if flow else "_class_name"
    raise UnsupportedError(
        f"{CONFIG}: {key} is {str(config.get(key))[:80]!r}, so the noise that the model was "
        f"trained on is not that of betas, which all samplers here draw with: {', '.join(SAMPLERS)}"
    )


def noise_schedule(config: Mapping[str, Any]) -> Schedule:
    """The betas and timesteps that a model was trained with, whatever its scheduler draws with.

    Raises:
        ConfigError: a value that diffusers refuses too.
        UnsupportedError: a scheduler without betas, such as one of flow matching.
    """
    require_betas(config)
    name, names = str(config.get("_class_name", "")), {field.name for field in fields(_Trained)} - _DRAWING
    if name not in _BY_CLASS and not ({"beta_start", "trained_betas"} & config.keys()):
        raise UnsupportedError(f"the scheduler {name!r} says nothing of betas; models of diffusion have them")
    kind = _load(_BY_CLASS[name]) if name in _BY_CLASS else _Trained
    own = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    return load_fields(_Trained, {**known(own, names), **known(config, names)}, "scheduler config")


@dataclass(frozen=True)
class _Trained(Schedule):
    rescale_betas_zero_snr: bool = False


_DRAWING = {"timestep_spacing", "steps_offset"}


def _load(name: str) -> type[Sampler]:
    kind: type[Sampler] = load_class(SAMPLERS, name, "sampler")
    return kind


def _name_of(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    if name not in _BY_CLASS:
        raise ConfigError(
            f"{CONFIG}: _class_name is {name!r}, a scheduler that is not built; name a sampler: {', '.join(SAMPLERS)}"
        )
    return _BY_CLASS[name]
