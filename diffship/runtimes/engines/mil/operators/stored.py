"""Weights as they are stored: palettes, scaled integers, sparse ones. Computed once, when a file is opened."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.mil.operators.table import Array, bounded_shape, ints, operator
from diffship.targets.coreml.program import unpacked

_F = np.float32


@operator("constexpr_lut_to_dense")
def constexpr_lut_to_dense(indices: Array, lut: Array, shape: Any = None, vector_axis: Any = None) -> Array:
    """Indices into tables.

    Of iOS 16: `indices` are packed bytes, `lut` one table, `shape` that of the weight. Of iOS 18: `indices` have the
    weight's shape, `lut` is (groups on each axis..., entries, 1).
    """
    if shape is not None:
        sizes = bounded_shape(ints(shape))
        bits = int(len(lut) - 1).bit_length()
        return lut[unpacked(indices.reshape(-1).astype(np.uint8), bits, int(np.prod(sizes)))].reshape(sizes)
    if lut.shape[-1] != 1:
        raise UnsupportedError(f"a palette of vectors of {lut.shape[-1]} weights; legal: of single weights")
    tables = lut[..., 0]
    index: list[Array] = []
    for axis, (size, groups) in enumerate(zip(indices.shape, tables.shape[:-1], strict=True)):
        place = np.arange(size) * groups // size
        index.append(place.reshape([-1 if i == axis else 1 for i in range(indices.ndim)]))
    return tables[(*index, indices.astype(np.int64))]


@operator("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    """(q - zero_point) * scale; those two have no axes, or the size of `axis`."""
    shape = [-1 if i == int(axis) % quantized_data.ndim else 1 for i in range(quantized_data.ndim)]
    low, step = (part.reshape(shape) if part.ndim else part for part in (zero_point, scale))
    return (quantized_data.astype(_F) - low.astype(_F)) * step


@operator("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) * scale; a scale is of a block of equal size on each axis."""
    low = _F(0) if offset is None else _spread(offset.astype(_F), data.shape)
    return (data.astype(_F) - low) * _spread(scale, data.shape)


@operator("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Any = None) -> Array:
    """Values where the mask is 1; of iOS 16 the mask is packed bits of a weight of `shape`."""
    if shape is not None:
        sizes = bounded_shape(ints(shape))
        mask = unpacked(mask.reshape(-1).astype(np.uint8), 1, int(np.prod(sizes))).reshape(sizes)
    found = np.zeros(mask.shape, nonzero_data.dtype)
    found[mask.astype(bool)] = nonzero_data.reshape(-1)
    return found


@operator("constexpr_cast")
def constexpr_cast(source_val: Array, output_dtype: Any) -> Array:
    return source_val.astype(_F)


def _spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    for axis, (size, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        blocks = np.repeat(blocks, size // count, axis)
    return blocks
