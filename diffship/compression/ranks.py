"""Which layer keeps how much, by the rank of its score: Hybrid SD's one-shot allocation, as published and as released.

Published (Hybrid SD, arXiv 2408.06646): layers in ascending order of their score at ratio 0.5; the first `a` keep a
quarter, those up to `b` a half, the others three quarters. The released code does it differently in three ways, and the
public 224M model is made by that code; `released` repeats them:

1. Attention that would keep two heads or fewer is not narrowed at all, so the *least* significant attention layers of
   an 8-head model stay whole; residual blocks likewise stay whole at 64 channels or fewer.
2. The ratio of a self-attention layer goes to the self-attention layer ranked just before it (the first one's to the
   first layer of the model): an index is used before it is updated. What is never written keeps a half.
3. Residual blocks are counted one too far. The one that does not exist takes a rank, with the noise of sampling as its
   score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffship.compression.interior import CROSS, RESIDUAL, SELF, Layer
from diffship.core.errors import ConfigError

RATIOS = (0.25, 0.5, 0.75)
SCORED = 0.5
_MIN_HEADS, _MIN_CHANNELS, _RELEASED_STEP = 2, 64, 32


def published(layers: Sequence[Layer], scores: Mapping[str, float], ranks: tuple[int, int]) -> dict[str, int]:
    """{layer: what it keeps}, of a score for each layer and the ranks `(a, b)`.

    Raises:
        ConfigError: the ranks do not fit the number of layers.
    """
    check_ranks(ranks, len(layers))
    order = sorted(layers, key=lambda layer: scores[layer.name])
    return {layer.name: layer.kept(_ratio(rank, ranks)) for rank, layer in enumerate(order)}


def released(
    layers: Sequence[Layer], scores: Mapping[str, float], noise: float, ranks: tuple[int, int]
) -> dict[str, int]:
    """As `published`, with the three faults of the released code; `noise` is the score of the block that is not there.

    Raises:
        ConfigError: the ranks do not fit, or a layer is of a kind that the released code does not narrow.
    """
    check_ranks(ranks, len(layers) + 1)
    order = sorted([*layers, None], key=lambda layer: noise if layer is None else scores[layer.name])
    ratios = dict.fromkeys((layer.name for layer in layers), 0.5)
    written = next((layer.name for layer in layers if layer.kind == SELF), None)
    for rank, layer in enumerate(order):
        if layer is None:
            continue
        if layer.kind == SELF and written is not None:
            ratios[written] = _ratio(rank, ranks)
            written = layer.name
        else:
            ratios[layer.name] = _ratio(rank, ranks)
    return {layer.name: _released_kept(layer, ratios[layer.name]) for layer in layers}


def check_ranks(ranks: tuple[int, int], count: int) -> None:
    """Raises ConfigError unless `0 <= a <= b <= count`."""
    low, high = ranks
    if not 0 <= low <= high <= count:
        raise ConfigError(f"ranks are {low},{high}; there are {count} layers to rank: legal is 0 <= a <= b <= {count}")


def _ratio(rank: int, ranks: tuple[int, int]) -> float:
    return RATIOS[(rank >= ranks[0]) + (rank >= ranks[1])]


def _released_kept(layer: Layer, ratio: float) -> int:
    count = int(layer.size * ratio)
    if layer.kind in (SELF, CROSS):
        return layer.size if count <= _MIN_HEADS else count
    if layer.kind != RESIDUAL:
        raise ConfigError(f"{layer.name}: the released code narrows no {layer.kind} layers")
    width = -(-count // _RELEASED_STEP) * _RELEASED_STEP
    legal = _MIN_CHANNELS < width < layer.size and width % layer.step == 0
    return width if legal else layer.size
