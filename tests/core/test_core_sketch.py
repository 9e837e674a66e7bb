"""Sketches keep the energy of an error, tell one wrong element, and are the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from diffship.core.sketch import SIZE, sketch


def by_hand(name: str, values: np.ndarray) -> np.ndarray:
    """The definition, value by value."""
    stream = hashlib.shake_256(name.encode()).digest(len(values) // 8 + 1)
    out = np.zeros(SIZE)
    for i, value in enumerate(values):
        negative = stream[i // 8] >> (7 - i % 8) & 1
        out[i % SIZE] += -value if negative else value
    return out


def test_it_is_what_its_definition_says() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 1000)).astype(np.float32)
    assert np.allclose(sketch("a.out", values), by_hand("a.out", values.reshape(-1)), atol=1e-5)
    assert not np.allclose(sketch("b.out", values), sketch("a.out", values), atol=1e-3)


def test_small_tensors_are_kept_as_they_are() -> None:
    values = np.arange(SIZE, dtype=np.float32)
    assert np.array_equal(sketch("x", values.reshape(64, -1)), values)


@pytest.mark.parametrize("kind", ["noise", "offset", "rows exchanged"])
def test_the_energy_of_an_error_is_kept(kind: str) -> None:
    rng = np.random.default_rng(1)
    true = rng.standard_normal((2, 64, 40, 40)).astype(np.float32)
    wrong = {
        "noise": true + 1e-3 * rng.standard_normal(true.shape).astype(np.float32),
        "offset": true + np.float32(1e-3),
        "rows exchanged": true[:, :, ::-1],
    }[kind]
    energy = float(np.square(wrong - true, dtype=np.float64).sum())
    kept = float(np.square(sketch("x", wrong).astype(np.float64) - sketch("x", true)).sum())
    assert abs(10 * np.log10(kept / energy)) < 0.6


def test_one_wrong_element_shows() -> None:
    true = np.random.default_rng(2).standard_normal(100_000).astype(np.float32)
    wrong = true.copy()
    wrong[77_777] += 0.5
    assert abs(np.abs(sketch("x", wrong) - sketch("x", true)).max() - 0.5) < 1e-4
