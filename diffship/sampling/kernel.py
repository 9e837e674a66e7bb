"""The one kernel that steps: a matrix of plain floats times arrays, in float32, for any array type.

Every product and sum is one elementwise float32 operation in a fixed order, so that the result is bit-equal for a
batch and its members, on every machine with IEEE arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # numpy, torch, or anything that multiplies with a float and adds


def apply_matrix(
    matrix: Sequence[Sequence[float]], x: Array, output: Array, noise: Array | None, history: Sequence[Array] = ()
) -> tuple[Array, ...]:
    """Rows of `matrix` over (x, output, noise, *history): the next x, then the next history, newest first.

    `noise` may be None if no row uses it.
    """
    columns = [None if column is None else as_float32(column) for column in (x, output, noise, *history)]
    return tuple(_combine(row, columns) for row in matrix)


def as_float32(array: Array) -> Array:
    """`array` itself if it is float32 already, else a float32 copy."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float32, copy=False)
    return array.float() if hasattr(array, "float") else array


def _combine(row: Sequence[float], columns: Sequence[Array]) -> Array:
    terms = [(weight, column) for weight, column in zip(row, columns, strict=True) if weight != 0.0]
    if not terms:
        return columns[0] * 0.0
    weight, column = terms[0]
    total = column if weight == 1.0 else column * weight
    for weight, column in terms[1:]:
        total = total + (column if weight == 1.0 else column * weight)
    return total
