"""Grids of noise levels that replace the even steps of a schedule, and the timesteps that belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.sampling.schedule import F32, F64

Grid = Callable[[float, float, int], F64]  # (lowest, highest, points): sigmas from highest to lowest
_BETA = 0.6  # both parameters of Lee et al.'s distribution
_MASS = math.gamma(_BETA) ** 2 / math.gamma(2 * _BETA)  # the integral of t^(a-1) (1-t)^(a-1)


def karras(low: float, high: float, points: int, rho: float = 7.0) -> F64:
    """Karras et al. 2022, equation 5."""
    ramp = np.linspace(0, 1, points)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def exponential(low: float, high: float, points: int) -> F64:
    """Even in log(sigma)."""
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), points)))


def beta(low: float, high: float, points: int) -> F64:
    """Quantiles of the beta distribution (Lee et al. 2024, "Beta sampling is all you need")."""
    return np.array([low + beta_quantile(share) * (high - low) for share in 1 - np.linspace(0, 1, points)])


def lu(low: float, high: float, points: int) -> F64:
    """Even in log(sigma), as `exponential`, but through the logarithm of the float32 table (Lu et al. 2022)."""
    first, last = float(np.log(np.float32(high))), float(np.log(np.float32(low)))
    return np.asarray(np.exp(first + np.linspace(0, 1, points) * (last - first)))


GRIDS: Mapping[str, Grid] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}


def chosen_grid(sampler: object) -> Grid | None:
    """The grid whose key is on among the fields of `sampler`, if any.

    Raises:
        ConfigError: several are on; diffusers refuses that too.
    """
    on = [key for key in GRIDS if getattr(sampler, key)]
    if len(on) > 1:
        raise ConfigError(f"{' and '.join(on)} are on; only one of them may be")
    return GRIDS[on[0]] if on else None


def beta_quantile(share: float) -> float:
    """The x below which `share` of the symmetric beta distribution lies, by Newton's method."""
    if share > 0.5:
        return 1.0 - beta_quantile(1.0 - share)
    x: float = (share * _BETA * _MASS) ** (1 / _BETA)  # exact for small x
    for _ in range(60 if x else 0):
        density = (x * (1 - x)) ** (_BETA - 1) / _MASS
        step = (_beta_share(x) - share) / density
        x = min(max(x - step, x / 4), 0.5)
        if abs(step) <= 1e-15 * x:
            break
    return x


def _beta_share(x: float) -> float:
    """The regularised incomplete beta function for x up to 0.5, where its series halves at least with every term."""
    term = total = 1.0
    for n in range(80):
        term *= x * (2 * _BETA + n) / (_BETA + 1 + n)
        total += term
    return float((x * (1 - x)) ** _BETA / (_BETA * _MASS) * total)


def sigma_to_t(sigmas: NDArray[np.floating[Any]], table: F32) -> F64:
    """Fractional timesteps at which the schedule's `table` of sigmas has these values, by log interpolation."""
    logs = np.log(table)
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip((log_sigma[None, :] - logs[:, None] >= 0).cumsum(0).argmax(0), 0, len(logs) - 2)
    weight = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))
