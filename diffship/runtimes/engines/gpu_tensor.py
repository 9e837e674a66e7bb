"""Feeds that lie on the GPU of a session, and outputs that stay there: no copy passes through the host.

A tensor is found by DLPack (dlpack.h, DLManagedTensor), which also orders streams: exporting it for a stream makes that
stream wait for what its library still computes into it. Outputs are tensors of the feed's library, so only libraries
that can make one like a given one (`new_empty`: torch) are met here; others go through the host as before.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from diffship.core.errors import RunnerError
from diffship.core.spec import DTYPES

_CUDA = 2  # kDLCUDA
_KINDS = dict(zip(((2, 32), (2, 16), (4, 16), (0, 64), (0, 32), (1, 8), (6, 8)), DTYPES, strict=True))  # (code, bits)
_NAME = b"dltensor"


class GpuSession(Protocol):
    """What a Session has that takes and gives tensors on the GPU `gpu`; `takes` are dtypes by native input."""

    gpu: int
    takes: Mapping[str, str]

    def run_on_gpu(self, feeds: Mapping[str, Any], outputs: Sequence[str], like: GpuTensor) -> list[GpuTensor]:
        """As `run`; a feed may be a GpuTensor too, and outputs are new ones, of the library of `like`."""
        ...


class GpuTensor:
    """A tensor on a GPU as a runner sees a feed: `shape`, `size`, and where it lies."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor.detach()
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.size = math.prod(self.shape)

    def as_dtype(self, name: str, dtype: str) -> GpuTensor:
        """Contiguous and in `dtype`. Raises RunnerError if floats would become integers."""
        wanted = getattr(self._library, dtype)
        if wanted.is_floating_point < self.tensor.dtype.is_floating_point:
            raise RunnerError(f"feed {name} is {self.tensor.dtype}; it must be {dtype} (or losslessly become it)")
        return GpuTensor(self.tensor.to(wanted).contiguous())

    def spread(self, shape: tuple[int, ...]) -> GpuTensor:
        """One value in every place of `shape`."""
        return GpuTensor(self.tensor.reshape(()).expand(shape))

    def empty(self, shape: tuple[int, ...], dtype: str) -> GpuTensor:
        """Memory of the same library on the same GPU, not written yet."""
        return GpuTensor(self.tensor.new_empty(shape, dtype=getattr(self._library, dtype)))

    def finite(self) -> bool:
        return bool(self.tensor.isfinite().all())

    def address(self, dtype: str, stream: int) -> int:
        """Where its values lie, ready for `stream`; as long as this object lives.

        Raises:
            RunnerError: it is of another dtype, or not contiguous.
        """
        self._capsule = self.tensor.__dlpack__(stream=stream)
        found = _read(self._capsule)
        kind = _KINDS.get((found.code, found.bits)) if found.lanes == 1 else None
        if kind != dtype or not _contiguous(found):
            raise RunnerError(f"a tensor on the GPU is {kind or 'of a foreign dtype'}; {dtype} is taken, contiguous")
        return int(found.data or 0) + int(found.byte_offset)

    @property
    def _library(self) -> Any:
        return sys.modules[type(self.tensor).__module__.partition(".")[0]]


def on_gpu(feed: Any, gpu: int) -> bool:
    """Whether `feed` is a tensor in the memory of that GPU, of a library that outputs can be made of."""
    place = getattr(feed, "__dlpack_device__", None)
    return place is not None and hasattr(feed, "new_empty") and tuple(map(int, place())) == (_CUDA, gpu)


class _Tensor(ctypes.Structure):
    """DLTensor, with which a DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _read(capsule: Any) -> _Tensor:
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        pointer = pointer_of(capsule, _NAME)
    except ValueError as fault:
        raise RunnerError(f"a tensor on the GPU cannot be read: {fault}") from None
    return ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents


def _contiguous(found: _Tensor) -> bool:
    if not found.strides:
        return True
    wanted = 1
    for axis in reversed(range(found.ndim)):
        if found.shape[axis] != 1 and found.strides[axis] != wanted:
            return False
        wanted *= found.shape[axis]
    return True
