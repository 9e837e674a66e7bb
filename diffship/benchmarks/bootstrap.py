"""When a comparison may say "better": paired bootstrap intervals, and the numbers of seeds and prompts they need.

Percentile bootstrap (Efron 1979) of the mean of paired differences. Differences of the same prompt under several seeds
are not independent, nor are those of one seed over the prompts, so both axes are resampled (Owen 2007, "pigeonhole").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffship.core.errors import ConfigError

SEEDS = 3
PROMPTS = 500
DRAWS = 2000
LEVEL = 0.95
NO_DIFFERENCE = "no difference shown"
_CHUNK = 64
Array = NDArray[np.float64]
Statistic = Callable[..., Any]  # np.mean or np.median


@dataclass(frozen=True)
class Interval:
    """A mean (of ratios: the median) with its 95 % interval; `seeds` x `units` values went into it."""

    mean: float
    low: float
    high: float
    seeds: int
    units: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(values: ArrayLike, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of `values` (n,) or (seeds, units)."""
    found = interval(values, draws, seed)
    return found.low, found.high


def interval(values: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of `values`, (units,) or (seeds, units), float, with its 95 % interval.

    Raises:
        ConfigError: no values, more than two axes, or a value that is not finite.
    """
    table = np.atleast_2d(np.asarray(values, np.float64))
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ConfigError(f"an interval needs finite values (units,) or (seeds, units); got shape {table.shape}")
    return _interval(table, np.mean, draws, seed)


def paired(ours: ArrayLike, theirs: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Interval of the mean of ours - theirs; both (units,) or (seeds, units), the same unit at the same place.

    Raises:
        ConfigError: the shapes differ.
    """
    a, b = (np.atleast_2d(np.asarray(values, np.float64)) for values in (ours, theirs))
    if a.shape != b.shape:
        raise ConfigError(f"paired values must have one shape; got {a.shape} and {b.shape}")
    return interval(a - b, draws, seed)


def ratio(ours: ArrayLike, theirs: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Median of ours / theirs over paired rounds (n,), or rounds and calls (n, m), with its interval.

    The median, as one call in a hundred that waits for the machine for a second would move a mean by several per cent.

    Raises:
        ConfigError: the shapes differ, or a value is not above zero.
    """
    a, b = (np.asarray(values, np.float64) for values in (ours, theirs))
    a, b = (values[:, None] if values.ndim == 1 else values for values in (a, b))
    if not (a > 0).all() or not (b > 0).all():
        raise ConfigError("a ratio needs values above zero")
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ConfigError(f"paired values must have one shape; got {a.shape} and {b.shape}")
    found = _interval(np.log(a) - np.log(b), np.median, draws, seed)
    middle, low, high = (float(np.exp(value)) for value in (found.mean, found.low, found.high))
    return Interval(middle, low, high, found.seeds, found.units)


def verdict(difference: Interval, better: str, quality: bool = False) -> str:
    """ "better", "worse" or "no difference shown" of ours - theirs, where `better` is "higher" or "lower".

    A claim needs an interval without zero, 3 seeds (for timings: rounds) and, where quality is meant, 500 prompts.
    """
    enough = difference.seeds >= SEEDS and (not quality or difference.units >= PROMPTS)
    if not enough or not difference.excludes_zero:
        return NO_DIFFERENCE
    return "better" if (difference.mean > 0) == (better == "higher") else "worse"


def ratio_verdict(found: Interval) -> str:
    """The same for a ratio of times, ours / theirs: lower is better."""
    mean, low, high = (float(np.log(value)) for value in (found.mean, found.low, found.high))
    return verdict(Interval(mean, low, high, found.seeds, found.units), "lower")


def _interval(table: Array, statistic: Statistic, draws: int, seed: int) -> Interval:
    values = _resampled(table, statistic, draws, np.random.default_rng(seed))
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(statistic(table)), float(low), float(high), *table.shape)


def _resampled(table: Array, statistic: Statistic, draws: int, rng: np.random.Generator) -> Array:
    """(draws,) values of `table` with rows and columns drawn anew; in chunks, so that memory stays small."""
    seeds, units = table.shape
    means = []
    for start in range(0, draws, _CHUNK):
        count = min(_CHUNK, draws - start)
        rows = rng.integers(seeds, size=(count, seeds, 1))
        columns = rng.integers(units, size=(count, 1, units))
        means.append(statistic(table[rows, columns], axis=(1, 2)))
    return np.concatenate(means)
