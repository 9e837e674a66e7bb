"""Weights as integers against closed forms and a search over every code."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.calibration import packed
from diffship.calibration.packed import fitting, pack, packed_bytes
from diffship.core.precision import Packing

EIGHT, FOUR = Packing(8), Packing(4, 16)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def test_eight_bits_by_hand() -> None:
    made = pack(np.array([[1.27, -0.634, 0.0, 0.126], [0.0, 0.0, 0.0, 0.0]], np.float32), EIGHT)
    assert made.zeros is None and made.codes.dtype == np.int8
    assert made.codes.tolist() == [[127, -63, 0, 13], [0, 0, 0, 0]]
    assert np.allclose(made.scales, [[0.01], [1.0]])
    assert np.allclose(made.values(), [[1.27, -0.63, 0.0, 0.13], [0, 0, 0, 0]])


def test_four_bits_by_hand() -> None:
    row = np.array([*np.linspace(-0.5, 1.0, 16), *np.linspace(2.0, 5.0, 16)], np.float32)[None]
    made = pack(row, FOUR)
    assert made.zeros is not None
    assert np.allclose(made.scales, [[0.1, 5 / 15]]) and made.zeros.tolist() == [[5, 0]]
    assert made.codes[0, :16].tolist() == list(range(16))
    assert np.allclose(made.values()[0, :16], row[0, :16], atol=1e-6)
    assert made.codes[0, 16] == 6 and made.codes[0, -1] == 15  # 2 of 5, in fifteenths: ranges begin at 0


@pytest.mark.parametrize("packing", [EIGHT, FOUR], ids=["8", "4"])
def test_every_code_is_the_nearest_one(packing: Packing) -> None:
    weight = drawn(6, 4, 3, 4)
    made = pack(weight, packing)
    size = packing.block or 48
    legal = np.arange(-127, 128) if packing is EIGHT else np.arange(16)
    for row, values in enumerate(weight.reshape(6, -1)):
        for column, value in enumerate(values):
            block = column // size
            zero = 0 if made.zeros is None else int(made.zeros[row, block])
            grid = (legal - zero) * made.scales[row, block]
            assert abs(made.values()[row, column] - value) == pytest.approx(np.abs(grid - value).min(), abs=5e-7)
    assert not np.any(pack(weight * 0, packing).values())


def test_no_weight_is_too_large_or_too_small() -> None:
    weight = np.repeat(np.array([[3e38], [-3e38], [1e-45], [-1e-40]], np.float32), 16, 1)
    weight[:, 1] *= -1
    for packing in (EIGHT, FOUR):
        values = pack(weight, packing).values()
        assert np.isfinite(values).all()
        assert np.allclose(values, weight, rtol=0.08, atol=1e-38)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(7, 32)
    whole = pack(weight, FOUR)
    monkeypatch.setattr(packed, "_CHUNK", 64)
    pieces = pack(weight, FOUR)
    assert np.array_equal(pieces.codes, whole.codes) and np.array_equal(pieces.values(), whole.values())
    assert np.array_equal(pieces.scales, whole.scales)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((8, 128), Packing(4, 64)),
        ((8, 96), Packing(4, 32)),
        ((8, 16, 3, 3), Packing(4, 16)),
        ((8, 20), Packing(8)),
    ],
)
def test_blocks_divide_rows(shape: tuple[int, ...], found: Packing) -> None:
    asked = Packing(4, 64)
    assert fitting(asked, shape) == found and fitting(EIGHT, shape) == EIGHT
    made = pack(drawn(*shape), found)
    codes = -(-made.codes.size * found.bits // 8)
    zeros = 0 if made.zeros is None else -(-made.zeros.size // 2)
    assert packed_bytes(found, shape) == codes + made.scales.nbytes + zeros
