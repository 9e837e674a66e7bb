"""Intervals against tables, closed forms and simulations: what is claimed must be wrong no more than it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffship.benchmarks.measure.intervals import (
    NO_DIFFERENCE,
    quality,
    quality_verdict,
    ratio,
    ratio_verdict,
    spread,
    supports,
    t_interval,
    t_quantile,
    verdict,
)
from diffship.core.errors import ConfigError

TRIALS = 4000
PROMPTS = tuple(f"prompt {number}" for number in range(500))


@pytest.mark.parametrize(
    ("level", "df", "value"),
    [  # the table of Student's distribution, two-sided
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 5, 4.032),
        (0.50, 7, 0.711),
    ],
)
def test_t_quantiles_are_those_of_the_table(level: float, df: int, value: float) -> None:
    assert t_quantile(level, df) == pytest.approx(value, abs=6e-4)


def test_t_quantiles_equal_their_closed_forms() -> None:
    for level in (0.1, 0.5, 0.95, 0.999):
        assert t_quantile(level, 1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-9)
        assert t_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-9)
    for level, df in ((1.0, 3), (0.0, 3), (0.95, 0)):
        with pytest.raises(ConfigError, match="t quantile"):
            t_quantile(level, df)


@pytest.mark.parametrize("rounds", [2, 3, 5, 10])
@pytest.mark.parametrize("drift", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("stalls", [0.0, 0.02])
def test_no_more_than_six_verdicts_in_a_hundred_are_false(rounds: int, drift: float, stalls: float) -> None:
    """No true difference; each round has a drift of its own that moves the ratio, and 12 calls with noise."""
    draw = np.random.default_rng([rounds, int(100 * drift), int(100 * stalls)])
    logs = draw.normal(0, 0.05, (TRIALS, rounds, 12)) + draw.normal(0, drift, (TRIALS, rounds, 1))
    logs += np.log(20.0) * (draw.random(logs.shape) < stalls)  # a call that waits for the machine
    mean, half = t_interval(np.median(logs, axis=-1))
    false = float((np.abs(mean) > half).mean())
    limit = 0.06 if not stalls else 0.09  # stalls slow one side down, which is a true difference, if a small one
    assert 0.02 < false <= limit, f"{false:.1%} of {TRIALS} verdicts"
    values = np.exp(logs[0])
    found = ratio(list(values), list(np.ones_like(values)))
    assert found.low is not None and found.high is not None
    assert (found.mean, found.low) == pytest.approx((math.exp(mean[0]), math.exp(mean[0] - half[0])))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("by_seed", "by_prompt", "noise"), [(0.0, 1.0, 1.0), (0.3, 1.0, 1.0), (0.3, 0.0, 0.2)])
def test_quality_claims_are_false_no_more_often(trained: bool, by_seed: float, by_prompt: float, noise: float) -> None:
    """Three seeds, 40 prompts, no difference over all seeds and prompts that there could be."""
    draw = np.random.default_rng(5)
    trials, texts = 600, PROMPTS[:40]
    table = draw.normal(0, by_prompt, (trials, 1, 40)) + draw.normal(0, noise, (trials, 3, 40))
    if trained:  # seeds of sampling have nothing in common over the prompts: the noise of each picture is its own
        table += draw.normal(0, by_seed, (trials, 3, 1))
    found = [quality(values, texts, trained) for values in table]
    false = np.mean([entry.low is not None and not entry.low <= 0 <= (entry.high or 0) for entry in found])
    assert false <= 0.075, f"{false:.1%} of {trials}"  # 0.05 and three standard errors


def test_prompts_are_what_is_repeated_under_seeds_of_sampling() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, (3, 500))
    found = quality(values, PROMPTS, trained=False)
    mean, half = t_interval(values.mean(axis=0))
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.n == 1500 and found.how == "Student t over 500 prompts, 3 sampling seeds averaged in each"
    again = quality(np.tile(values, (2, 1)), PROMPTS, trained=False)  # the same pictures twice prove nothing more
    assert (again.low, again.high) == pytest.approx((found.low, found.high))


def test_a_prompt_that_is_asked_six_times_is_one_prompt() -> None:
    values = np.random.default_rng(2).normal(0, 1, (1, 20))
    once = quality(values, PROMPTS[:20], trained=False)
    six = quality(np.tile(values, (1, 6)), PROMPTS[:20] * 6, trained=False)
    assert (six.low, six.high) == pytest.approx((once.low, once.high))
    assert six.how == "Student t over 20 prompts"


def test_training_seeds_that_disagree_widen_the_interval() -> None:
    noise = np.random.default_rng(4).normal(0, 1, size=(3, 500))
    agree = quality(noise, PROMPTS, trained=True)
    disagree = quality(noise + np.array([[-1.0], [0.0], [1.0]]), PROMPTS, trained=True)
    assert disagree.low is not None and disagree.high is not None and agree.low is not None and agree.high is not None
    assert disagree.high - disagree.low > 5 * (agree.high - agree.low)
    # three means 1 apart: t(0.975, 2) x 1 / sqrt(3), to which the prompts add little
    assert disagree.high - disagree.mean == pytest.approx(4.303 / math.sqrt(3), rel=0.05)
    assert disagree.how == "Student t over 3 training seeds and 500 prompts"
    assert quality(noise[:1], PROMPTS, trained=True).how == "Student t over 500 prompts"


def test_a_ratio_is_the_geometric_mean_of_the_rounds_medians() -> None:
    found = ratio([[1.0, 9.0, 1.0], [4.0, 4.0, 4.0]], [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    assert found.mean == pytest.approx(1.0), "one stall of a round does not move it"
    half = 12.7062 * math.log(2)  # two values +-log 2: their deviation over sqrt(2) is log 2
    assert found.low == pytest.approx(math.exp(-half), rel=1e-3) and found.n == 2
    assert found.how == "Student t over 2 rounds"
    single = ratio([1.482], [1.0])
    assert (single.mean, single.low, single.high, single.n) == (pytest.approx(1.482), None, None, 1)


def test_a_timing_claim_needs_three_rounds_and_an_interval_without_one() -> None:
    assert ratio_verdict(0.4, 0.6, 3) == "faster" and ratio_verdict(1.1, 1.6, 3) == "slower"
    assert ratio_verdict(0.9, 1.1, 9) == ratio_verdict(0.4, 0.6, 2) == ratio_verdict(None, None, 1) == NO_DIFFERENCE


@pytest.mark.parametrize(
    ("seeds", "prompts", "shift", "better", "trained", "said"),
    [
        (3, 500, 1.0, "higher", True, "better"),
        (3, 500, 1.0, "lower", True, "worse"),
        (3, 500, -1.0, "lower", False, "better"),
        (3, 500, 0.0, "higher", True, NO_DIFFERENCE),
        (2, 500, 1.0, "higher", True, NO_DIFFERENCE),
        (1, 500, 1.0, "higher", False, "better"),
        (3, 499, 1.0, "higher", False, NO_DIFFERENCE),
    ],
)
def test_a_quality_claim_needs_prompts_and_training_seeds(
    seeds: int, prompts: int, shift: float, better: str, trained: bool, said: str
) -> None:
    values = np.random.default_rng(6).normal(0, 0.2, size=(seeds, prompts))
    values -= values.mean()
    found = quality(values + shift, PROMPTS[:prompts], trained)
    assert quality_verdict(found, better, seeds, prompts, trained) == said


def test_an_interval_that_ends_at_zero_claims_nothing() -> None:
    assert verdict(0.0, 1.0, "higher", True) == verdict(-1.0, 0.0, "higher", True) == NO_DIFFERENCE
    assert verdict(0.1, 1.0, "higher", False) == NO_DIFFERENCE


def test_percentiles_that_a_sample_has_not_are_known() -> None:
    assert next(n for n in range(1, 200) if supports(n, 0.99)) == 100
    assert next(n for n in range(1, 200) if supports(n, 0.9)) == 10
    assert supports(1, 0.5) and not supports(0, 0.5)


def test_one_value_has_no_spread() -> None:
    assert spread([2.0]) == {"low": None, "high": None, "n": 1}
    assert spread([2.0, 1.0, 3.0]) == {"low": 1.0, "high": 3.0, "n": 3}


def test_values_that_cannot_be_compared_are_refused() -> None:
    for ours, theirs, message in (
        ([1.0, 2.0], [1.0], "same rounds"),
        ([[1.0, 2.0]], [[1.0]], "one shape"),
        ([0.0], [1.0], "above zero"),
        ([math.nan], [1.0], "finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            ratio(ours, theirs)
    for values in ([[math.nan, 1.0]], [1.0, 2.0], np.empty((0, 2))):
        with pytest.raises(ConfigError, match="finite values"):
            quality(values, ("a", "b"), trained=False)
