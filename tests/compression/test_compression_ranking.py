"""Which units go: shares and budgets beside brute force, and what must stay."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from diffship.compression.ranking import Layer, kept_budget, kept_share
from diffship.core.errors import ConfigError


def layer(name: str, scores: list[float], cost: int = 1, kind: str = "inner") -> Layer:
    return Layer(kind, name, np.array(scores, np.float64), cost)


THREE = [layer("a", [4, 1, 3, 2], 5), layer("b", [10, 40, 20], 3), layer("c", [7, 6], 9, "heads")]


def plain(kept: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in kept.items()}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1.0, {"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0, 1]}),
        (0.75, {"a": [0, 2, 3], "b": [1, 2], "c": [0]}),
        (0.5, {"a": [0, 2], "b": [1], "c": [0]}),
    ],
)
def test_a_share_of_every_layer_stays_rounded_down(keep: float, expected: dict[str, list[int]]) -> None:
    assert plain(kept_share(THREE, "layer", keep)) == expected


def test_shares_are_exact() -> None:
    hundred = [layer("a", list(range(100)))]
    for percent in range(1, 101):
        assert len(kept_share(hundred, "layer", percent / 100)["a"]) == percent


def test_a_global_ranking_compares_scores_over_their_mean() -> None:
    """b is a hundred times as large as a, and no more important for that."""
    small, large = [1.0, 9, 8, 2], [300.0, 500, 400, 800]
    kept = kept_share([layer("a", small), layer("b", large)], "global", 0.75)
    relative = sorted(
        (value, "ab"[i]) for i, row in enumerate((small, large)) for value in np.array(row) / np.mean(row)
    )
    gone = [name for _, name in relative[:2]]
    assert gone == ["a", "a"] and plain(kept) == {"a": [1, 2], "b": [0, 1, 2, 3]}


def test_the_best_of_every_layer_stays() -> None:
    flat, steep = layer("flat", [1.0] * 8), layer("steep", [0.001, 0.002, 0.003, 100.0])
    kept = plain(kept_share([steep, flat], "global", 0.25))
    assert kept["steep"] == [3] and len(kept["flat"]) == 2


def test_scopes_are_kinds() -> None:
    heads = layer("h", [1.0, 1.1, 1.2, 1.3], kind="heads")
    kept = kept_share([layer("a", [0.1, 50.0, 60.0, 70.0]), heads], "global", 0.75)
    assert plain(kept) == {"a": [1, 2, 3], "h": [1, 2, 3]}


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_budget_takes_as_few_units_as_do(ranking: str) -> None:
    whole = sum(one.cost * len(one.scores) for one in THREE)
    before: set[tuple[str, int]] = set()
    for surplus in range(1, 5 * 3 + 3 * 2 + 9 + 1):
        kept = kept_budget(THREE, ranking, surplus)
        size = sum(one.cost * len(kept[one.name]) for one in THREE)
        gone = {(one.name, unit) for one in THREE for unit in range(len(one.scores)) if unit not in kept[one.name]}
        assert whole - size >= surplus
        assert before <= gone and len(gone - before) <= 1  # one unit at a time, always in the same order
        last = gone - before
        if last:
            ((name, _),) = last
            assert whole - size - next(one.cost for one in THREE if one.name == name) < surplus
        before = gone


def test_a_budget_prunes_layers_alike() -> None:
    layers = [layer("a", list(range(12)), 2), layer("b", list(range(24)), 3), layer("c", list(range(6)), 7)]
    for surplus in range(1, 100):
        kept = kept_budget(layers, "layer", surplus)
        shares = [Fraction(len(kept[one.name]), len(one.scores)) for one in layers]
        assert max(shares) - min(shares) <= Fraction(1, 6)  # a unit of the coarsest


def test_what_stays_has_the_largest_sum_of_scores() -> None:
    """Of all ways to keep as many units, by brute force."""
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(20):
        one = layer("a", rng.random(8).tolist())
        kept = kept_share([one], "layer", 0.5)["a"]
        best = max((one.scores[list(c)].sum(), c) for c in product(range(8), repeat=4) if len(set(c)) == 4)
        assert set(kept.tolist()) == set(best[1])


def test_dead_layers_have_no_say() -> None:
    kept = kept_share([layer("dead", [0.0, 0.0]), layer("live", [1.0, 2.0])], "global", 0.75)
    assert plain(kept) == {"dead": [0], "live": [0, 1]}


def test_too_little_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"keep 0\.3 leaves 0 of 3 units in b; the least that is legal there is 0\.3333"
    ):
        kept_share(THREE[:2], "layer", 0.3)
    with pytest.raises(ConfigError, match="leaves 1 of 7 units in inner of 2 layers"):
        kept_share(THREE[:2], "global", 0.2)
    with pytest.raises(ConfigError, match="3 parameters too many are left where every layer keeps one unit"):
        kept_budget(THREE, "layer", 5 * 3 + 3 * 2 + 9 + 3)
