"""Ranges from planted histograms and planted steps, against closed forms and an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.calibration.observed import BINS, Observed, Seen, edge_of, join, note, nothing, widened
from diffship.calibration.ranges import METHODS, affine, by_entropy, by_max, by_mse, by_percentile, by_steps
from diffship.core.precision import Affine


def seen(values: np.ndarray, edge: int | None = None) -> Seen:
    """One input of one channel."""
    low, high = float(values.min()), float(values.max())
    found = edge_of(max(abs(low), abs(high))) if edge is None else edge
    counts = np.histogram(values, BINS, (-(2.0**found), 2.0**found))[0].astype(np.int64)
    rows = values[:4].reshape(-1, 1).astype(np.float32)
    return Seen(
        low, high, found, counts, np.abs(values).max(keepdims=True).astype(np.float32), rows, np.arange(len(rows)) / 4
    )


def observed(*steps: np.ndarray) -> Observed:
    total = nothing(len(steps), 1)
    for call, values in enumerate(steps):
        note(total, call, seen(values))
    return total


NORMAL = np.random.default_rng(1).normal(size=200_000)


def test_max_holds_zero() -> None:
    assert by_max(observed(np.array([1.0, 3.0]), np.array([2.0, 2.5])), 8) == (0.0, 3.0)
    assert by_max(observed(np.array([-3.0, -1.0])), 8) == (-3.0, 0.0)


def test_percentile_is_that_of_the_values() -> None:
    planted = np.append(NORMAL, 100.0)
    low, high = by_percentile(observed(planted), 8, 0.999)
    width = 2 * 128 / BINS
    assert high == pytest.approx(np.quantile(planted, 0.999), abs=width)
    assert low == pytest.approx(np.quantile(planted, 0.001), abs=width)
    assert by_max(observed(planted), 8)[1] == 100


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_finds_what_rounding_every_value_finds(bits: int) -> None:
    planted = np.append(NORMAL[:20_000], 8.0)
    low, high = by_mse(observed(planted), bits)

    def error(low: float, high: float) -> float:
        codes = affine((low, high), bits)
        rounded = np.clip(np.rint(planted / codes.scale) + codes.zero, 0, 2**bits - 1)
        return float((((rounded - codes.zero) * codes.scale - planted) ** 2).mean())

    best = min(error(-a, b) for a in np.linspace(0.5, 5, 19) for b in np.linspace(0.5, 8, 31))
    assert error(low, high) <= 1.05 * best
    assert error(low, high) < (0.5 if bits == 4 else 0.97) * error(*by_max(observed(planted), bits))


def test_mse_of_four_bits_clips_a_normal_where_banner_et_al_do() -> None:
    """Banner et al. 2019, table 1 of section 3: 2.55 standard deviations for 4 bits (2**4 levels, symmetric)."""
    low, high = by_mse(observed(NORMAL), 4)
    assert high == pytest.approx(2.55, abs=0.15) and low == pytest.approx(-2.55, abs=0.15)


def test_entropy_leaves_a_far_outlier_out_and_keeps_a_uniform() -> None:
    low, high = by_entropy(observed(np.append(NORMAL, 60.0)), 8)
    assert high == 16 and -16 < low < -3  # 128 bins of the 512 that reach to 64, the least that the method tries
    flat = np.linspace(-1, 1, 100_000)
    assert by_entropy(observed(flat), 8) == pytest.approx((-1, 1), abs=0.01)


def test_steps_take_the_narrowest_mean() -> None:
    total = nothing(4, 1)
    for peaks in ((8.0, 4.0, 2.0, 5.0), (6.0, 2.0, 4.0, 5.0)):
        for call, peak in enumerate(peaks):
            note(total, call, seen(np.array([-peak, peak / 2])))
    assert by_steps(total, 8) == (-3.0, 3.0)  # means 7, 3, 3, 5
    assert by_steps(total, 8, share=0.25) == (-7.0, 4.0)
    assert by_steps(total, 8, as_released=True) == (-1.5, 1.5)  # 6 over four steps, where 6 over two inputs is meant


def test_codes_of_a_range() -> None:
    codes = affine((-1.0, 3.0), 8)
    assert codes.scale == pytest.approx(4 / 255) and codes.zero == 64
    assert affine((0.0, 0.0), 8).scale == 1.0
    assert affine((0.0, 65535.0), 16) == Affine(1.0, 0, 16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_range_for_odd_inputs(method: str) -> None:
    for values in (np.zeros(8), np.full(8, 1e-30), np.array([3e38, *np.zeros(7)]), np.array([-1.0] * 8)):
        low, high = METHODS[method](observed(values), 8)
        assert np.isfinite([low, high]).all() and low <= 0 <= high
        assert affine((low, high), 8).scale > 0


def test_pieces_join_to_the_whole_in_any_order() -> None:
    parts = [observed(NORMAL[i::3] * 3**i, NORMAL[i::3]) for i in range(3)]
    whole = observed(np.concatenate([NORMAL[i::3] * 3**i for i in range(3)]), NORMAL)
    for order in ((0, 1, 2), (2, 1, 0)):
        total = nothing(2, 1)
        for index in order:
            join(total, parts[index])
        assert np.array_equal(total.low, whole.low) and np.array_equal(total.high, whole.high)
        assert total.edge == whole.edge and total.counts.sum() == whole.counts.sum()
        assert np.array_equal(total.count, [3, 3])
        assert np.abs(np.cumsum(total.counts, 1) - np.cumsum(whole.counts, 1)).max() <= 1
    assert not widened(whole.counts, 3)[..., : BINS // 4].any()
