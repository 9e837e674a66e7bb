"""DEIS in log(rho), multistep up to third order (Zhang and Chen 2023, arXiv 2204.13902); history: the last noises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffship.core.strict import bounds, choices
from diffship.sampling.matrix import HISTORY, Coefficients, as_matrix, seen, unit
from diffship.sampling.sampler import times_of
from diffship.sampling.schedule import F64
from diffship.sampling.sigmas import chosen_grid
from diffship.sampling.solvers.levels import LogSampler

_SMALL = 15  # below this many steps `lower_order_final` applies


@dataclass(frozen=True)
class Deis(LogSampler):
    """diffusers' DEISMultistepScheduler; whatever solver and algorithm the config names, it is deis in log(rho)."""

    solver_order: int = field(default=2, metadata=bounds(1, 3))
    algorithm_type: str = field(default="deis", metadata=choices("deis", "dpmsolver", "dpmsolver++"))
    solver_type: str = field(default="logrho", metadata=choices("logrho", "midpoint", "heun", "bh1", "bh2"))
    lower_order_final: bool = True

    diffusers_class: ClassVar[str] = "DEISMultistepScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("thresholding", "use_flow_sigmas", "use_dynamic_shifting"), False
    )

    @property
    def name(self) -> str:
        return "deis"

    def memory(self, step: int, steps: int) -> int:
        return min(step, self.solver_order - 1)

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        levels = self.noise_levels(steps)
        here, there = (self.process.level(level) for level in levels[step : step + 2])
        x, output = seen(age)
        _, new = self.process.split(levels[step], x, output)
        noises = [new, *(unit(HISTORY + i, age) for i in range(age))]
        order = min(self._order(step, len(levels) - 1), len(noises))
        weights = _weights([levels[step - i] for i in range(order)], levels[step + 1])
        moved = sum((w * noise for w, noise in zip(weights, noises, strict=False)), x / here.alpha)
        x_next = np.asarray(there.alpha * moved)
        rows = as_matrix(x_next, *noises[: self.solver_order - 1])
        return Coefficients(1.0, float(times_of(self, steps)[step]), rows)

    def final_level(self, levels: F64) -> float:
        return float(levels[-1] if chosen_grid(self) else self.sigmas()[0])

    def _order(self, step: int, calls: int) -> int:
        left = calls - step
        return min(self.solver_order, left) if self.lower_order_final and calls < _SMALL else self.solver_order


def _weights(rho: Sequence[float], rho_next: float) -> list[float]:
    """The integral from rho[0] to `rho_next` of each of the Lagrange polynomials over log(rho) at the points `rho`."""
    logs = [math.log(r) for r in rho]
    return [_integral(_lagrange(logs, i), rho_next) - _integral(_lagrange(logs, i), rho[0]) for i in range(len(rho))]


def _lagrange(points: Sequence[float], i: int) -> list[float]:
    """Coefficients of the polynomial that is 1 at points[i] and 0 at the others, constant first."""
    others = [point for j, point in enumerate(points) if j != i]
    scale = math.prod(points[i] - other for other in others)
    return [float(c) / scale for c in np.polynomial.polynomial.polyfromroots(others)] if others else [1.0]


def _integral(polynomial: Sequence[float], rho: float) -> float:
    """An antiderivative at `rho` of sum c_k log(rho)^k: the integral I_k is rho log(rho)^k - k I_(k-1)."""
    total, moment = 0.0, 0.0
    for k, coefficient in enumerate(polynomial):
        moment = rho * math.log(rho) ** k - k * moment
        total += coefficient * moment
    return total
