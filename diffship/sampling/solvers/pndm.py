"""PNDM (Liu et al. 2022, arXiv 2202.09778): Adams-Bashforth over epsilon, with or without the Runge-Kutta start.

History: the last epsilons, newest first; then the sample that a started step must return to, and, within a Runge-Kutta
group, the sum of its stages so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.strict import bounded, bounds, choices
from diffship.sampling.matrix import HISTORY, OUTPUT, Coefficients, X, as_matrix, unit
from diffship.sampling.process import cumulative, split_rows
from diffship.sampling.sampler import BetasSampler, times_of
from diffship.sampling.schedule import F64

_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_RUNGE_KUTTA = 12  # calls of the start: three groups of four
_STAGE = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@dataclass(frozen=True)
@bounded
class Pndm(BetasSampler):
    """diffusers' PNDMScheduler: n + 1 calls with `skip_prk_steps` (Stable Diffusion), n + 9 without.

    `first_call` is no key of diffusers' configs. It is the first call of a picture that begins with an image: as in
    diffusers, the second call after it redoes its step, although the list of timesteps has no repeated one there.
    """

    prediction_type: str = field(default="epsilon", metadata=choices("epsilon", "v_prediction"))
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    first_call: int | None = field(default=None, metadata=bounds(0, 1000))

    diffusers_class: ClassVar[str] = "PNDMScheduler"
    refused: ClassVar[Mapping[str, bool]] = {}

    @property
    def name(self) -> str:
        return "pndm"

    def timesteps(self, steps: int) -> F64:
        times = np.round(self.grid(steps, self.num_train_timesteps / steps))
        if self.skip_prk_steps:
            return np.concatenate([times[:1], times[1:2], times[1:]])
        if len(times) < 4:
            raise ConfigError(f"pndm with skip_prk_steps off needs at least 4 steps, got {steps}")
        half = self._ratio(steps) // 2
        start = [time + shift for time in times[:4] for shift in (half, 0)][1:]  # t0, t1 + half, t1, t2 + half, ...
        return np.concatenate([np.repeat(start, 2)[1:-1], times[3:]])

    def begun(self, call: int) -> Self:
        if call and not self.skip_prk_steps:
            raise ConfigError(
                f"pndm with skip_prk_steps off cannot begin at call {call}: its first calls need each other. Give "
                "strength 1, or another sampler, such as ddim"
            )
        return replace(self, first_call=call) if call else self

    def memory(self, step: int, steps: int) -> int:
        if self.skip_prk_steps:
            made = step - (self.first_call or 0)
            return (0, 2)[max(made, 0)] if made < 2 else min(made - 1, 3)
        group, stage = divmod(step, 4)
        return min(3, group + 3 * (stage > 0)) if step >= _RUNGE_KUTTA else group + 3 * (stage > 0)

    def make(self, step: int, steps: int, age: int) -> Coefficients:
        t = int(times_of(self, steps)[step])
        if not self.skip_prk_steps and step < _RUNGE_KUTTA:
            rows = self._runge_kutta(step, steps, t, age)
        elif self.skip_prk_steps and step == 1 + (self.first_call or 0):
            rows = self._second_call(steps, t, age)
        else:
            rows = self._adams(step, steps, t, age)
        return Coefficients(1.0, float(t), as_matrix(*rows))

    def _adams(self, step: int, steps: int, t: int, age: int) -> Sequence[F64]:
        epsilons = [unit(OUTPUT, age), *(unit(HISTORY + i, age) for i in range(age))]
        weights = _ADAMS[len(epsilons) - 1]
        mean = sum((w * e for w, e in zip(weights, epsilons, strict=True)), np.zeros(HISTORY + age))
        x = unit(X, age)
        kept = [epsilons[0], x] if step == (self.first_call or 0) else epsilons[:3]
        return self._transfer(x, mean, t, t - self._ratio(steps)), *kept

    def _second_call(self, steps: int, t: int, age: int) -> Sequence[F64]:
        """Redo the first step with the mean of both ends' epsilons; without history there is nothing to redo."""
        if age < 2:
            return (unit(X, age),)
        first, start = unit(HISTORY, age), unit(HISTORY + 1, age)
        mean = (unit(OUTPUT, age) + first) / 2
        return self._transfer(start, mean, t + self._ratio(steps), t), first

    def _runge_kutta(self, step: int, steps: int, t: int, age: int) -> Sequence[F64]:
        group, stage = divmod(step, 4)
        output = unit(OUTPUT, age)
        if stage == 0:
            epsilons, start = [output, *(unit(HISTORY + i, age) for i in range(min(age, group)))], unit(X, age)
            total = _STAGE[0] * output
        else:
            if age < 3:
                raise ConfigError(f"pndm cannot restart at call {step} without history; restart at call {step - stage}")
            epsilons = [unit(HISTORY + i, age) for i in range(age - 2)]
            start, total = unit(HISTORY + age - 2, age), unit(HISTORY + age - 1, age) + _STAGE[stage] * output
        base = int(times_of(self, steps)[4 * group])
        end = t - (0 if step % 2 else self._ratio(steps) // 2)
        x_next = self._transfer(start, total if stage == 3 else output, base, end)
        return x_next, *epsilons, *(() if stage == 3 else (start, total))

    def _transfer(self, x: F64, output: F64, t: int, t_prev: int) -> F64:
        """Equation 9 of the paper, as diffusers' `_get_prev_sample`."""
        a, a_prev = self._alpha(t), self._alpha(t_prev)
        _, epsilon = split_rows(cumulative(a), self.prediction_type, x, output)
        scale = a * (1 - a_prev) ** 0.5 + (a * (1 - a) * a_prev) ** 0.5
        moved: F64 = (a_prev / a) ** 0.5 * x - (a_prev - a) / scale * epsilon
        return moved

    def _alpha(self, t: int) -> float:
        if t < 0 and self.set_alpha_to_one:
            return 1.0
        alphas = self.alphas_cumprod()
        if t >= len(alphas):
            raise ConfigError(f"pndm reaches timestep {t}, the last one is {len(alphas) - 1}: lower steps_offset")
        return float(alphas[max(t, 0)])

    def _ratio(self, steps: int) -> int:
        return self.num_train_timesteps // steps
