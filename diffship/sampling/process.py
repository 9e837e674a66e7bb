"""The process that a model was trained on, apart from how a sampler walks it back (k-diffusion's external.py).

A noisy sample is x = alpha x0 + sigma noise. A Level holds one such pair and turns a network's output into x0 and
noise, whatever the network predicts; this is the one place for that algebra. A Process gives the Level of a noise
level s, and what the network is told of it.

All of it works on rows of a sampler's matrix, on arrays and on tensors alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from diffship.sampling.schedule import F64, Schedule
from diffship.sampling.sigmas import sigma_to_t

ALPHAS = "alpha_cumprod"  # of `Betas.trained`, an array


@dataclass(frozen=True)
class Level:
    """x = alpha x0 + sigma noise; both are floats, or tensors that broadcast over latents.

    `variance` is that of x if x0 has the deviation `data`: v is defined for x over its root. A process that preserves
    variance says exactly 1, whatever its roundings.
    """

    alpha: Any
    sigma: Any
    variance: Any = 1.0
    data: float = 1.0

    def mix(self, x0: Any, noise: Any) -> Any:
        """The noisy sample."""
        return self.alpha * x0 + self.sigma * noise

    def split(self, prediction: str, x: Any, output: Any) -> tuple[Any, Any]:
        """(x0, noise) that the network's `output` for `x` stands for; `mix` of the two gives `x` again."""
        alpha, sigma, root = self.alpha, self.sigma, self.variance**0.5
        if prediction == "epsilon":
            return (x - sigma * output) / alpha, output
        if prediction == "v_prediction":
            x0 = alpha * self.data**2 / self.variance * x - sigma * self.data / root * output
            return x0, alpha * self.data / root * output + sigma / self.variance * x
        if prediction == "flow":  # alpha + sigma = 1
            return x - sigma * output, x + alpha * output
        return output, (x - alpha * output) / sigma

    def target(self, prediction: str, x0: Any, noise: Any) -> Any:
        """What a network with this prediction is to give: `split` read backwards, for `variance` and `data` of 1."""
        if prediction == "v_prediction":
            return self.alpha * noise - self.sigma * x0
        if prediction == "flow":
            return noise - x0
        return noise if prediction == "epsilon" else x0


class Process(Protocol):
    """One of betas, EDM and flow matching; `kind` is its name. A noise level s is sigma / alpha, or a flow's sigma."""

    @property
    def kind(self) -> str: ...

    @property
    def prediction(self) -> str:
        """One of core.family.PREDICTIONS."""
        ...

    def trained(self) -> dict[str, Any]:
        """What two models must have in common to share a trajectory; keys are words for messages."""
        ...

    def level(self, s: float) -> Level: ...

    def times(self, levels: NDArray[np.floating[Any]]) -> F64:
        """What the network is told of each noise level."""
        ...

    def input_scale(self, s: float) -> float:
        """The factor of x before the network sees it."""
        ...

    def noise_to_signal(self, s: float) -> float:
        """sigma / alpha; its logarithm is minus the paper's lambda (Lu et al. 2022)."""
        ...

    def split(self, s: float, x: F64, output: F64) -> tuple[F64, F64]:
        """(x0, noise) as rows."""
        ...


class Sloped(Process, Protocol):
    """A process whose probability flow is followed in s itself."""

    def slope(self, s: float, x: F64, output: F64) -> F64:
        """dx/ds, as a row."""
        ...


@dataclass(frozen=True)
class Betas:
    """Discrete betas in the coordinates that preserve variance: alpha^2 + sigma^2 = 1."""

    schedule: Schedule

    kind: ClassVar[str] = "betas"

    @property
    def prediction(self) -> str:
        return self.schedule.prediction_type

    def trained(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "prediction type": schedule.prediction_type,
            "number of training timesteps": schedule.num_train_timesteps,
            ALPHAS: schedule.alphas_cumprod(),
        }

    def at(self, timestep: int) -> Level:
        """The level of a timestep of training."""
        return cumulative(float(self.schedule.alphas_cumprod()[timestep]))

    def level(self, s: float) -> Level:
        alpha = (s * s + 1.0) ** -0.5
        return Level(alpha, s * alpha)

    def times(self, levels: NDArray[np.floating[Any]]) -> F64:
        return sigma_to_t(levels, self.schedule.sigmas())

    def input_scale(self, s: float) -> float:
        return 1.0

    def noise_to_signal(self, s: float) -> float:
        return s

    def split(self, s: float, x: F64, output: F64) -> tuple[F64, F64]:
        return split_rows(self.level(s), self.prediction, x, output)


