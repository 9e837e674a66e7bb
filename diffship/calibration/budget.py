"""A budget over the layers: of each layer one option, cost within the capacity, sum of scores as small as can be.

This is the multiple-choice knapsack problem. `solve` does it exactly, by dynamic programming over the Pareto front of
(cost, score) (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11), where a state goes once its
Lagrangian bound exceeds the best solution known. Costs stay whole numbers: there is no grid and no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError

_ROUGH, _FINE = 2_000, 500_000  # most states: while a good solution is found, and while the best is proved
_SLACK = 1e-9  # relative; more than float64 rounds in a sum over layers


@dataclass(frozen=True)
class Option:
    """What one way to build a layer costs (parameters or MACs) and how much it hurts."""

    cost: int
    score: float


@dataclass(frozen=True)
class Solution:
    """chosen: index of the option of each layer. bound: no choice within the capacity scores less; equal to `score`, to
    rounding, if the solution is proved to be the best."""

    chosen: tuple[int, ...]
    cost: int
    score: float
    bound: float


def solve(options: Sequence[Sequence[Option]], capacity: int, states: int = _FINE) -> Solution:
    """The choice of one option a layer with the least sum of scores among those that cost at most `capacity`.

    `states` bounds memory: a front that outgrows it is thinned, and `bound` says how far from the best that may lead.

    Raises:
        ConfigError: even the cheapest options cost more than the capacity.
    """
    least = sum(min(option.cost for option in layer) for layer in options)
    if least > capacity:
        raise ConfigError(f"a budget of {capacity:,} cannot be met; the least that can be reached is {least:,}")
    price, best = _priced(options, capacity)
    best = _front(options, capacity, price, best, min(_ROUGH, states))
    return best if best.bound >= best.score else _front(options, capacity, price, best, states)


def _priced(options: Sequence[Sequence[Option]], capacity: int) -> tuple[float, Solution]:
    """The multiplier that makes the Lagrangian bound best, by bisection, and the feasible solution at it."""
    low, high = 0.0, 1e-12
    if _at(options, 0.0).cost <= capacity:
        return 0.0, _at(options, 0.0)
    while _at(options, high).cost > capacity:
        low, high = high, high * 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _at(options, middle).cost > capacity else (low, middle)
    return high, _at(options, high)


def _at(options: Sequence[Sequence[Option]], price: float) -> Solution:
    """Each layer's best option where a unit of cost has a price; the cheaper one of equals."""
    return _solution(options, [_best_at(layer, price) for layer in options], -np.inf)


def _best_at(layer: Sequence[Option], price: float) -> int:
    return min(range(len(layer)), key=lambda i: (layer[i].score + price * layer[i].cost, layer[i].cost))


def _solution(options: Sequence[Sequence[Option]], chosen: Sequence[int], bound: float) -> Solution:
    picked = [layer[index] for layer, index in zip(options, chosen, strict=True)]
    score = float(sum(option.score for option in picked))
    return Solution(tuple(chosen), sum(option.cost for option in picked), score, min(bound, score))


@dataclass
class _States:
    """Partial choices after some layers, ascending in cost and descending in score; `came` leads back to them."""

    cost: NDArray[np.int64]
    score: NDArray[np.float64]
    came: list[tuple[NDArray[np.intp], NDArray[np.intp]]]  # for each layer: the state before, the option


def _front(options: Sequence[Sequence[Option]], capacity: int, price: float, known: Solution, states: int) -> Solution:
    """The best choice among at most `states` partial ones at a time; `known` if nothing better is found."""
    cheapest = _suffix([min(option.cost for option in layer) for layer in options])
    relaxed = _suffix([min(o.score + price * o.cost for o in layer) for layer in options])
    limit = known.score + _SLACK * (1 + abs(known.score))
    now, dropped = _States(np.zeros(1, np.int64), np.zeros(1), []), np.inf
    for place, layer in enumerate(options):
        cost = (now.cost[:, None] + np.array([option.cost for option in layer], np.int64)).ravel()
        score = (now.score[:, None] + np.array([option.score for option in layer])).ravel()
        bounds = score + price * (cost - float(capacity)) + relaxed[place + 1]
        alive = np.flatnonzero((cost + cheapest[place + 1] <= capacity) & (bounds <= limit))
        alive = alive[_undominated(cost[alive], score[alive])]
        if len(alive) > states:
            order = np.argsort(bounds[alive], kind="stable")
            dropped = min(dropped, float(bounds[alive[order[states]]]))
            alive = alive[np.sort(order[:states])]
        now = _States(cost[alive], score[alive], [*now.came, np.divmod(alive, len(layer))])
    return _better(options, now, known, dropped)


def _undominated(cost: NDArray[np.int64], score: NDArray[np.float64]) -> NDArray[np.intp]:
    """Indices of the states that no other one beats in both, ascending in cost."""
    order = np.lexsort((score, cost))
    least = np.minimum.accumulate(score[order])
    return order[np.flatnonzero(np.r_[True, score[order][1:] < least[:-1]][: len(order)])]


def _better(options: Sequence[Sequence[Option]], end: _States, known: Solution, dropped: float) -> Solution:
    if not len(end.cost) or end.score[-1] >= known.score:
        return _solution(options, known.chosen, dropped)
    state, chosen = len(end.cost) - 1, []
    for before, option in reversed(end.came):
        chosen.append(int(option[state]))
        state = int(before[state])
    return _solution(options, chosen[::-1], dropped)


def _suffix(values: Sequence[float]) -> list[float]:
    """[sum of all, sum from the second on, ..., 0]."""
    sums: list[float] = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def draw(options: Sequence[Sequence[Option]], capacity: int, seed: int) -> Solution:
    """A choice within the capacity by chance, scores not looked at: what allocations are compared with.

    Options are taken from the dearest on. Layers drawn by `seed` go one option down until the cost fits; then, in a
    random order, each goes up again while it still fits, so that the budget is used.

    Raises:
        ConfigError: even the cheapest options cost more than the capacity.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    ways = [_dearest_first(layer) for layer in options]
    costs = [[layer[i].cost for i in way] for layer, way in zip(options, ways, strict=True)]
    if sum(cost[-1] for cost in costs) > capacity:
        raise ConfigError(f"a budget of {capacity:,} cannot be met; the least is {sum(c[-1] for c in costs):,}")
    level, total = [0] * len(costs), sum(cost[0] for cost in costs)
    while total > capacity:
        at = int(rng.choice([i for i, cost in enumerate(costs) if level[i] + 1 < len(cost)]))
        total += costs[at][level[at] + 1] - costs[at][level[at]]
        level[at] += 1
    for at in rng.permutation(len(costs)):
        while level[at] and total + costs[at][level[at] - 1] - costs[at][level[at]] <= capacity:
            total += costs[at][level[at] - 1] - costs[at][level[at]]
            level[at] -= 1
    return _solution(options, [way[step] for way, step in zip(ways, level, strict=True)], -np.inf)


def _dearest_first(layer: Sequence[Option]) -> list[int]:
    return sorted(range(len(layer)), key=lambda i: -layer[i].cost)


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares.

    By the max-min formula (Robertson, Wright and Dykstra, Order Restricted Statistical Inference, 1988, section 1.4):
    the i-th is the largest, over a <= i, of the least mean of values[a..b] over b >= i.
    """
    count = len(values)
    means = {(a, b): sum(values[a : b + 1]) / (b + 1 - a) for a in range(count) for b in range(a, count)}
    return [max(min(means[a, b] for b in range(i, count)) for a in range(i + 1)) for i in range(count)]
