"""How sure a figure is: Student-t intervals, what they allow to be said, and which percentiles a sample supports.

The unit of replication is what was repeated independently: a round of a timing (new processes), a prompt of a quality
figure, a training seed where models were trained several times. Calls of one round share its drift and pictures of one
prompt share its difficulty, so those are summed up first and never counted as repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffship.core.errors import ConfigError

ROUNDS = 3  # and training seeds: with two, nothing hints at how they scatter
PROMPTS = 500
LEVEL = 0.95
NO_DIFFERENCE = "no difference shown"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. `n` independent repetitions made it; with one there is no interval (None).

    `how` says in words what was repeated; it stands in the row's conditions.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    how: str


def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| < t) = `level` for Student's T with `df` degrees of freedom, to about 12 digits.

    Raises:
        ConfigError: `level` is not between 0 and 1, or `df` is below 1.
    """
    if not 0 < level < 1 or df < 1:
        raise ConfigError(f"a t quantile needs a level between 0 and 1 and df from 1 on; got {level}, {df}")
    return _t_quantile(level, df)


@cache
def _t_quantile(level: float, df: int) -> float:
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < level else (low, middle)
    return math.tan(low) * math.sqrt(df)


def _within(theta: float, df: int) -> float:
    """P(|T| < tan(theta) sqrt(df)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(df // 2):
        total += term
        term *= cosine * cosine * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_interval(values: ArrayLike) -> tuple[Array, Array]:
    """Means over the last axis, and half the width of their 95 % intervals; infinite for one value."""
    table = np.asarray(values, np.float64)
    count, mean = table.shape[-1], table.mean(axis=-1)
    if count < 2:
        return mean, np.full_like(mean, math.inf)
    return mean, t_quantile(LEVEL, count - 1) * table.std(axis=-1, ddof=1) / math.sqrt(count)


def ratio(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> Interval:
    """Ours / theirs: the median of each round's paired values, then the geometric mean over the rounds.

    One entry a round: its paired values (neighbouring calls), or one number. The median, because one call in a hundred
    that waits for the machine would move a mean by several per cent. The interval is Student's on the logarithms.

    Raises:
        ConfigError: no rounds, pairs that do not match, or a value that is not finite and above zero.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ConfigError(f"a ratio needs the same rounds on both sides; got {len(ours)} and {len(theirs)}")
    logs = np.array([_round_log(a, b) for a, b in zip(ours, theirs, strict=True)])
    mean, half = (float(value) for value in t_interval(logs))
    how = f"Student t over {len(logs)} rounds"
    low, high = (None, None) if len(logs) < 2 else (math.exp(mean - half), math.exp(mean + half))
    return Interval(math.exp(mean), low, high, len(logs), how)


def _round_log(ours: ArrayLike, theirs: ArrayLike) -> float:
    a, b = (np.atleast_1d(np.asarray(values, np.float64)) for values in (ours, theirs))
    if a.shape != b.shape or not a.size:
        raise ConfigError(f"paired values must have one shape; got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise ConfigError("a ratio needs finite values above zero")
    return float(np.median(np.log(a) - np.log(b)))


def quality(values: ArrayLike, prompts: Sequence[str], trained: bool) -> Interval:
    """The mean of `values` (seeds, prompts) with its interval; equal texts among `prompts` are one prompt.

    `trained` False: seeds are those of sampling, under which the same model drew each prompt again. They are averaged
    in each prompt, and prompts are the repetitions. `trained` True: each seed trained another model. Then both
    scatter, and the statement is meant for other seeds and other prompts: the half widths over the seeds' means and
    over the prompts' means are added as squares. (Each of the two includes what seeds and prompts do together, so the
    interval is rather too wide than too narrow.) With one training seed the interval is about that one model.

    Raises:
        ConfigError: no values, another shape than (seeds, prompts), or a value that is not finite.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or not table.size or table.shape[1] != len(prompts) or not np.isfinite(table).all():
        shape = f"(seeds, {len(prompts)})"
        raise ConfigError(f"a quality figure needs finite values {shape}; got shape {table.shape}")
    seeds = len(table)
    means = _by_text(table.mean(axis=0), prompts)
    mean, half = float(table.mean()), _half(means)
    how = f"Student t over {len(means)} prompts"
    if trained and seeds > 1:
        half = math.hypot(half, _half(table.mean(axis=1)))
        how = f"Student t over {seeds} training seeds and {len(means)} prompts"
    elif seeds > 1:
        how += f", {seeds} sampling seeds averaged in each"
    low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
    return Interval(mean, low, high, seeds * table.shape[1], how)


def _by_text(values: Array, prompts: Sequence[str]) -> Array:
    """One mean per distinct text, so that a prompt that was asked six times does not count as six."""
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    return np.bincount(place, weights=values) / np.bincount(place)


def _half(values: Array) -> float:
    return float(t_interval(values)[1])


def verdict(low: float | None, high: float | None, better: str, enough: bool) -> str:
    """ "better", "worse" or "no difference shown" of ours - theirs, where `better` is "higher" or "lower".

    A claim needs an interval without zero and `enough` of what was repeated.
    """
    if not enough or low is None or high is None or low <= 0 <= high:
        return NO_DIFFERENCE
    return "better" if (low > 0) == (better == "higher") else "worse"


def quality_verdict(difference: Interval, better: str, seeds: int, prompts: int, trained: bool) -> str:
    """`verdict` of a difference in quality; a claim needs 500 prompts, and three training seeds if it is about how
    models were made."""
    enough = prompts >= PROMPTS and (not trained or seeds >= ROUNDS)
    return verdict(difference.low, difference.high, better, enough)


def ratio_verdict(low: float | None, high: float | None, rounds: int) -> str:
    """The verdict of a ratio of times, ours / theirs: a claim needs three rounds and an interval without 1."""
    below, above = (math.log(value) if value is not None else None for value in (low, high))
    said = verdict(below, above, "lower", rounds >= ROUNDS)
    return {"better": "faster", "worse": "slower"}.get(said, said)


def supports(count: int, share: float) -> bool:
    """Whether `count` samples have a `share` quantile: above the median, at least one of them must lie beyond it.

    p90 needs 10 samples and p99 needs 100: with fewer it is the maximum under another name.
    """
    return count >= 1 and (share <= 0.5 or round(count * (1 - share), 9) >= 1)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`low`, `high` and `n` of a Row; one value has no spread."""
    ends = (min(values), max(values)) if len(values) > 1 else (None, None)
    return {"low": ends[0], "high": ends[1], "n": len(values)}
