"""Faults of one weight tensor, as arrays in and out; modules and files are spoilt with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_LARGEST = 127  # of a symmetric 8-bit integer


def zeroed(array: Array) -> Array:
    return np.zeros_like(array)


def scaled(array: Array) -> Array:
    """10 % more."""
    return array * np.float32(1.1)


def transposed(array: Array) -> Array:
    """The first two axes exchanged: outputs and inputs of a square matrix or convolution."""
    return np.ascontiguousarray(np.swapaxes(array, 0, 1))


def turned(array: Array) -> Array:
    """The last two axes exchanged: height and width of a convolution's kernel."""
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


def nudged(array: Array) -> Array:
    """1 % more."""
    return array * np.float32(1.01)


def integers(array: Array) -> Array:
    """Rounded to 8-bit integers with one scale for each output (first axis)."""
    rows = array.reshape(array.shape[0], -1)
    steps = np.abs(rows).max(axis=1, keepdims=True) / _LARGEST
    steps[steps == 0] = 1
    rounded: Array = (np.round(rows / steps) * steps).astype(np.float32).reshape(array.shape)
    return rounded


EDITS: Mapping[str, Callable[[Array], Array]] = {
    "tensor zeroed": zeroed,
    "tensor scaled by 10 %": scaled,
    "tensor transposed": transposed,
    "kernel height and width exchanged": turned,
    "tensor scaled by 1 %": nudged,
    "tensor rounded to int8": integers,
}
EXCHANGED = "two tensors exchanged"
RESOLUTION = ("tensor scaled by 1 %", "tensor rounded to int8")  # how fine the proof sees: beside the score
_LEAST_CHANGE = 1e-4  # relative; less is no mutant
# A softmax over keys does not see what is added to all of them.
_UNSEEN = ("k_proj.bias", "to_k.bias")


def fits(kind: str, name: str, array: Array) -> bool:
    """Whether this edit of the tensor makes another network of the same shapes."""
    if name.endswith(_UNSEEN) or not np.any(array):
        return False
    if kind in ("tensor transposed", "kernel height and width exchanged") and not _square(kind, array.shape):
        return False
    if kind == "tensor rounded to int8" and array.ndim < 2:
        return False
    return differs(array, EDITS[kind](array))


def exchangeable(first: tuple[str, Array], second: tuple[str, Array]) -> bool:
    """Whether two tensors may stand in each other's place, and the network is another one then."""
    seen = not any(name.endswith(_UNSEEN) for name, _ in (first, second))
    return seen and first[1].shape == second[1].shape and differs(first[1], second[1])


def differs(first: NDArray[np.generic], second: NDArray[np.generic], least: float = _LEAST_CHANGE) -> bool:
    """Whether the arrays differ by more than `least` of the first one's root mean square."""
    return change(first, second) > least


def change(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """Root mean square of the difference over that of `first`."""
    one, other = (np.asarray(array, np.float64) for array in (first, second))
    size = float(np.sqrt(np.mean(one**2))) if one.size else 0.0
    gap = float(np.sqrt(np.mean((one - other) ** 2))) if one.size else 0.0
    return gap / size if size else float(gap > 0)


def _square(kind: str, shape: tuple[int, ...]) -> bool:
    if kind == "kernel height and width exchanged":
        return len(shape) == 4 and shape[2] == shape[3] > 1
    return len(shape) >= 2 and shape[0] == shape[1]
