"""From what was observed to a range: the least and the largest input that a layer's codes can express.

Every function takes `Observed` and the number of bits, and returns (low, high) with low <= 0 <= high. Values outside
are clipped. `affine` makes codes of a range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from diffship.calibration.observed import BINS, Observed
from diffship.core.lazy import lazy
from diffship.core.precision import Affine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

PERCENTILE = 0.9999  # of the values, which a range covers
_SHARES = 64  # of a range that are tried
_LEAST_SHARE = 1 / 16
_LEAST_BINS = 128  # of half a histogram, for thresholds by entropy
_LITTLE = 1e-4  # or else a threshold at an empty bin would be infinitely bad
Range = tuple[float, float]


def by_max(seen: Observed, bits: int) -> Range:
    """Everything that was seen."""
    return min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)


def by_percentile(seen: Observed, bits: int, share: float = PERCENTILE) -> Range:
    """The range that leaves out (1 - `share`) of the values at each end, to a bin of the histogram."""
    low, high = by_max(seen, bits)
    counts, edges = _whole(seen)
    below = np.cumsum(counts) / max(counts.sum(), 1)
    first = int(np.searchsorted(below, 1 - share, side="right"))
    last = int(np.searchsorted(below, share, side="left"))
    return min(max(low, float(edges[first])), 0.0), max(min(high, float(edges[last + 1])), 0.0)


def by_mse(seen: Observed, bits: int) -> Range:
    """The range with the least mean squared error among shares of what was seen, of each end apart.

    Inside a range of step s the error of rounding is s**2 / 12 (Bennett 1948); outside it is the distance to the end.
    Choi et al. 2018 (arXiv 1805.06085) and Banner et al. 2019 (arXiv 1810.05723) minimise the same sum.
    """
    low, high = by_max(seen, bits)
    counts, edges = _whole(seen)
    centres = (edges[:-1] + edges[1:]) / 2
    shares = np.linspace(_LEAST_SHARE, 1, _SHARES)
    lows, highs = low * shares, high * shares
    cut_low = _beyond(counts, -centres, -lows)
    cut_high = _beyond(counts, centres, highs)
    steps = (highs[None] - lows[:, None]) / (2**bits - 1)
    total = cut_low[:, None] + cut_high[None] + counts.sum() * steps**2 / 12
    best = np.unravel_index(int(total.argmin()), total.shape)
    return float(lows[best[0]]), float(highs[best[1]])


def by_entropy(seen: Observed, bits: int) -> Range:
    """The symmetric threshold whose clipped histogram of |x| keeps most information (Migacz 2017, "8-bit inference with
    TensorRT"): least Kullback-Leibler divergence between it and the same in 2**(bits - 1) levels."""
    low, high = by_max(seen, bits)
    counts, edges = _whole(seen)
    half = BINS // 2
    sizes = (counts[half:] + counts[:half][::-1]).astype(np.float64)
    levels = 2 ** (bits - 1)
    legal = range(min(_LEAST_BINS, levels), half + 1)
    best = min(legal, key=lambda size: _divergence(sizes, size, levels))
    threshold = float(edges[half + best])
    return max(low, -threshold), min(high, threshold)


def by_steps(seen: Observed, bits: int, share: float = 1.0, as_released: bool = False) -> Range:
    """The narrowest step's range, of the first `share` of the steps: the mean of max |x| over what was drawn.

    That is "min-mean" of NVIDIA's ModelOpt. as_released: its released code divides the sum over what was drawn by the
    number of steps, so that the range depends on how many batches were drawn.
    """
    low, high = by_max(seen, bits)
    first = max(1, round(share * seen.calls))
    divisor = seen.calls if as_released else seen.count[:first]
    threshold = float((seen.peaks[:first] / divisor).min())
    return max(low, -threshold), min(high, threshold)


METHODS: Mapping[str, Callable[[Observed, int], Range]] = {
    "max": by_max,
    "percentile": by_percentile,
    "mse": by_mse,
    "entropy": by_entropy,
    "min-mean": by_steps,
}


def affine(found: Range, bits: int) -> Affine:
    """Unsigned codes of `bits` bits for a range that holds 0, which has a code of its own (Jacob et al. 2018, arXiv
    1712.05877, equation 1)."""
    low, high = found
    most = 2**bits - 1
    scale = np.float32((high - low) / most)
    if scale < np.finfo(np.float32).tiny:
        return Affine(1.0, 0, bits)
    return Affine(float(scale), int(np.clip(np.rint(-low / scale), 0, most)), bits)


def _whole(seen: Observed) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The histogram of all steps, each of equal weight since each was seen as often, and the edges of its bins."""
    return seen.counts.sum(axis=0), np.linspace(-(2.0**seen.edge), 2.0**seen.edge, BINS + 1)


def _beyond(counts: NDArray[np.int64], values: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of squared distances of `values` beyond each of `ends`."""
    distances = np.maximum(values[None] - ends[:, None], 0)
    total: NDArray[np.float64] = (distances**2 * counts[None]).sum(axis=1)
    return total


def _divergence(sizes: NDArray[np.float64], size: int, levels: int) -> float:
    """KL divergence of the first `size` bins, with all others in the last one, from themselves in `levels` levels."""
    clipped = sizes[:size].copy()
    groups = np.arange(size) * levels // size if size > levels else np.arange(size)
    filled = clipped > 0
    totals = np.bincount(groups, clipped, levels)
    sharers = np.maximum(np.bincount(groups, filled, levels), 1)
    approximate = np.where(filled, totals[groups] / sharers[groups], 0)
    clipped[-1] += sizes[size:].sum()
    p, q = _smooth(clipped), _smooth(approximate)
    return float((p * np.log(p / q)).sum())


def _smooth(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares in which no bin is empty: a bin that has nothing gets _LITTLE of what an even share would be."""
    shares = sizes / max(sizes.sum(), 1) + _LITTLE / len(sizes)
    even: NDArray[np.float64] = shares / shares.sum()
    return even
