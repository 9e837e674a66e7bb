"""Allocation by rank: the published rule by hand, and the released code's faults lead to the public 224M model."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.compression.interior import CROSS, RESIDUAL, SELF, Layer, layers, widths_for
from diffship.compression.narrow import Kept, narrow_unet
from diffship.compression.ranks import published, released
from diffship.core.errors import ConfigError
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.layouts import find_layout, layout_widths
from diffship.models.sources.opening import open_source


@pytest.fixture(scope="module")
def bk_tiny() -> Pipeline:
    return open_source("arch:bk-tiny")


@pytest.fixture(scope="module")
def listed(bk_tiny: Pipeline) -> tuple[Layer, ...]:
    return layers(bk_tiny.components["unet"])


def made_scores(listed: tuple[Layer, ...]) -> dict[str, float]:
    """Scores whose ranking explains the public model: 19 layers at a quarter, two at a half, six at three quarters.

    Of self-attention the first layer of the model ranks last, so that the ratio of the one ranked first, which is
    written to it, stays.
    """
    residual, own, cross = ([layer.name for layer in listed if layer.kind == kind] for kind in (RESIDUAL, SELF, CROSS))
    order = [*(own[i] for i in (4, 5, 7, 8, 1)), *cross, *residual[3:8]]
    order += [own[6], own[2]]
    order += [own[3], own[0], *residual[:3], residual[8]]
    return {name: float(rank) for rank, name in enumerate(order)}


def test_the_released_code_makes_the_public_model(bk_tiny: Pipeline, listed: tuple[Layer, ...]) -> None:
    assert [sum(layer.kind == kind for layer in listed) for kind in (RESIDUAL, SELF, CROSS)] == [9, 9, 9]
    counts = released(listed, made_scores(listed), noise=1000.0, ranks=(19, 21))
    widths = widths_for(listed, counts)
    assert widths == layout_widths(find_layout("hybrid-224m"), bk_tiny.components["unet"].config)
    kept = Kept(
        {name: np.arange(count) for name, count in widths.inner.items()},
        {name: np.arange(count) for name, count in widths.heads.items()},
    )
    small = narrow_unet(bk_tiny, kept, {"pass": "test"})
    assert small.history[-1]["parameters"] == 224_492_676
    module = small.components["unet"].meta
    assert sum(parameter.numel() for parameter in module.parameters()) == 224_492_676


def test_the_block_that_does_not_exist_takes_a_rank(listed: tuple[Layer, ...]) -> None:
    scores = made_scores(listed)
    assert released(listed, scores, 1000.0, (19, 21)) != released(listed, scores, -1.0, (19, 21))


def test_as_published_it_narrows_what_matters_least(listed: tuple[Layer, ...]) -> None:
    scores = made_scores(listed)
    counts = published(listed, scores, (19, 21))
    order = sorted(listed, key=lambda layer: scores[layer.name])
    for rank, layer in enumerate(order):
        ratio = 0.25 if rank < 19 else 0.5 if rank < 21 else 0.75
        by_hand = int(layer.size * ratio) if layer.kind != RESIDUAL else -(-int(layer.size * ratio) // 32) * 32
        assert counts[layer.name] == by_hand, layer.name
    cross = [counts[layer.name] for layer in listed if layer.kind == CROSS]
    assert cross == [2] * 9, "quirk 1 would have left all of them whole"


@pytest.mark.parametrize("ranks", [(21, 19), (0, 28)])
def test_ranks_that_do_not_fit_are_refused(listed: tuple[Layer, ...], ranks: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="there are 27 layers to rank"):
        published(listed, made_scores(listed), ranks)


def test_what_is_never_written_keeps_a_half() -> None:
    """With the first layer ranked first, the last-ranked one is never written: that is how the index is wrong."""
    heads = [Layer(f"a{i}.attn1", SELF, 8, 1, 1) for i in range(3)]
    counts = released(heads, {"a0.attn1": 0.0, "a1.attn1": 1.0, "a2.attn1": 2.0}, noise=9.0, ranks=(0, 0))
    assert counts == {"a0.attn1": 6, "a1.attn1": 6, "a2.attn1": 4}
