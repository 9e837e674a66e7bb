"""Reductions and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diffship.runtimes.engines.mil.operators.table import OPERATORS, Array, ints, operator

_F = np.float32


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    def run(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        return np.asarray(function(x, axis=None if axes is None else tuple(ints(axes)), keepdims=bool(keep_dims)))

    return run


def _square_sum(x: Array, **where: Any) -> Array:
    return np.sum(x * x, **where)


def _l2(x: Array, **where: Any) -> Array:
    return np.sqrt(_square_sum(x, **where))


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "reduce_mean": np.mean, "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_sum_square": _square_sum, "reduce_l2_norm": _l2,
}  # fmt: skip
OPERATORS.update({name: _reduction(function) for name, function in _REDUCTIONS.items()})


@operator("reduce_argmax")
def reduce_argmax(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: Any = "int32") -> Array:
    """The first of equal values."""
    return np.asarray(np.argmax(x, int(axis), keepdims=bool(keep_dims))).astype(np.int32)


@operator("reduce_argmin")
def reduce_argmin(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: Any = "int32") -> Array:
    """The first of equal values."""
    return np.asarray(np.argmin(x, int(axis), keepdims=bool(keep_dims))).astype(np.int32)


@operator("softmax")
def softmax(x: Array, axis: Any = -1) -> Array:
    powers = np.exp(x - x.max(int(axis), keepdims=True))
    return powers / powers.sum(int(axis), keepdims=True)


@operator("layer_norm")
def layer_norm(
    x: Array, axes: Any, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    """Ba et al. 2016 (arXiv 1607.06450); gamma and beta have the shape of the normalized axes."""
    places = sorted(axis % x.ndim for axis in ints(axes))
    shape = [size if i in places else 1 for i, size in enumerate(x.shape)]
    found = _normalized(x, tuple(places), epsilon)
    found = found if gamma is None else found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


@operator("instance_norm")
def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5) -> Array:
    """Ulyanov et al. 2016 (arXiv 1607.08022) over all axes after the channels."""
    found = _normalized(x, tuple(range(2, x.ndim)), epsilon)
    return _by_channel(found, gamma, beta)


@operator("batch_norm")
def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    """Ioffe and Szegedy 2015 (arXiv 1502.03167), with the mean and variance that are given."""
    scale = 1 / np.sqrt(variance + _F(epsilon))
    return _by_channel(_by_channel(x, None, -mean), scale if gamma is None else scale * gamma, beta)


def _normalized(x: Array, axes: tuple[int, ...], epsilon: Any) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + _F(epsilon))


def _by_channel(x: Array, scale: Array | None, shift: Array | None) -> Array:
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = x if scale is None else x * scale.reshape(shape)
    return x if shift is None else x + shift.reshape(shape)
