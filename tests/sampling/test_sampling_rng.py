"""Noise against torch's own generator, and Philox's independence of order."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import ConfigError
from diffship.sampling.rng import Philox, TorchGenerator, TorchNoise, make_noise, torch_randn

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**40 + 123, 2**63 - 1)
SHAPES = ((1,), (15,), (16,), (17,), (31,), (32,), (3, 5), (4, 8, 8), (1, 4, 16, 17), (4, 64, 64), (100_003,))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_draw_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    assert np.abs(torch_randn(seed, shape) - expected).max() <= 5e-7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 70), min_size=1, max_size=12))
def test_successive_draws_equal_torch(seed: int, sizes: list[int]) -> None:
    theirs, ours = torch.Generator("cpu").manual_seed(seed), TorchGenerator(seed)
    for size in sizes:
        expected = torch.randn(size, generator=theirs).numpy()
        assert np.abs(ours.randn((size,)) - expected).max(initial=0.0) <= 5e-7


def test_state_travels_through_plain_data() -> None:
    generator = TorchGenerator(7)
    generator.randn((37,))
    generator.randn((3,))
    key, pos, spare = generator.state()
    key = np.array(json.loads(json.dumps(key.tolist())), np.uint32)
    copy = TorchGenerator.from_state(key, *json.loads(json.dumps([pos, spare])))
    for size in (5, 16, 1, 33):
        assert np.array_equal(copy.randn((size,)), generator.randn((size,)))


def test_drawing_leaves_the_source_as_it_was() -> None:
    noise = TorchNoise.seeded(3)
    first, after = noise.draw((4, 8, 8))
    again, _ = noise.draw((4, 8, 8))
    second, _ = after.draw((4, 8, 8))
    assert np.array_equal(first, again)
    both = TorchGenerator(3)
    assert np.array_equal(first, both.randn((4, 8, 8)))
    assert np.array_equal(second, both.randn((4, 8, 8)))


def test_philox_needs_no_earlier_step() -> None:
    noise = Philox(5, 2)
    third = noise.normal((4, 8, 8), 3)
    for step in range(3):
        _, same = noise.draw((4, 8, 8), step)
        assert same is noise
    assert np.array_equal(noise.draw((4, 8, 8), 3)[0], third)
    assert not np.array_equal(third, noise.normal((4, 8, 8), 4))
    assert not np.array_equal(third, Philox(5, 3).normal((4, 8, 8), 3))


def test_philox_is_standard_normal() -> None:
    drawn = Philox(1).normal((1_000_001,), 0).astype(np.float64)
    assert abs(drawn.mean()) < 0.005
    assert abs(drawn.std() - 1) < 0.005
    assert abs((drawn**4).mean() - 3) < 0.05
    assert abs(np.corrcoef(drawn[:-1:2], drawn[1::2])[0, 1]) < 0.005


def test_philox_words_are_philox4x64() -> None:
    """Known answer of Random123 for a zero key and counter, at numpy's first output (counter 1)."""
    words = np.random.Philox(counter=[0, 0, 0, 0], key=[0, 0]).random_raw(2)
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 1.0) / 2**32))
    angle = 2 * np.pi * (words & np.uint64(0xFFFFFFFF)) / 2**32
    expected = [radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])]
    assert np.allclose(Philox(0).normal((3,), 0), expected, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, float("nan"), "7"])
def test_seeds_out_of_range_are_refused(seed: object) -> None:
    for kind in ("torch", "philox"):
        with pytest.raises(ConfigError, match="seed"):
            make_noise(kind, seed)  # type: ignore[arg-type]


def test_a_wrong_state_is_refused() -> None:
    key, pos, spare = TorchGenerator(0).state()
    for bad in ((key[:-1], pos, spare), (key, 625, spare), (key, pos, float("nan")), (key.astype(np.int64), pos, None)):
        with pytest.raises(ConfigError):
            TorchGenerator.from_state(*bad)
    with pytest.raises(ConfigError, match="rng"):
        make_noise("mersenne", 1)
