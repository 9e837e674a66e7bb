"""DPM-Solver++, singlestep, with and without noise (Lu et al. 2022, arXiv 2211.01095): groups of one to three calls.

The first call of a group steps by itself; each further one steps anew from where the group began. History: the last
predictions of x0, newest first, then the sample that the group began from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from diffship.core.strict import bounds, choices
from diffship.sampling.matrix import HISTORY, Coefficients, as_matrix, seen, unit
from diffship.sampling.sampler import times_of
from diffship.sampling.schedule import F64
from diffship.sampling.solvers.dpmpp import SDE, SOLVERS, Stride, clipped, require_algorithm, without_plain_variance
from diffship.sampling.solvers.levels import LogSampler


@dataclass(frozen=True)
class DpmPPSingle(LogSampler):
    """diffusers' DPMSolverSinglestepScheduler, which has no `timestep_spacing`: its timesteps are those of linspace."""

    solver_order: int = field(default=2, metadata=bounds(1, 3))
    algorithm_type: str = "dpmsolver++"
    solver_type: str = field(default="midpoint", metadata=choices(*SOLVERS))
    lower_order_final: bool = False
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))
    lambda_min_clipped: float | None = None

    diffusers_class: ClassVar[str] = "DPMSolverSinglestepScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("thresholding", "use_flow_sigmas", "use_dynamic_shifting", "variance_type"), False
    )
    promised: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"dpmpp-{order}s{noise}": {"solver_order": order, "algorithm_type": SDE if noise else "dpmsolver++"}
        for order in (2, 3)
        for noise in ("", "-sde")
    }

    @property
    def name(self) -> str:
        order = "3s" if self.solver_order == 3 else "2s"
        return f"dpmpp-{order}{'-sde' if self.algorithm_type == SDE else ''}"

    @property
    def spacing(self) -> str | None:
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        own = {"timestep_spacing": "linspace", "steps_offset": 0}
        sampler = super().from_config({**without_plain_variance(config), **own})
        require_algorithm(sampler.algorithm_type)
        return sampler

    def memory(self, step: int, steps: int) -> int:
        place = self._orders(steps)[step] - 1
        return place + 1 if place else 0

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        levels = self.noise_levels(steps)
        x, output = seen(age)
        x0, _ = self.process.split(levels[step], x, output)
        known = [x0, *(unit(HISTORY + i, age) for i in range(age - 1))]
        order = min(self._orders(steps)[step], len(known))
        start = x if order == 1 else unit(HISTORY + age - 1, age)
        x_next = self._step(levels[step - order + 1 : step + 2], start, known[:order])
        goes_on = step + 1 < len(levels) - 1 and self._orders(steps)[step + 1] > 1
        rows = as_matrix(x_next, *((*known[:order], start) if goes_on else ()))
        return Coefficients(1.0, float(times_of(self, steps)[step]), rows)

    def final_level(self, levels: F64) -> float:
        return float(self.sigmas()[0]) if self.final_sigmas_type == "sigma_min" else 0.0

    def last_timestep(self) -> int:
        return self.num_train_timesteps - clipped(self.sigmas(), self.lambda_min_clipped)

    def _step(self, levels: Sequence[float], start: F64, x0: Sequence[F64]) -> F64:
        """From the first of `levels` to the last; `x0` are the predictions at the others, the last one first."""
        stride = Stride(self.process, levels[0], levels[-1], self.algorithm_type == SDE)
        x_next = stride.first(start, x0[-1])
        h = [Stride(self.process, levels[0], level, False).h for level in levels[1:-1]]
        if len(x0) == 2:
            x_next = x_next + stride.second(h[0], self.solver_type) * (x0[0] - x0[1])
        elif len(x0) == 3:
            r1, r0 = h[0] / stride.h, h[1] / stride.h
            near, far = (x0[1] - x0[2]) / r1, (x0[0] - x0[2]) / r0
            if self.solver_type != "heun":
                return x_next + stride.slope * far
            change, bend = (r0 * near - r1 * far) / (r0 - r1), 2.0 * (far - near) / (r0 - r1)
            x_next = x_next + stride.slope * change + stride.bend * bend
        return x_next

    def _orders(self, steps: int) -> list[int]:
        """The order of each call: 1, 2, .. within a group; the last calls may be groups of their own."""
        order = self.solver_order
        lower = self.lower_order_final or steps % order != 0 or self.final_sigmas_type == "zero"
        orders = [i % order + 1 for i in range(steps)]
        if lower and order == 3 and steps % 3 == 0:
            orders[-3:] = [1, 2, 1]
        elif lower and order == 2 and steps % 2 == 0:
            orders[-1] = 1
        if self.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders
