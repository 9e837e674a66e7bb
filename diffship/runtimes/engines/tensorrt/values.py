"""Values as a plan wants them: numpy has no bfloat16, so a session takes and gives float32 in its place."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffship.core.dtype import from_float32, to_float32
from diffship.core.errors import RunnerError
from diffship.core.spec import DTYPES

# TensorRT's names of those types that a boundary of ours may have
NATIVE = dict(zip(("FLOAT", "HALF", "BF16", "INT64", "INT32", "UINT8", "BOOL"), DTYPES, strict=True))


def native_dtype(name: str, code: Any) -> str:
    """`float16` for TensorRT's DataType.HALF.

    Raises:
        RunnerError: a type that no boundary of ours has.
    """
    if code.name not in NATIVE:
        raise RunnerError(f"tensor {name} has type {code.name}; legal: {', '.join(NATIVE)}")
    return NATIVE[code.name]


def spoken_dtype(dtype: str) -> str:
    """How a session gives and takes it."""
    return "float32" if dtype == "bfloat16" else dtype


def item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def to_native(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in the bits of `dtype`, contiguous; a copy only for bfloat16, which is rounded to nearest even."""
    if dtype == "bfloat16" and array.dtype == np.float32:
        return np.ascontiguousarray(from_float32(array, dtype))
    if array.dtype != np.dtype(spoken_dtype(dtype)):
        raise RunnerError(f"a feed is {array.dtype}; the plan takes {dtype}")
    return np.ascontiguousarray(array)


def from_native(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes `raw` as a new array of `shape`."""
    if dtype == "bfloat16":
        return to_float32(raw.view(np.uint16).reshape(shape), dtype)
    return raw.view(dtype).reshape(shape).copy()
