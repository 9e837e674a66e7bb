"""Operations that move, join, cut or count elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.mil.operators.table import Array, bools, bounded_shape, ints, operator


@operator("reshape")
def reshape(x: Array, shape: Any) -> Array:
    """A size of 0 is that of `x` on the same axis, counted from the last one (1 beyond its axes); -1: what is left."""
    wanted = ints(shape)
    own = [1] * (len(wanted) - x.ndim) + list(x.shape[-len(wanted) :] if wanted else ())
    return x.reshape([own[i] if size == 0 else size for i, size in enumerate(wanted)])


@operator("transpose")
def transpose(x: Array, perm: Any) -> Array:
    return np.transpose(x, ints(perm))


@operator("expand_dims")
def expand_dims(x: Array, axes: Any) -> Array:
    return np.expand_dims(x, tuple(ints(axes)))


@operator("squeeze")
def squeeze(x: Array, axes: Any = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(ints(axes)))


@operator("concat")
def concat(values: Sequence[Array], axis: Any, interleave: Any = False) -> Array:
    if not interleave:
        return np.concatenate(values, int(axis))
    place = int(axis) % values[0].ndim
    stacked = np.stack(values, place + 1)
    return stacked.reshape(*stacked.shape[:place], -1, *stacked.shape[place + 2 :])


@operator("stack")
def stack(values: Sequence[Array], axis: Any) -> Array:
    return np.stack(values, int(axis))


@operator("split")
def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> list[Array]:
    if split_sizes is None:
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(ints(split_sizes))[:-1], int(axis))


@operator("slice_by_index")
def slice_by_index(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """`x[begin:end:stride]` on each axis; a mask leaves a side out, `squeeze_mask` takes one element, without axis."""
    first, last = bools(begin_mask, x.ndim), bools(end_mask, x.ndim)
    steps = [1] * x.ndim if stride is None else ints(stride)
    index: list[Any] = []
    for i, (low, high, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        if bools(squeeze_mask, x.ndim)[i]:
            index.append(low)
        else:
            index.append(slice(None if first[i] else low, None if last[i] else high, step))
    return np.asarray(x[tuple(index)])


@operator("slice_by_size")
def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    pairs = zip(ints(begin), ints(size), x.shape, strict=True)
    return x[tuple(slice(low, most if count == -1 else low + count) for low, count, most in pairs)]


@operator("gather")
def gather(x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    if int(batch_dims):
        raise UnsupportedError(f"gather with batch_dims {int(batch_dims)}; legal: 0")
    return np.take(x, indices.astype(np.int64), int(axis))


@operator("gather_nd")
def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    if int(batch_dims):
        raise UnsupportedError(f"gather_nd with batch_dims {int(batch_dims)}; legal: 0")
    return np.asarray(x[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))])


@operator("gather_along_axis")
def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


@operator("tile")
def tile(x: Array, reps: Any) -> Array:
    counts = ints(reps)
    bounded_shape([size * count for size, count in zip(x.shape, counts, strict=True)])
    return np.tile(x, counts)


@operator("fill")
def fill(shape: Any, value: Any = 0.0) -> Array:
    return np.full(bounded_shape(ints(shape)), value)


@operator("shape")
def shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


@operator("range_1d")
def range_1d(end: Any, start: Any, step: Any) -> Array:
    if step == 0:
        raise UnsupportedError("range_1d has a step of 0")
    bounded_shape([max(0, int((end - start) / step) + 1)])
    return np.arange(float(start), float(end), float(step)).astype(np.asarray(start).dtype)


@operator("pad")
def pad(x: Array, pad: Any, mode: Any = "constant", constant_val: Any = 0.0) -> Array:
    """`pad` holds (before, after) of the last axes."""
    pairs = np.asarray(pad).reshape(-1, 2).tolist()
    pairs = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    bounded_shape([size + before + after for size, (before, after) in zip(x.shape, pairs, strict=True)])
    if mode == "constant":
        return np.pad(x, pairs, constant_values=x.dtype.type(constant_val))
    if mode not in ("reflect", "replicate"):
        raise UnsupportedError(f"pad has the mode {str(mode)[:40]!r}; legal: constant, reflect, replicate")
    return np.pad(x, pairs, mode="reflect" if mode == "reflect" else "edge")


@operator("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    height, width = int(x.shape[-2] * float(scale_factor_height)), int(x.shape[-1] * float(scale_factor_width))
    return resize_nearest_neighbor(x, height, width)


@operator("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Array, target_size_height: Any, target_size_width: Any) -> Array:
    height, width = bounded_shape([int(target_size_height), int(target_size_width)])
    bounded_shape([*x.shape[:-2], height, width])
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), x.shape[-2:], strict=True))
    return x[..., rows, :][..., columns]
