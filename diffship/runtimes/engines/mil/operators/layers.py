"""Products: convolutions, matrix products, einsum, attention; and pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.mil.operators.normal import softmax
from diffship.runtimes.engines.mil.operators.table import Array, bounded_shape, ints, operator

_F = np.float32


@operator("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    found = x @ weight.T
    return found if bias is None else found + bias


@operator("matmul")
def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    return np.matmul(np.swapaxes(x, -1, -2) if transpose_x else x, np.swapaxes(y, -1, -2) if transpose_y else y)


@operator("conv")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    pad_type: Any = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """x: (batch, channels, sizes...); weight: (outputs, channels / groups, kernel...).

    A matrix product for each place of the kernel: it takes no memory for windows.
    """
    kernel = weight.shape[2:]
    steps, spread = _ones(strides, kernel), _ones(dilations, kernel)
    x = _padded(x, kernel, steps, spread, str(pad_type), pad, 0.0)
    parts, batch = int(groups), len(x)
    sizes = _sizes(x, kernel, steps, spread)
    weights = weight.reshape(parts, -1, *weight.shape[1:])
    found = np.zeros((batch, parts, weights.shape[1], math.prod(sizes)), _F)
    for place, window in _windows(x, kernel, steps, spread, sizes):
        found += weights[(..., *place)] @ window.reshape(batch, parts, -1, math.prod(sizes))
    found = found.reshape(batch, -1, *sizes)
    return found if bias is None else found + bias.reshape(1, -1, *[1] * len(kernel))


@operator("max_pool")
def max_pool(
    x: Array, kernel_sizes: Any, strides: Any = None, pad_type: Any = "valid", pad: Any = None, ceil_mode: Any = False
) -> Array:
    return np.maximum.reduce(_pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -np.inf))


@operator("avg_pool")
def avg_pool(
    x: Array,
    kernel_sizes: Any,
    strides: Any = None,
    pad_type: Any = "valid",
    pad: Any = None,
    ceil_mode: Any = False,
    exclude_padding_from_average: Any = False,
) -> Array:
    options = (kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    total = np.add.reduce(_pooled(x, *options))
    if not exclude_padding_from_average:
        return total / _F(math.prod(ints(kernel_sizes)))
    return total / np.add.reduce(_pooled(np.ones_like(x), *options))


@operator("einsum")
def einsum(values: Sequence[Array], equation: Any) -> Array:
    """Two tensors, as one matrix product over the letters that both have."""
    left, right, out = str(equation).replace("->", ",").split(",")
    x, y = values
    shared = [letter for letter in left if letter in right]
    batch = [letter for letter in shared if letter in out]
    summed = [letter for letter in shared if letter not in out]
    rows, columns = ([letter for letter in side if letter not in shared] for side in (left, right))
    if set(out) != {*batch, *rows, *columns} or len({*left}) < len(left) or len({*right}) < len(right):
        raise UnsupportedError(f"einsum {str(equation)[:80]!r}: a letter is summed over in one tensor alone")
    sizes = dict(zip(left + right, x.shape + y.shape, strict=True))
    a = np.transpose(x, [left.index(n) for n in (*batch, *rows, *summed)])
    b = np.transpose(y, [right.index(n) for n in (*batch, *summed, *columns)])
    lengths = [[sizes[n] for n in names] for names in (batch, rows, summed, columns)]
    heads, height, depth, width = lengths
    product = a.reshape(*heads, math.prod(height), math.prod(depth)) @ b.reshape(
        *heads, math.prod(depth), math.prod(width)
    )
    order = [*batch, *rows, *columns]
    return np.transpose(product.reshape(*heads, *height, *width), [order.index(letter) for letter in out])


@operator("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Vaswani et al. 2017 (arXiv 1706.03762), equation 1; the mask is added, or true where a key is seen."""
    scores = query @ np.swapaxes(key, -1, -2) / _F(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores) @ value


def _pooled(
    x: Array, kernel_sizes: Any, strides: Any, pad_type: Any, pad: Any, ceil_mode: Any, empty: float
) -> list[Array]:
    """`x` at each place of the kernel."""
    if ceil_mode:
        raise UnsupportedError("pooling with ceil_mode is not computed here")
    kernel = tuple(ints(kernel_sizes))
    steps, spread = _ones(strides, kernel), [1] * len(kernel)
    x = _padded(x, kernel, steps, spread, str(pad_type), pad, empty)
    return [window for _, window in _windows(x, kernel, steps, spread, _sizes(x, kernel, steps, spread))]


def _ones(values: Any, kernel: Sequence[int]) -> list[int]:
    return [1] * len(kernel) if values is None else ints(values)


def _sizes(x: Array, kernel: Sequence[int], steps: Sequence[int], spread: Sequence[int]) -> list[int]:
    """Sizes of what a kernel without padding gives."""
    axes = zip(x.shape[2:], kernel, steps, spread, strict=True)
    return [(size - wide * (k - 1) - 1) // step + 1 for size, k, step, wide in axes]


def _windows(
    x: Array, kernel: Sequence[int], steps: Sequence[int], spread: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """(place in the kernel, what it meets there) for each place."""
    for place in np.ndindex(*kernel):
        axes = zip(place, steps, spread, sizes, strict=True)
        cuts = [slice(at * wide, at * wide + step * (count - 1) + 1, step) for at, step, wide, count in axes]
        yield place, x[(slice(None), slice(None), *cuts)]


def _padded(
    x: Array,
    kernel: Sequence[int],
    steps: Sequence[int],
    spread: Sequence[int],
    pad_type: str,
    pad: Any,
    empty: float,
) -> Array:
    """`x` with borders of `empty`: as many as `pad` says, or those that keep a size ("same": more at the end)."""
    if pad_type == "valid":
        return x
    if pad_type == "custom":
        pairs = np.asarray(pad).reshape(-1, 2).tolist()
    elif pad_type in ("same", "same_lower"):
        axes = zip(x.shape[2:], kernel, steps, spread, strict=True)
        totals = [max(0, (-(-size // step) - 1) * step + wide * (k - 1) + 1 - size) for size, k, step, wide in axes]
        pairs = [sorted((n // 2, n - n // 2), reverse=pad_type == "same_lower") for n in totals]
    else:
        raise UnsupportedError(f"the padding {pad_type[:40]!r}; legal: valid, custom, same, same_lower")
    bounded_shape([*x.shape[:2], *(n + a + b for n, (a, b) in zip(x.shape[2:], pairs, strict=True))])
    return np.pad(x, [(0, 0), (0, 0), *pairs], constant_values=_F(empty)) if np.any(pairs) else x
