"""Arrays on their way into and out of an engine: any library's tensors by DLPack, casts that never wrap silently."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError, UnsupportedError
from diffship.core.spec import Axis, TensorSpec

Giver = Callable[[np.ndarray], Any]


def host(name: str, array: Any) -> np.ndarray:
    """`array` as numpy in host memory, without a copy if it lies there already.

    Raises:
        RunnerError: it is no array, or its library refuses to hand it over (bfloat16, tracked gradients).
    """
    if isinstance(array, np.ndarray):
        return array
    if not hasattr(array, "__dlpack__"):
        return _plain(name, array)
    try:
        return np.from_dlpack(array.cpu() if hasattr(array, "cpu") else array)
    except (BufferError, RuntimeError, TypeError) as fault:
        reason = " ".join(str(fault).split())[:160]
        raise RunnerError(f"feed {name} cannot be read: {reason}. Pass a detached float32 or int64 array") from None


def _plain(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, (bool, int, float, list, tuple, np.generic)):
        raise RunnerError(f"feed {name} is a {type(value).__name__}; pass numpy or anything with __dlpack__")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise RunnerError(f"feed {name} is not a rectangle of numbers")
    return array


def giver(feeds: Iterable[Any]) -> Giver:
    """What converts outputs: to the library and device of the first feed that is not numpy; if there is none, they stay
    numpy."""
    for feed in feeds:
        if hasattr(feed, "__dlpack__") and not isinstance(feed, (np.ndarray, np.generic)):
            return _giver_of(feed)
    return lambda array: array


def _giver_of(feed: Any) -> Giver:
    library = sys.modules[type(feed).__module__.partition(".")[0]]
    take = getattr(library, "from_dlpack", None)
    if take is None:
        raise UnsupportedError(f"{library.__name__} arrays cannot be given back: it has no from_dlpack; pass numpy")
    device = getattr(feed, "device", None)

    def give(array: np.ndarray) -> Any:
        taken = take(array if array.flags.writeable else array.copy())
        return taken.to(device) if hasattr(taken, "to") and device is not None else taken

    return give


def as_dtype(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in `dtype`, contiguous and little-endian.

    Floats and integers become floats, integers become other integers if every value fits; nothing else changes
    kind. Raises RunnerError with the offending value otherwise.
    """
    target = numpy_dtype(dtype)
    if array.dtype != target:
        if array.dtype.kind not in {"f": "iuf", "i": "iu", "u": "iu"}.get(target.kind, ""):
            raise RunnerError(f"feed {name} is {array.dtype}; it must be {dtype} (or losslessly become it)")
        _check_range(name, array, target)
        array = array.astype(target)
    return array if array.flags.c_contiguous else array.copy()


def _check_range(name: str, array: np.ndarray, target: np.dtype[Any]) -> None:
    if array.size == 0 or (target.itemsize >= array.dtype.itemsize and target.kind == array.dtype.kind):
        return
    limits = np.finfo(target) if target.kind == "f" else np.iinfo(target)
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    if finite.size and (finite.max() > limits.max or finite.min() < limits.min):
        worst = finite.max() if finite.max() > limits.max else finite.min()
        raise RunnerError(f"feed {name} holds {worst}; {target} holds {limits.min} to {limits.max}")


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        raise UnsupportedError(
            "bfloat16 tensors at a part's boundary need an engine on a GPU; export with fp32 or fp16"
        )
    return np.dtype(name)


def relayout(array: np.ndarray, given: tuple[Axis, ...], wanted: tuple[Axis, ...]) -> np.ndarray:
    """`array` with axes `given` as axes `wanted`: the same named axes permuted, axes of 1 dropped or inserted."""
    if given == wanted:
        return array
    kept = [axis for axis in given if axis != 1]
    squeezed = array.reshape([size for size, axis in zip(array.shape, given, strict=True) if axis != 1])
    order = []
    for axis in wanted:
        if axis != 1:
            order.append(next(i for i, name in enumerate(kept) if name == axis and i not in order))
    permuted = squeezed.transpose(order)
    sizes = iter(permuted.shape)
    return permuted.reshape([1 if axis == 1 else next(sizes) for axis in wanted])


def spread(spec: TensorSpec, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """One value for the whole batch (rank 0, or length 1) as one value per sample; other arrays unchanged."""
    if len(spec.shape) != 1 or array.size != 1 or spec.shape[0] not in sizes:
        return array
    return np.broadcast_to(array.reshape(1), spec.resolve(sizes))


def describe_nonfinite(array: np.ndarray) -> str | None:
    """`3 NaN and 1 infinite of 4096 values`, or None if all are finite."""
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return None
    nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "infinite")) if count]
    return f"{' and '.join(counts)} of {array.size} values"
