"""Palettes: a weight as indices of a few bits into a table of float16 values, found by k-means.

k-means in one dimension (Lloyd 1982, "Least squares quantization in PCM") over the distinct float16 values of a weight
and how often each occurs: at most 65,536 of them, whatever the size of the weight. It starts at the quantiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffship.core.dtype import FLOATS, TensorMeta, to_float32
from diffship.core.lazy import lazy
from diffship.core.weights import Derived, Weights

if TYPE_CHECKING:
    import coremltools
    import numpy as np
    from numpy.typing import NDArray
else:
    coremltools, np = lazy("coremltools"), lazy("numpy")

MIN_COUNT = 2048  # smaller weights stay as they are: coremltools' own limit, below which a table saves nothing
_ROUNDS = 40  # of Lloyd's iteration, which has settled long before


class Palettes(Derived):
    """Float weights of two axes or more as they come out of their palettes, in float16; others rounded to float16.

    bits: of an index. group: how many entries of the first axis (output channels) share a table; 0: all.
    """

    def __init__(self, weights: Weights, bits: int, group: int = 0) -> None:
        super().__init__(weights)
        self._bits, self._group = bits, group

    def meta(self, name: str) -> TensorMeta:
        meta = self._weights.meta(name)
        return TensorMeta("float16", meta.shape) if meta.dtype in FLOATS else meta

    def read(self, name: str) -> NDArray[np.generic]:
        meta, array = self._weights.meta(name), self._weights.read(name)
        if meta.dtype not in FLOATS:
            return array
        half = to_float32(array, meta.dtype).astype(np.float16)
        return clustered(half, self._bits, self._group) if takes_palette(name, meta.shape) else half


def takes_palette(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this name and shape gets a palette: those that are multiplied or looked up, and are large.

    Position embeddings are added, and coremltools has palettes for factors only.
    """
    return len(shape) > 1 and int(np.prod(shape)) > MIN_COUNT and not name.endswith("position_embedding.weight")


def groups(shape: tuple[int, ...], group: int) -> int:
    """How many tables a weight of this shape has: one if `group` is 0, or does not divide its first axis."""
    return shape[0] // group if group and shape[0] % group == 0 else 1


def clustered(array: NDArray[np.float16], bits: int, group: int = 0) -> NDArray[np.float16]:
    """`array` with at most 2**bits distinct values in each group of `group` entries of its first axis."""
    rows = array.reshape(groups(array.shape, group), -1)
    return np.stack([_clustered(row, 1 << bits) for row in rows]).reshape(array.shape)


def palette_bytes(shape: tuple[int, ...], bits: int, group: int = 0) -> int:
    """Bytes that a weight takes: its indices, packed, and its tables."""
    return -(-int(np.prod(shape)) * bits // 8) + groups(shape, group) * (2 << bits)


def palettize(model: Any, group: int) -> Any:
    """`model`, whose weights have few values already, with those weights as palettes; values do not change."""
    optimize = coremltools.optimize.coreml
    shared: dict[str, Any] = {"granularity": "per_grouped_channel", "group_size": group} if group else {}
    how = optimize.OpPalettizerConfig(mode="unique", weight_threshold=MIN_COUNT, **shared)
    return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=how))


def _clustered(row: NDArray[np.float16], count: int) -> NDArray[np.float16]:
    values, places, often = np.unique(row, return_inverse=True, return_counts=True)
    if len(values) <= count:
        return row
    table = _means(values.astype(np.float64), often.astype(np.float64), count).astype(np.float16)
    table = np.unique(table)
    nearest = table[np.searchsorted(_middles(table), values.astype(np.float64))]
    return nearest[places].reshape(row.shape)


def _means(values: NDArray[np.float64], often: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The centres of `count` clusters of sorted `values`, each of which occurs `often`; sums come from prefix sums."""
    total, mass = np.concatenate([[0.0], np.cumsum(often)]), np.concatenate([[0.0], np.cumsum(often * values)])
    levels = (np.arange(count) + 0.5) / count * total[-1]
    centres = np.unique(values[np.searchsorted(total[1:], levels)])
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(values, _middles(centres)), [len(values)]])
        sizes = np.diff(total[edges])
        moved = np.diff(mass[edges])[sizes > 0] / sizes[sizes > 0]
        if len(moved) == len(centres) and np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _middles(table: NDArray[Any]) -> NDArray[np.float64]:
    wide = table.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2
