"""UniPC, a predictor and a corrector that share one model call (Zhao et al. 2023, arXiv 2302.04867, B(h) version).

History: the last predictions (of x0, or of the noise), newest first, then the sample that the last step began from. A
call first corrects that step with the new output, then predicts the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.strict import bounds, choices
from diffship.sampling.matrix import HISTORY, Coefficients, as_matrix, seen, unit
from diffship.sampling.sampler import times_of
from diffship.sampling.schedule import F64
from diffship.sampling.sigmas import chosen_grid
from diffship.sampling.solvers.levels import LogSampler, log_step


@dataclass(frozen=True)
class UniPc(LogSampler):
    """diffusers' UniPCMultistepScheduler; it reads other solver types as bh2."""

    solver_order: int = field(default=2, metadata=bounds(1, 3))
    solver_type: str = field(default="bh2", metadata=choices("bh1", "bh2", "midpoint", "heun", "logrho"))
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))
    rescale_betas_zero_snr: bool = False

    diffusers_class: ClassVar[str] = "UniPCMultistepScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("thresholding", "solver_p", "use_flow_sigmas", "use_dynamic_shifting"), False
    )

    @property
    def name(self) -> str:
        return "unipc"

    def memory(self, step: int, steps: int) -> int:
        return min(step, self.solver_order) + 1 if step else 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        levels = self.noise_levels(steps)
        x, output = seen(age)
        new = self.process.split(levels[step], x, output)[0 if self.predict_x0 else 1]
        known = [unit(HISTORY + i, age) for i in range(age - 1)]
        if known and step - 1 not in self.disable_corrector:
            order = min(self._order(step - 1, steps), len(known))
            x = self._step(levels, step - 1, unit(HISTORY + age - 1, age), known[:order], new)
        known = [new, *known]
        order = min(self._order(step, steps), len(known))
        x_next = self._step(levels, step, x, known[:order])
        rows = as_matrix(x_next, *known[: self.solver_order], x)
        return Coefficients(1.0, float(times_of(self, steps)[step]), rows)

    def final_level(self, levels: F64) -> float:
        if self.final_sigmas_type == "zero":
            return 0.0
        return float(levels[-1] if chosen_grid(self) else self.sigmas()[0])

    def _order(self, step: int, steps: int) -> int:
        left = self.calls(steps) - step
        return min(self.solver_order, left) if self.lower_order_final else self.solver_order

    def _step(self, levels: Sequence[float], step: int, x: F64, known: Sequence[F64], new: F64 | None = None) -> F64:
        """From level `step` to the next: UniP with predictions `known`, newest first; UniC with `new`, made there."""
        if levels[step + 1] == levels[step]:
            return x
        here, there = (self.process.level(level) for level in levels[step : step + 2])
        kept, scale = there.alpha / here.alpha, there.sigma
        if self.predict_x0:
            kept, scale = there.sigma / here.sigma, there.alpha
        h = -log_step(*levels[step : step + 2]) if self.predict_x0 else log_step(*levels[step : step + 2])
        if math.isinf(h) and (len(known) > 1 or not self.predict_x0 or self.solver_type == "bh1"):
            raise ConfigError(
                "unipc cannot end at noise level 0 here: set final_sigmas_type to sigma_min, or lower_order_final and "
                "predict_x0 to true and solver_type to bh2"
            )
        row: F64 = kept * x - scale * math.expm1(h) * known[0]
        changes = self._changes(levels, step, known) + ([] if new is None else [(1.0, new - known[0])])
        weights = _weights([place for place, _ in changes], h, self.solver_type)
        for weight, (_, change) in zip(weights, changes, strict=True):
            row = row - scale * weight * change
        return row

    def _changes(self, levels: Sequence[float], step: int, known: Sequence[F64]) -> list[tuple[float, F64]]:
        """(place, slope towards it) of each prediction before the newest; places in units of the step."""
        h = log_step(*levels[step : step + 2])
        places = [log_step(levels[step], levels[step - i]) / h for i in range(1, len(known))]
        return [(place, (old - known[0]) / place) for place, old in zip(places, known[1:], strict=True)]


def _weights(places: Sequence[float], h: float, solver_type: str) -> list[float]:
    """B(h) times the solution of equation 12 for differences at `places`; a single one has B(h) / 2."""
    if len(places) < 2:
        return [0.5 * (h if solver_type == "bh1" else math.expm1(h)) for _ in places]
    phi = math.expm1(h) / h - 1.0
    wanted, factorial = [], 1.0
    for k in range(1, len(places) + 1):
        wanted.append(phi * factorial)
        factorial *= k + 1
        phi = phi / h - 1.0 / factorial
    powers = np.vander(np.array(places), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(wanted))]
