"""What was seen of one layer's inputs: ranges by call, histograms by stretches of the trajectory, channels, samples.

Everything here can be added up, so that pieces of a capture are measured apart and joined in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

BINS = 1024  # of a histogram; a range that doubles joins neighbours, so this is divisible by four
BANDS = 8  # most histograms of a layer
ROWS = 32  # inputs that are kept
LEAST_EDGE = -60  # a range below 2**-60 is one of zeros


@dataclass(eq=False)
class Observed:
    """Inputs of one layer.

    low, high: float32 (calls,), the least and the largest value at each call of the part. peaks: float64 (calls,), sums
    of max |x| over what was drawn; count: int64 (calls,), how often each call was seen.
    edge: histograms cover -2**edge to 2**edge in BINS equal bins. counts: int64 (bands, BINS); call k of n is in band
    k * bands // n.
    channels: float32 (channels,), max |x| of each. rows: float32 (up to ROWS, channels), inputs drawn by chance; keys:
    float64, one a row: the rows with the largest keys stay.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    peaks: NDArray[np.float64]
    count: NDArray[np.int64]
    edge: int
    counts: NDArray[np.int64]
    channels: NDArray[np.float32]
    rows: NDArray[np.float32]
    keys: NDArray[np.float64]

    @property
    def calls(self) -> int:
        return len(self.low)

    @property
    def growth(self) -> float:
        """The widest call's max |x| over that of the median call: how much one range for all calls wastes."""
        widths = np.maximum(np.abs(self.low), np.abs(self.high))
        return float(widths.max() / max(float(np.median(widths)), float(np.finfo(np.float32).tiny)))

    def band(self, call: int) -> int:
        """The histogram that `call` belongs to."""
        return call * len(self.counts) // self.calls


@dataclass(frozen=True, eq=False)
class Seen:
    """One input: its extremes, a histogram over -2**edge to 2**edge (BINS,), max |x| of channels, some rows."""

    low: float
    high: float
    edge: int
    counts: NDArray[np.int64]
    channels: NDArray[np.float32]
    rows: NDArray[np.float32]
    keys: NDArray[np.float64]


def nothing(calls: int, channels: int) -> Observed:
    """Of a layer that was not seen yet, in a part that is called `calls` times a picture."""
    return Observed(
        np.full(calls, np.inf, np.float32),
        np.full(calls, -np.inf, np.float32),
        np.zeros(calls),
        np.zeros(calls, np.int64),
        LEAST_EDGE,
        np.zeros((min(calls, BANDS), BINS), np.int64),
        np.zeros(channels, np.float32),
        np.zeros((0, channels), np.float32),
        np.zeros(0),
    )


def observed_bytes(calls: int, channels: int) -> int:
    """Most bytes that `Observed` takes, in memory and in a file."""
    return calls * 24 + min(calls, BANDS) * BINS * 8 + (4 + 4 * ROWS) * channels + 8 * ROWS


def edge_of(peak: float) -> int:
    """The least edge that covers `peak`."""
    return LEAST_EDGE if peak <= 2.0**LEAST_EDGE else math.ceil(math.log2(peak))


def note(total: Observed, call: int, seen: Seen) -> None:
    """Add one input at `call` to `total`, in place."""
    total.low[call] = min(total.low[call], seen.low)
    total.high[call] = max(total.high[call], seen.high)
    total.peaks[call] += max(abs(seen.low), abs(seen.high))
    total.count[call] += 1
    _widen(total, seen.edge)
    total.counts[total.band(call)] += widened(seen.counts, total.edge - seen.edge)
    _add_rows(total, seen.channels, seen.rows, seen.keys)


def join(total: Observed, other: Observed) -> None:
    """Add what `other` saw of the same layer to `total`, in place.

    Raises:
        ConfigError: it is of another layer, or of another number of calls.
    """
    if (total.calls, len(total.channels)) != (other.calls, len(other.channels)):
        raise ConfigError("inputs of different layers, or of different numbers of steps, cannot be joined")
    np.minimum(total.low, other.low, out=total.low)
    np.maximum(total.high, other.high, out=total.high)
    total.peaks += other.peaks
    total.count += other.count
    _widen(total, other.edge)
    total.counts += widened(other.counts, total.edge - other.edge)
    _add_rows(total, other.channels, other.rows, other.keys)


def widened(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """A histogram (..., BINS) over a range that is 2**doublings as wide, without a change of what lies where."""
    for _ in range(doublings):
        pairs = counts.reshape(*counts.shape[:-1], BINS // 2, 2).sum(axis=-1)
        counts = np.zeros_like(counts)
        counts[..., BINS // 4 : 3 * BINS // 4] = pairs
    return counts


def _widen(total: Observed, edge: int) -> None:
    if edge > total.edge:
        total.counts = widened(total.counts, edge - total.edge) if total.counts.any() else total.counts
        total.edge = edge


def _add_rows(
    total: Observed, channels: NDArray[np.float32], rows: NDArray[np.float32], keys: NDArray[np.float64]
) -> None:
    np.maximum(total.channels, channels, out=total.channels)
    joined, order = np.concatenate([total.rows, rows]), np.concatenate([total.keys, keys])
    best = np.argsort(-order, kind="stable")[:ROWS]
    total.rows, total.keys = joined[best], order[best]
