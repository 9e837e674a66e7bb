"""Which units go: ranked within scopes, until a share of every scope or a number of parameters is gone.

A scope is one layer, or all layers of one kind: torch-pruning's local and global pruning. One ranking over kinds would
not be fair, since means over many channels spread less than single channels do; scopes of equal structure are those of
isomorphic pruning (Fang et al., ECCV 2024, arXiv 2407.04616). The best unit of every layer always stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import numpy as np

from diffship.compression.narrow import Indices, Scores
from diffship.core.errors import ConfigError

Gone = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Layer:
    """Scores (units,) of one layer, and the parameters that each of its units holds."""

    kind: str
    name: str
    scores: Scores = field(repr=False)
    cost: int

    def relative(self) -> Scores:
        """Scores over their mean, as torch-pruning compares layers with each other; zeros stay zeros."""
        mean = self.scores.mean()
        return np.asarray(self.scores / mean if mean > 0 else self.scores)


def kept_share(layers: Sequence[Layer], ranking: str, keep: float) -> dict[str, Indices]:
    """{layer: units that stay}, at most the share `keep` of every scope, rounded down to whole units.

    Raises:
        ConfigError: a scope would keep fewer units than it has layers.
    """
    gone: list[Gone] = []
    for scope in _scopes(layers, ranking):
        total = sum(len(layer.scores) for layer in scope)
        stay = int(Fraction(str(keep)) * total)  # exact: 0.29 * 100 in floats is less than 29
        if stay < len(scope):
            what = scope[0].name if ranking == "layer" else f"{scope[0].kind} of {len(scope)} layers"
            raise ConfigError(
                f"keep {keep} leaves {stay} of {total} units in {what}; the least that is legal there is "
                f"{len(scope) / total:.4g}. Keep more, or give a share of parameters, which leaves one in each layer"
            )
        gone += [place for _, place in _queue(scope)[: total - stay]]
    return _rest(layers, gone)


def kept_budget(layers: Sequence[Layer], ranking: str, surplus: int) -> dict[str, Indices]:
    """{layer: units that stay} once `surplus` parameters or just more are gone, an equal share of every scope.

    What goes last is one unit: with it, the parameters exceed the budget.

    Raises:
        ConfigError: all that may go is less than `surplus`.
    """
    costs = {layer.name: layer.cost for layer in layers}
    queues = chain.from_iterable(_queue(scope) for scope in _scopes(layers, ranking))
    gone: list[Gone] = []
    for _, place in sorted(queues, key=lambda entry: entry[0]):
        if surplus <= 0:
            break
        surplus -= costs[place[0]]
        gone.append(place)
    if surplus > 0:
        raise ConfigError(f"{surplus:,} parameters too many are left where every layer keeps one unit")
    return _rest(layers, gone)


def _scopes(layers: Sequence[Layer], ranking: str) -> list[list[Layer]]:
    if ranking == "layer":
        return [[layer] for layer in layers]
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return [[layer for layer in layers if layer.kind == kind] for kind in kinds]


def _queue(scope: Sequence[Layer]) -> list[tuple[Fraction, Gone]]:
    """Units in the order in which they go, each with the share of the scope that is gone then."""
    total = sum(len(layer.scores) for layer in scope)
    spare = [
        (layer.relative()[unit], (layer.name, unit))
        for layer in scope
        for unit in range(len(layer.scores))
        if unit != int(np.argmax(layer.scores))
    ]
    spare.sort(key=lambda entry: entry[0])
    return [(Fraction(count, total), place) for count, (_, place) in enumerate(spare, 1)]


def _rest(layers: Sequence[Layer], gone: Iterable[Gone]) -> dict[str, Indices]:
    away: Mapping[str, list[int]] = {layer.name: [] for layer in layers}
    for name, unit in gone:
        away[name].append(unit)
    return {
        layer.name: np.setdiff1d(np.arange(len(layer.scores)), np.array(away[layer.name], np.intp)) for layer in layers
    }