@dataclass(frozen=True)
class Exploding(Betas):
    """Discrete betas in the coordinates of Karras et al. (2022), where x0 is not scaled: x = x0 + s noise."""

    def level(self, s: float) -> Level:
        return Level(1.0, s, s * s + 1.0)

    def input_scale(self, s: float) -> float:
        return float((s * s + 1.0) ** -0.5)

    def slope(self, s: float, x: F64, output: F64) -> F64:
        return self.split(s, x, output)[1]


@dataclass(frozen=True)
class Edm:
    """Karras et al. (2022), table 1: x = x0 + s noise; the network is preconditioned by `data`, the deviation of x0.

    diffusers' "epsilon" is the paper's F, which is -v; neither is the noise.
    """

    data: float
    prediction: str

    kind: ClassVar[str] = "edm"

    def trained(self) -> dict[str, Any]:
        return {"prediction type": self.prediction, "sigma_data": self.data}

    def level(self, s: float) -> Level:
        return Level(1.0, s, s * s + self.data**2, self.data)

    def times(self, levels: NDArray[np.floating[Any]]) -> F64:
        return (np.float32(0.25) * np.log(levels.astype(np.float32))).astype(np.float64)

    def input_scale(self, s: float) -> float:
        return float((s * s + self.data**2) ** -0.5)

    def noise_to_signal(self, s: float) -> float:
        return s

    def split(self, s: float, x: F64, output: F64) -> tuple[F64, F64]:
        v = output if self.prediction == "v_prediction" else -output
        x0 = split_rows(self.level(s), "v_prediction", x, v)[0]
        return x0, (x - x0) / s

    def slope(self, s: float, x: F64, output: F64) -> F64:
        return self.split(s, x, output)[1]


@dataclass(frozen=True)
class Flow:
    """Flow matching (Lipman et al. 2023): x = (1 - s) x0 + s noise, and the network gives noise - x0."""

    num_train_timesteps: int

    kind: ClassVar[str] = "flow"
    prediction: ClassVar[str] = "flow"

    def trained(self) -> dict[str, Any]:
        return {"prediction type": self.prediction, "number of training timesteps": self.num_train_timesteps}

    def level(self, s: float) -> Level:
        return Level(1.0 - s, s)

    def times(self, levels: NDArray[np.floating[Any]]) -> F64:
        return (levels.astype(np.float32) * np.float32(self.num_train_timesteps)).astype(np.float64)

    def input_scale(self, s: float) -> float:
        return 1.0

    def noise_to_signal(self, s: float) -> float:
        return s / (1.0 - s) if s < 1.0 else math.inf

    def split(self, s: float, x: F64, output: F64) -> tuple[F64, F64]:
        return split_rows(self.level(s), self.prediction, x, output)

    def slope(self, s: float, x: F64, output: F64) -> F64:
        x0, noise = self.split(s, x, output)
        return noise - x0


def cumulative(alpha_cumprod: Any) -> Level:
    """The level of Ho et al. (2020): sqrt(a) x0 + sqrt(1 - a) noise; `alpha_cumprod` is a number or a tensor."""
    return Level(alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5)


def split_rows(level: Level, prediction: str, x: F64, output: F64) -> tuple[F64, F64]:
    """`level.split` of rows of a matrix; a level without signal or noise gives infinities, which samplers refuse."""
    x0, noise = level.split(prediction, x, output)
    return np.asarray(x0), np.asarray(noise)
