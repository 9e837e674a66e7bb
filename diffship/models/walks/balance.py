"""Balance: where a row of layers is cut so that the largest of several stages is as small as it can be.

Numbers in, numbers out. Among cuts whose largest stage is within SLACK of the best, the one with the fewest bytes
between devices is taken: a cut one layer further often saves a skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError

SLACK = 0.01
F64 = NDArray[np.float64]
I64 = NDArray[np.intp]


@dataclass(frozen=True)
class Crossing:
    """A tensor that layer `written` makes and the layers `read` take, ascending; `bytes` is its size on the wire."""

    written: int
    read: tuple[int, ...]
    bytes: int


def balanced(
    costs: Sequence[float],
    crossings: Sequence[Crossing],
    stages: int,
    speeds: Sequence[float] | None = None,
    ends: bool = False,
) -> list[int]:
    """Indices of the layers before which to cut, ascending.

    `costs` are those of the layers, `speeds` those of the devices (relative; the last device makes the output). With
    `ends` the first and the last stretch stand on the last device, and the middle is cut for the others.

    Raises:
        ConfigError: fewer layers than stretches, or not one positive speed for each stage.
    """
    pace = np.ones(stages) if speeds is None else np.asarray(speeds, np.float64)
    if pace.shape != (stages,) or not (np.isfinite(pace) & (pace > 0)).all():
        raise ConfigError(f"speeds are {list(speeds or ())}; {stages} stages take {stages} positive ones")
    stretches = stages + (1 if ends and stages > 1 else 0)
    if len(costs) < stretches:
        raise ConfigError(f"{len(costs)} layers cannot be cut into {stretches} stretches; ask for fewer stages")
    if stages == 1:
        return []
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, np.float64))])
    plan = _Rows(sums[None, :] - sums[:, None], crossings)
    return plan.with_ends(pace) if ends else plan.chain(pace)


class _Rows:
    """Finds the cuts whose largest cost is least, and among them those with the fewest bytes, by dynamic programming
    over stages of layers [i, j)."""

    def __init__(self, cost: F64, crossings: Sequence[Crossing]) -> None:
        self.last = len(cost) - 1
        self.cost = np.where(np.triu(np.ones_like(cost), 1) > 0, cost, np.inf)
        self.crossings = crossings
        self.incoming = self._incoming()

    def chain(self, pace: F64) -> list[int]:
        limit = self._least(0, pace)[self.last] * (1 + SLACK)
        _, back = self._bytes(0, pace, limit)
        return _trace(back, self.last)[1:]

    def with_ends(self, pace: F64) -> list[int]:
        middle, last = pace[:-1], pace[-1]
        both = (self.cost[0][:, None] + self.cost[:, self.last][None, :]) / last
        starts = range(1, self.last - len(middle))
        largest = {a: np.maximum(self._least(a, middle), both[a]) for a in starts}
        limit = min(float(row.min()) for row in largest.values()) * (1 + SLACK)
        best: tuple[float, list[int]] = (np.inf, [])
        for a in starts:
            if largest[a].min() > limit:
                continue
            sent, back = self._bytes(a, middle, limit)
            sent = np.where(both[a] <= limit, sent + self._kept_between(a), np.inf)
            b = int(sent.argmin())
            if sent[b] < best[0]:
                best = float(sent[b]), [*_trace(back, b), b]
        return best[1]

    def _least(self, start: int, pace: F64) -> F64:
        """Per end: the least largest cost of the stretches that fill [start, end)."""
        best: F64 = self.cost[start] / pace[0]
        for speed in pace[1:]:
            best = np.asarray(np.maximum(best[:, None], self.cost / speed).min(axis=0))
        return best

    def _bytes(self, start: int, pace: F64, limit: float) -> tuple[F64, list[I64]]:
        """Per end: the least bytes that reach those stretches under the limit; and per stretch, where it begins."""
        sent = np.where(self.cost[start] / pace[0] <= limit, self.incoming[start], np.inf)
        back = [np.full(self.last + 1, start)]
        for speed in pace[1:]:
            ways = sent[:, None] + np.where(self.cost / speed <= limit, self.incoming, np.inf)
            back.append(ways.argmin(axis=0))
            sent = ways.min(axis=0)
        return sent, back

    def _incoming(self) -> F64:
        """[i, j]: bytes written before i that layers of [i, j) read."""
        found = np.zeros_like(self.cost)
        for tensor in self.crossings:
            for i in range(tensor.written + 1, tensor.read[-1] + 1):
                found[i, next(r for r in tensor.read if r >= i) + 1 :] += tensor.bytes
        return found

    def _kept_between(self, a: int) -> F64:
        """[b]: bytes that the last stretch, from b on, reads out of [a, b); what [0, a) wrote is at home there."""
        found = np.zeros(self.last + 1)
        for tensor in self.crossings:
            if tensor.written >= a:
                found[tensor.written + 1 : tensor.read[-1] + 1] += tensor.bytes
        return found


def _trace(back: Sequence[I64], end: int) -> list[int]:
    """Begins of the stretches that end at `end`."""
    begins: list[int] = []
    for row in reversed(back):
        end = int(row[end])
        begins.insert(0, end)
    return begins
