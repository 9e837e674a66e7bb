"""DPM-Solver++, multistep, first and second order (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.core.strict import bounds, choices
from diffship.sampling.samplers import (
    CONFIG,
    HISTORY,
    OUTPUT,
    Coefficients,
    Sampler,
    X,
    as_matrix,
    denoised,
    times_of,
    unit,
)
from diffship.sampling.schedule import F64, SPACINGS, karras, sigma_to_t

_REFUSED = (
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "variance_type",
)
_SMALL = 15  # below this many steps `lower_order_final` applies


@dataclass(frozen=True)
class DpmPP2M(Sampler):
    """diffusers' DPMSolverMultistepScheduler with algorithm_type dpmsolver++; history is the last x0 prediction."""

    timestep_spacing: str = field(default="linspace", metadata=choices(*SPACINGS))
    solver_order: int = field(default=2, metadata=bounds(1, 3))
    algorithm_type: str = "dpmsolver++"
    solver_type: str = field(default="midpoint", metadata=choices("midpoint", "heun", "logrho", "bh1", "bh2"))
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: str = field(default="zero", metadata=choices("zero", "sigma_min"))
    lambda_min_clipped: float | None = None
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = field(default=None, metadata=bounds(1e-6, 1e6))
    sigma_max: float | None = field(default=None, metadata=bounds(1e-6, 1e6))

    diffusers_class: ClassVar[str] = "DPMSolverMultistepScheduler"
    refused: ClassVar[Mapping[str, bool]] = dict.fromkeys(_REFUSED, False)

    @property
    def name(self) -> str:
        return "dpmpp-2m-karras" if self.use_karras_sigmas else "dpmpp-2m"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        # diffusers passes over other types than the learned ones, which split a model's output
        plain = config.get("variance_type") not in ("learned", "learned_range")
        sampler = super().from_config({**config, "variance_type": False} if plain else config)
        if sampler.algorithm_type not in ("dpmsolver++", "deis"):  # diffusers reads "deis" as dpmsolver++
            raise UnsupportedError(f"{CONFIG}: algorithm_type is {sampler.algorithm_type!r}; only dpmsolver++ is built")
        if sampler.solver_order > 2:
            raise UnsupportedError(f"{CONFIG}: solver_order is {sampler.solver_order}; only 1 and 2 are built")
        return sampler

    def timesteps(self, steps: int) -> F64:
        if self.use_karras_sigmas:
            times = sigma_to_t(self._karras(steps), self.sigmas())
            return np.trunc(times if self.beta_schedule == "squaredcos_cap_v2" else np.round(times))
        points = steps if self.timestep_spacing == "trailing" else steps + 1
        times = np.round(self.grid(points, self.num_train_timesteps / steps, self._last()))
        return times if self.timestep_spacing == "trailing" else times[:-1]

    def memory(self, step: int, steps: int) -> int:
        return min(step, self.solver_order - 1)

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        sigmas = self.noise_levels(steps)
        s, s_next = sigmas[step], sigmas[step + 1]
        x, (alpha, sigma) = unit(X, age), _vp(s)
        x0 = denoised(self.prediction_type, alpha, sigma, x, unit(OUTPUT, age))
        alpha_next, sigma_next = _vp(s_next)
        phi = alpha_next * (s_next / s - 1.0)  # alpha (exp(-h) - 1), for exp(-h) is the ratio of the sigmas
        x_next = sigma_next / sigma * x - phi * x0
        if age and not self._first_order(step, len(sigmas) - 1):
            x_next = x_next + self._second_order(sigmas[step - 1], s, s_next, phi) * (x0 - unit(HISTORY, age))
        history = (x0,) if self.solver_order > 1 else ()
        return Coefficients(1.0, float(times_of(self, steps)[step]), as_matrix(x_next, *history))

    def noising(self, step: int, steps: int) -> tuple[float, float]:
        return _vp(self.noise_levels(steps)[step])

    def noise_levels(self, steps: int) -> list[float]:
        """sigma before each call, and after the last."""
        table = self.sigmas()
        times = times_of(self, steps)
        levels = self._karras(steps) if self.use_karras_sigmas else np.interp(times, np.arange(len(table)), table)
        last = table[0] if self.final_sigmas_type == "sigma_min" else 0.0
        return [float(level) for level in np.append(levels, last).astype(np.float32)]

    def _first_order(self, step: int, calls: int) -> bool:
        small = self.lower_order_final and calls < _SMALL
        return step == calls - 1 and (self.euler_at_final or small or self.final_sigmas_type == "zero")

    def _second_order(self, s_before: float, s: float, s_next: float, phi: float) -> float:
        h, h_before = math.log(s / s_next), math.log(s_before / s)
        if self.solver_type == "heun":
            return h / h_before * (phi / h + _vp(s_next)[0])
        return -0.5 * phi * h / h_before

    def _karras(self, steps: int) -> F64:
        table = self.sigmas()
        low = float(table[0]) if self.sigma_min is None else self.sigma_min
        return karras(low, float(table[-1]) if self.sigma_max is None else self.sigma_max, steps)

    def _last(self) -> int:
        if self.lambda_min_clipped is None:
            return self.num_train_timesteps
        log_snr = -np.log(self.sigmas()[::-1])
        return self.num_train_timesteps - int(np.searchsorted(log_snr, self.lambda_min_clipped))


def _vp(s: float) -> tuple[float, float]:
    """(alpha, sigma) of the variance-preserving process at noise level s = sigma / alpha."""
    alpha = (s * s + 1.0) ** -0.5
    return alpha, s * alpha
