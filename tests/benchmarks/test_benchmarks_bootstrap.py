"""Intervals against closed forms and against enumerations of every resample."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from diffship.benchmarks.bootstrap import NO_DIFFERENCE, bootstrap, interval, paired, ratio, ratio_verdict, verdict
from diffship.core.errors import ConfigError


def quantile(values: list[float], share: float) -> float:
    """Inverse of the empirical distribution: the least value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def enumerated(values: list[float]) -> tuple[float, float]:
    """The exact percentile interval: all n^n resamples of a few values."""
    means = [statistics.fmean(chosen) for chosen in itertools.product(values, repeat=len(values))]
    return quantile(means, 0.025), quantile(means, 0.975)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.3, -0.2, 0.9, 5.0], [1.0, 1.5, 1.7, 3.0, 8.0]])
def test_small_samples_equal_the_enumeration(values: list[float]) -> None:
    low, high = enumerated(values)
    found = interval(values, draws=40_000)
    spread = max(values) - min(values)
    assert found.low == pytest.approx(low, abs=0.03 * spread)
    assert found.high == pytest.approx(high, abs=0.03 * spread)
    assert (found.mean, found.seeds, found.units) == (pytest.approx(statistics.fmean(values)), 1, len(values))


def test_large_samples_equal_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 1.0, size=400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, rel=0.02)
    assert high == pytest.approx(values.mean() + half, rel=0.02)
    assert bootstrap(values) == (low, high)


def test_seeds_that_disagree_widen_the_interval() -> None:
    noise = np.random.default_rng(4).normal(0, 1, size=(3, 500))
    agree, disagree = interval(noise), interval(noise + np.array([[-1.0], [0.0], [1.0]]))
    # Two axes: the variance of the mean is about var(seed means) / 3 + var(values) / (3 * 500)
    assert disagree.high - disagree.low > 5 * (agree.high - agree.low)
    assert disagree.low < -0.5 and disagree.high > 0.5


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(5)
    drift = rng.normal(10, 3, size=600)
    ours, theirs = drift + 0.1 + rng.normal(0, 0.1, 600), drift + rng.normal(0, 0.1, 600)
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(float((ours - theirs).mean()))
    assert found.excludes_zero and found.high - found.low < 0.03


def test_ratio_is_the_median_and_one_stall_does_not_move_it() -> None:
    found = ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert found.mean == pytest.approx(1.0)
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(2.0))
    assert ratio([3.0, 3.0], [2.0, 2.0]).low == pytest.approx(1.5)
    calls = np.ones((3, 10))
    stalled = calls.copy()
    stalled[1, 4] = 50.0
    found = ratio(calls, 2 * stalled)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5) and (found.seeds, found.units) == (3, 10)
    with pytest.raises(ConfigError, match="one shape"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("shape", "shift", "better", "quality", "expected"),
    [
        ((3, 500), 1.0, "higher", True, "better"),
        ((3, 500), 1.0, "lower", True, "worse"),
        ((3, 500), -1.0, "lower", True, "better"),
        ((3, 500), 0.0, "higher", True, NO_DIFFERENCE),
        ((2, 500), 1.0, "higher", True, NO_DIFFERENCE),
        ((3, 499), 1.0, "higher", True, NO_DIFFERENCE),
        ((3, 499), 1.0, "higher", False, "better"),
    ],
)
def test_a_claim_needs_seeds_prompts_and_an_interval_without_zero(
    shape: tuple[int, int], shift: float, better: str, quality: bool, expected: str
) -> None:
    values = np.random.default_rng(6).normal(0, 1, size=shape)
    values -= values.mean()
    assert verdict(interval(values + shift), better, quality) == expected


def test_a_ratio_over_two_rounds_claims_nothing() -> None:
    assert ratio_verdict(ratio([1.0, 1.0, 1.1], [2.0, 2.1, 2.0])) == "better"
    assert ratio_verdict(ratio([1.0, 1.0], [2.0, 2.0])) == NO_DIFFERENCE
    assert ratio_verdict(ratio([2.0, 2.1, 2.2], [1.0, 1.0, 1.0])) == "worse"
    assert ratio_verdict(ratio([1.0, 2.0, 1.0], [1.5, 1.5, 1.0])) == NO_DIFFERENCE


def test_values_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="one shape"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ConfigError, match="finite"):
        interval([float("nan"), 1.0])
    with pytest.raises(ConfigError, match="finite"):
        interval([])
    with pytest.raises(ConfigError, match="above zero"):
        ratio([0.0], [1.0])
