"""DPM-Solver++, multistep, to third order, with and without noise (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.core.strict import bounds, choices
from diffship.sampling.matrix import HISTORY, NOISE, Coefficients, as_matrix, seen, unit
from diffship.sampling.process import Process
from diffship.sampling.sampler import CONFIG, times_of
from diffship.sampling.schedule import F64
from diffship.sampling.sigmas import lu
from diffship.sampling.solvers.levels import LevelSampler, LogSampler, log_step

SDE = "sde-dpmsolver++"
ALGORITHMS = ("dpmsolver++", SDE, "deis")  # diffusers reads "deis" as dpmsolver++
SOLVERS = ("midpoint", "heun", "logrho", "bh1", "bh2")  # it reads the last three as midpoint
_SMALL = 15  # below this many steps `lower_order_final` applies


class Stride:
    """A step of a process from noise level s to s_next, which x0 does in closed form but for its change (equation 8).

    h is the step in log(alpha / sigma); with noise x0 is weighted as over a step of 2 h (equation 14).
    """

    def __init__(self, process: Process, s: float, s_next: float, noisy: bool) -> None:
        here, there = process.level(s), process.level(s_next)
        self.before, self.after = process.noise_to_signal(s), process.noise_to_signal(s_next)
        self.ratio = self.after / self.before  # exp(-h)
        self.noisy = noisy
        self.alpha: float = there.alpha
        self.phi: float = there.alpha * ((self.ratio**2 if noisy else self.ratio) - 1.0)
        self.kept: float = there.sigma / here.sigma * (self.ratio if noisy else 1.0)
        self.fresh: float = there.sigma * (1.0 - self.ratio**2) ** 0.5 if noisy else 0.0

    @property
    def h(self) -> float:
        return log_step(self.before, self.after)

    @property
    def doubled(self) -> float:
        """The step over which x0 is weighted."""
        return 2.0 * self.h if self.noisy else self.h

    def first(self, x: F64, x0: F64) -> F64:
        """The next x if x0 stays as it is."""
        row: F64 = self.kept * x - self.phi * x0
        return row + self.fresh * unit(NOISE, len(x) - HISTORY) if self.noisy else row

    def second(self, h_before: float, solver_type: str) -> float:
        """The weight of x0's change over a step of `h_before`."""
        if solver_type == "heun":
            return self.h / h_before * self.slope
        return -0.5 * self.phi * self.h / h_before

    @property
    def slope(self) -> float:
        """The weight of x0's first derivative over the step."""
        return self.phi / self.doubled + self.alpha

    @property
    def bend(self) -> float:
        """The weight of x0's second derivative. With noise diffusers adds the half that the paper takes off."""
        half = -0.5 if self.noisy else 0.5
        return half * self.alpha - (self.phi + self.alpha * self.doubled) / self.doubled**2


@dataclass(frozen=True)
class DpmSteps(LevelSampler):
    """The multistep solver over the levels of any process; history is the last one or two predictions of x0."""

    solver_order: int = field(default=2, metadata=bounds(1, 3))
    algorithm_type: str = "dpmsolver++"
    solver_type: str = field(default="midpoint", metadata=choices(*SOLVERS))
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        sampler = super().from_config(without_plain_variance(config))
        require_algorithm(sampler.algorithm_type)
        return sampler

    def memory(self, step: int, steps: int) -> int:
        return min(step, self.solver_order - 1)

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        levels = self.noise_levels(steps)
        stride = Stride(self.process, levels[step], levels[step + 1], self.algorithm_type == SDE)
        x, output = seen(age)
        x0, _ = self.process.split(levels[step], x, output)
        known = [x0, *(unit(HISTORY + i, age) for i in range(age))]
        x_next, order = stride.first(x, x0), min(self._order(step, len(levels) - 1), len(known))
        h = [self._log_step(levels, step - i) for i in range(1, order)]
        if order == 2:
            x_next = x_next + stride.second(h[0], self.solver_type) * (known[0] - known[1])
        elif order == 3:
            x_next = x_next + _third(stride, h, known)
        time = float(times_of(self, steps)[step])
        history = known[: self.solver_order - 1]
        return Coefficients(self.process.input_scale(levels[step]), time, as_matrix(x_next, *history))

    def _log_step(self, levels: Sequence[float], step: int) -> float:
        return log_step(*map(self.process.noise_to_signal, levels[step : step + 2]))

    def _order(self, step: int, calls: int) -> int:
        small = self.lower_order_final and calls < _SMALL
        if step == calls - 1 and (self.euler_at_final or small or self.final_sigmas_type == "zero"):
            return 1
        return 2 if step == calls - 2 and small else self.solver_order


def _third(stride: Stride, h: Sequence[float], x0: Sequence[F64]) -> F64:
    """What the last three predictions add to the first order, the last first; `h` are the two steps before."""
    r = [before / stride.h for before in h]
    change, earlier = (x0[0] - x0[1]) / r[0], (x0[1] - x0[2]) / r[1]
    bend = (change - earlier) / (r[0] + r[1])
    added: F64 = stride.slope * (change + r[0] * bend) + stride.bend * bend
    return added


@dataclass(frozen=True)
class DpmPP(LogSampler, DpmSteps):
    """diffusers' DPMSolverMultistepScheduler with algorithm_type dpmsolver++ or sde-dpmsolver++."""

    use_lu_lambdas: bool = False
    lambda_min_clipped: float | None = None
    rescale_betas_zero_snr: bool = False

    diffusers_class: ClassVar[str] = "DPMSolverMultistepScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("thresholding", "use_flow_sigmas", "use_dynamic_shifting", "variance_type"), False
    )
    promised: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"dpmpp-{order}m{noise}{grid}": {
            "solver_order": order,
            "algorithm_type": SDE if noise else "dpmsolver++",
            "use_karras_sigmas": bool(grid),
        }
        for order in (2, 3)
        for noise in ("", "-sde")
        for grid in ("", "-karras")
    }

    @property
    def name(self) -> str:
        order = "3m" if self.solver_order == 3 else "2m"
        noise = "-sde" if self.algorithm_type == SDE else ""
        return f"dpmpp-{order}{noise}{'-karras' if self.use_karras_sigmas else ''}"

    def other_levels(self, steps: int) -> F64 | None:
        if not self.use_lu_lambdas or self.use_karras_sigmas:  # diffusers reads Karras's key first
            return super().other_levels(steps)
        table = self.sigmas()
        return lu(float(table[0]), float(table[-1]), steps)

    def final_level(self, levels: F64) -> float:
        return float(self.sigmas()[0]) if self.final_sigmas_type == "sigma_min" else 0.0

    def rounds_times(self) -> bool:
        return (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2"

    def last_timestep(self) -> int:
        return self.num_train_timesteps - clipped(self.sigmas(), self.lambda_min_clipped)


def clipped(table: Any, lambda_min: float | None) -> int:
    """How many timesteps are noisier than `lambda_min` = log(alpha / sigma)."""
    return 0 if lambda_min is None else int(np.searchsorted(-np.log(table[::-1]), lambda_min))


def without_plain_variance(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """diffusers passes over other types than the learned ones, which split a model's output."""
    plain = config.get("variance_type") not in ("learned", "learned_range")
    return {**config, "variance_type": False} if plain else config


def require_algorithm(name: str) -> None:
    """Raises UnsupportedError for an algorithm that predicts noise, and not x0."""
    if name not in ALGORITHMS:
        raise UnsupportedError(f"{CONFIG}: algorithm_type is {name!r}; only dpmsolver++ and {SDE} are built")
