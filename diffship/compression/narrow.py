"""Narrow the interiors of residual blocks, attention and feed-forward layers: cut to what is kept, by layer.

Hybrid SD (arXiv 2408.06646) keeps the filters of the first convolution with the largest L2 norm, and the *first* heads;
`by_norm` keeps heads by their norm, too. Inputs and outputs of a layer never change, so neighbours are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.core.weights import Weights, count_parameters, taken, to_float32
from diffship.models.assemble import with_denoiser
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.widths import PARTS, Widths, widths_now, widths_of, with_widths

Indices = NDArray[np.intp]
Scores = NDArray[np.float64]
Cuts = dict[str, Mapping[int, Indices]]


@dataclass(frozen=True)
class Kept:
    """What stays, by layer name, ascending: channels inside residual blocks, heads of attention layers, channels inside
    feed-forward layers. Layers that are not named stay whole."""

    inner: Mapping[str, Indices] = field(default_factory=dict)
    heads: Mapping[str, Indices] = field(default_factory=dict)
    feedforward: Mapping[str, Indices] = field(default_factory=dict)

    @property
    def widths(self) -> Widths:
        sides = (self.inner, self.heads, self.feedforward)
        return Widths(*({name: len(index) for name, index in side.items()} for side in sides))


def interiors(component: Component) -> Widths:
    """Every layer of a U-Net that can be narrowed, with its present size."""
    return widths_now(component.meta.get_submodule("inner"))


def narrow_unet(pipeline: Pipeline, kept: Kept, entry: Mapping[str, Any]) -> Pipeline:
    """`pipeline` with its U-Net cut to what is kept; tensors are cut when they are read. `entry` goes into its history.

    Raises:
        ConfigError: a layer does not exist, or would keep none or more than it has.
    """
    old = pipeline.denoiser
    weights = cut(old.weights, kept, interiors(old).heads)
    entry = {**entry, "parameters_before": old.parameters, "parameters": count_parameters(weights)}
    config = with_widths(old.config, kept.widths.over(widths_of(old.config)))
    return with_denoiser(pipeline, config, weights, entry)


def by_norm(weights: Weights, widths: Widths, head_counts: Mapping[str, int]) -> Kept:
    """The parts of each layer with the largest weights; `head_counts` has the heads that attention layers have now.

    Raises:
        ConfigError: a layer would become wider than it is.
    """
    return Kept(
        {name: largest(filter_norms(weights, name), count, name) for name, count in widths.inner.items()},
        {
            name: largest(head_norms(weights, name, head_counts[name]), count, name)
            for name, count in widths.heads.items()
        },
        {name: largest(feedforward_norms(weights, name), count, name) for name, count in widths.feedforward.items()},
    )


def first(widths: Widths) -> Kept:
    """The first channels and heads of each layer: for shapes, before any tensor is read."""
    sides = (widths.inner, widths.heads, widths.feedforward)
    return Kept(*({name: np.arange(count) for name, count in side.items()} for side in sides))


def cut(weights: Weights, kept: Kept, head_counts: Mapping[str, int]) -> Weights:
    """`weights` of a U-Net, cut to what is kept when they are read.

    Raises:
        ConfigError: a layer does not exist, or would keep none or more than it has.
    """
    cuts: Cuts = {}
    for name, index in kept.inner.items():
        channels = _legal(index, _size(weights, f"{name}.conv1.weight", 0), name)
        cuts |= _cuts(weights, "inner", name, channels, channels)
    for name, index in kept.heads.items():
        cuts |= _attention_cuts(weights, name, index, head_counts.get(name, 0))
    for name, index in kept.feedforward.items():
        cuts |= _feedforward_cuts(weights, name, index, _size(weights, f"{name}.net.2.weight", 1))
    return taken(weights, cuts)


def _size(weights: Weights, name: str, axis: int) -> int:
    return weights.meta(name).shape[axis]


def _legal(index: Indices, size: int, name: str) -> Indices:
    if not size:
        raise ConfigError(f"{name} is no layer that can be narrowed")
    if not len(index) or len(index) > size or np.any(np.diff(index) <= 0) or index[0] < 0 or index[-1] >= size:
        raise ConfigError(f"{name} has {size}; it cannot keep {len(index)} of them as asked")
    return index


def _cuts(weights: Weights, kind: str, name: str, rows: Indices, columns: Indices) -> Cuts:
    parts, known = PARTS[kind], set(weights.names())
    tensors = (f"{name}.{part}.{leaf}" for part in parts.writers for leaf in ("weight", "bias"))
    written: Cuts = {tensor: {0: rows} for tensor in tensors if tensor in known}
    return {**written, f"{name}.{parts.reader}.weight": {1: columns}}


def _attention_cuts(weights: Weights, name: str, kept: Indices, count: int) -> Cuts:
    rows = _rows(_legal(kept, count, name), _size(weights, f"{name}.to_q.weight", 0) // max(1, count))
    return _cuts(weights, "heads", name, rows, rows)


def _feedforward_cuts(weights: Weights, name: str, kept: Indices, size: int) -> Cuts:
    both = np.concatenate([_legal(kept, size, name), kept + size])  # values and their gates
    return _cuts(weights, "feedforward", name, both, kept)


def filter_norms(weights: Weights, name: str) -> Scores:
    """(channels,) L2 norm of each filter of a residual block's first convolution."""
    squares = np.square(_float(weights, f"{name}.conv1.weight"), dtype=np.float64)
    return np.asarray(np.sqrt(squares.sum((1, 2, 3))))


def head_norms(weights: Weights, name: str, count: int) -> Scores:
    """(heads,) L2 norm of all weights of each head: rows of q, k and v, columns of the output."""
    total = np.zeros(count)
    for part in ("to_q", "to_k", "to_v"):
        total += np.square(_float(weights, f"{name}.{part}.weight"), dtype=np.float64).reshape(count, -1).sum(1)
    out = _float(weights, f"{name}.to_out.0.weight")
    total += np.square(out.T, dtype=np.float64).reshape(count, -1).sum(1)
    return np.asarray(np.sqrt(total))


def feedforward_norms(weights: Weights, name: str) -> Scores:
    """(channels,) L2 norm of all weights of each inner channel: its value row, its gate row, its output column."""
    rows = np.square(_float(weights, f"{name}.net.0.proj.weight"), dtype=np.float64).sum(1).reshape(2, -1).sum(0)
    columns = np.square(_float(weights, f"{name}.net.2.weight"), dtype=np.float64).sum(0)
    return np.asarray(np.sqrt(rows + columns))


def _rows(heads: Indices, width: int) -> Indices:
    return (heads[:, None] * width + np.arange(width)).ravel()


def largest(scores: Scores, count: int, name: str) -> Indices:
    """Indices of the `count` largest, in their old order; of equal ones the first.

    Raises:
        ConfigError: `count` is not between 1 and their number; `name` says of what.
    """
    if not 1 <= count <= len(scores):
        raise ConfigError(f"{name} has {len(scores)}; it cannot have {count}")
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _float(weights: Weights, name: str) -> NDArray[np.float32]:
    return to_float32(weights.read(name), weights.meta(name).dtype)
