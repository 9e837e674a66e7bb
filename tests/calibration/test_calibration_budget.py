"""The budget solver against every choice there is, and the clean-up of noisy scores against pooling by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from diffship.calibration.budget import Option, draw, isotonic, solve
from diffship.core.errors import ConfigError

Layers = list[list[Option]]


def problem(seed: int, layers: int, ways: int, spread: int = 10_000) -> Layers:
    """Layers whose options get cheaper and, mostly, worse; from some seeds on costs and scores tie."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(layers):
        costs = np.sort(rng.integers(1, spread, ways))[::-1]
        scores = np.round(np.sort(rng.random(ways)) + 0.2 * rng.random(ways), 1 if seed % 2 else 12)
        made.append([Option(int(cost), float(score)) for cost, score in zip(costs, scores, strict=True)])
    return made


def every_choice(layers: Layers, capacity: int) -> float:
    sums = [
        sum(option.score for option in picked)
        for picked in itertools.product(*layers)
        if sum(option.cost for option in picked) <= capacity
    ]
    return min(sums)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_no_choice_is_better(seed: int, share: float) -> None:
    layers = problem(seed, layers=6, ways=4)
    ends = [sum(pick(o.cost for o in layer) for layer in layers) for pick in (min, max)]
    capacity = int(ends[0] + share * (ends[1] - ends[0]))
    found = solve(layers, capacity)
    assert found.score == pytest.approx(every_choice(layers, capacity), abs=1e-12)
    assert found.bound == found.score, "it must be proved, not only found"
    picked = [layer[index] for layer, index in zip(layers, found.chosen, strict=True)]
    assert found.cost == sum(option.cost for option in picked) <= capacity
    assert found.score == pytest.approx(sum(option.score for option in picked))


def by_table(layers: Layers, capacity: int) -> float:
    """The textbook recurrence over every whole capacity: a second exact method, for sizes beyond brute force."""
    best = np.zeros(capacity + 1)
    for layer in layers:
        following = np.full(capacity + 1, np.inf)
        for option in layer:
            if option.cost <= capacity:
                moved = best[: capacity + 1 - option.cost] + option.score
                following[option.cost :] = np.minimum(following[option.cost :], moved)
        best = following
    return float(best[-1])


@pytest.mark.parametrize("seed", range(4))
def test_many_layers_against_a_table_over_all_capacities(seed: int) -> None:
    layers = problem(seed, layers=60, ways=4, spread=60)
    capacity = int(0.6 * sum(layer[0].cost for layer in layers))
    assert solve(layers, capacity).score == pytest.approx(by_table(layers, capacity), abs=1e-9)


def test_a_thinned_front_says_how_far_from_the_best_it_may_be() -> None:
    layers = problem(2, layers=40, ways=4, spread=10**12)
    capacity = int(0.55 * sum(layer[0].cost for layer in layers))
    exact, thin = solve(layers, capacity), solve(layers, capacity, states=3)
    assert exact.bound == exact.score
    assert thin.bound <= exact.score <= thin.score
    assert thin.cost <= capacity


@pytest.mark.parametrize("method", ["solve", "draw"])
def test_what_cannot_be_met_names_the_least(method: str) -> None:
    layers = [[Option(10, 0.0), Option(4, 1.0)], [Option(7, 0.0), Option(5, 2.0)]]
    with pytest.raises(ConfigError, match=r"the least( that can be reached)? is 9"):
        solve(layers, 8) if method == "solve" else draw(layers, 8, seed=0)


@pytest.mark.parametrize("seed", range(6))
def test_a_drawn_choice_uses_its_budget(seed: int) -> None:
    layers = [[Option(cost, 0.0) for cost in (100, 75, 50, 25)] for _ in range(30)]
    found = draw(layers, 2000, seed)
    assert 2000 - 25 < found.cost <= 2000, "no layer could be widened by one more step"
    assert found == draw(layers, 2000, seed)
    assert found.chosen != draw(layers, 2000, seed + 1).chosen


def pooled(values: Sequence[float]) -> list[float]:
    """Pool adjacent violators, the other way to the same sequence."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in blocks for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_noisy_scores_become_monotone(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=7).tolist()
    found = isotonic(values)
    assert found == pytest.approx(pooled(values))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert isotonic(sorted(values)) == pytest.approx(sorted(values))
