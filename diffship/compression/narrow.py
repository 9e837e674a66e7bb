"""Narrow the interiors of residual blocks and attention layers: what stays is what has the largest weights.

Hybrid SD (arXiv 2408.06646) keeps the filters of the first convolution with the largest L2 norm, and the *first* heads;
here heads too are kept by their norm. Inputs and outputs of a layer never change, so neighbours are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.core.weights import Weights, taken, to_float32
from diffship.models.widths import Widths

Indices = NDArray[np.intp]
Cuts = dict[str, Mapping[int, Indices]]


def narrowed(weights: Weights, widths: Widths, head_counts: Mapping[str, int]) -> Weights:
    """`weights` of a U-Net cut to `widths`; `head_counts` has the heads that each attention layer has now.

    Raises:
        ConfigError: a layer would become wider than it is.
    """
    cuts: Cuts = {}
    for name, inner in widths.inner.items():
        cuts |= _resnet_cuts(weights, name, inner)
    for name, heads in widths.heads.items():
        cuts |= _attention_cuts(weights, name, heads, head_counts[name])
    return taken(weights, cuts)


def _resnet_cuts(weights: Weights, name: str, inner: int) -> Cuts:
    filters = _float(weights, f"{name}.conv1.weight")
    kept = _largest(np.sqrt(np.square(filters).sum((1, 2, 3), dtype=np.float64)), inner, name)
    cuts: Cuts = {f"{name}.{part}": {0: kept} for part in _present(weights, name, _RESNET)}
    return {**cuts, f"{name}.conv2.weight": {1: kept}}


_RESNET = ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias", "norm2.weight", "norm2.bias")
_HEADS = tuple(f"to_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias"))


def _attention_cuts(weights: Weights, name: str, heads: int, count: int) -> Cuts:
    norms = head_norms(weights, name, count)
    kept = _largest(norms, heads, name)
    rows = _rows(kept, weights.meta(f"{name}.to_q.weight").shape[0] // count)
    cuts: Cuts = {f"{name}.{part}": {0: rows} for part in _present(weights, name, _HEADS)}
    return {**cuts, f"{name}.to_out.0.weight": {1: rows}}


def head_norms(weights: Weights, name: str, count: int) -> NDArray[np.float64]:
    """(heads,) L2 norm of all weights of each head: rows of q, k and v, columns of the output."""
    total = np.zeros(count)
    for part in ("to_q", "to_k", "to_v"):
        total += np.square(_float(weights, f"{name}.{part}.weight"), dtype=np.float64).reshape(count, -1).sum(1)
    out = _float(weights, f"{name}.to_out.0.weight")
    total += np.square(out.T, dtype=np.float64).reshape(count, -1).sum(1)
    return np.sqrt(total)


def _rows(heads: Indices, width: int) -> Indices:
    return (heads[:, None] * width + np.arange(width)).ravel()


def _largest(scores: NDArray[np.float64], count: int, name: str) -> Indices:
    """Indices of the `count` largest, in their old order; of equal ones the first."""
    if not 1 <= count <= len(scores):
        raise ConfigError(f"{name} has {len(scores)}; it cannot have {count}")
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _present(weights: Weights, name: str, parts: tuple[str, ...]) -> list[str]:
    known = set(weights.names())
    return [part for part in parts if f"{name}.{part}" in known]


def _float(weights: Weights, name: str) -> NDArray[np.float32]:
    return to_float32(weights.read(name), weights.meta(name).dtype)
