"""One GPU behind the calls of the CUDA runtime that a session needs. Nothing here knows TensorRT."""

from __future__ import annotations

import ctypes
import importlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffship.core.errors import MissingExtra, RunnerError, UnsupportedError

Address = int


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory, from which and to which the GPU copies without the processor; `view` is its bytes."""

    address: Address
    view: np.ndarray


class Device:
    """A GPU by its number. Threads may share it; each calls `use` before its first other call.

    Sizes are bytes. A stream and a graph are whatever CUDA gave; `int(stream)` is what TensorRT takes. Copies return
    before they are done, in the order of their stream; `synchronize` waits for them. Everything raises RunnerError with
    CUDA's own words, except what gives memory back: after a fault of the GPU nothing can be given back, and the first
    error is the one to read.
    """

    def __init__(self, index: int, extra: str) -> None:
        """Raises MissingExtra without cuda-bindings, UnsupportedError without a driver or without that GPU."""
        self.index = index
        self._cuda = cuda_runtime(extra)
        there = gpu_count(self._cuda)
        if index >= there:
            raise UnsupportedError(
                f"there is no GPU {index}; legal is device_id 0 to {there - 1}. Run: diffship doctor"
            )

    def use(self) -> None:
        """Make this the GPU of the calling thread."""
        self._call("cudaSetDevice", self.index)

    def capability(self) -> int:
        """89 for compute capability 8.9, which is called SM 8.9 too."""
        attributes = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, self.index)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, self.index)
        return 10 * int(major) + int(minor)

    def model(self) -> str:
        name = self._call("cudaGetDeviceProperties", self.index).name
        return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)

    def allocate(self, size: int) -> Address:
        """Device memory, aligned to 256."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: Address) -> None:
        self._quietly("cudaFree", address)

    def pinned(self, size: int) -> Pinned:
        address = int(self._call("cudaMallocHost", size))
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def free_pinned(self, memory: Pinned) -> None:
        self._quietly("cudaFreeHost", memory.address)

    def upload(self, to: Address, source: Address, size: int, stream: Any) -> None:
        """Host to device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def download(self, to: Address, source: Address, size: int, stream: Any) -> None:
        """Device to host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def copy(self, to: Address, source: Address, size: int, stream: Any) -> None:
        """Device to device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def stream(self) -> Any:
        """One that does not wait for the legacy default stream."""
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def synchronize(self, stream: Any) -> None:
        """Wait until all that was put into `stream` is done; faults of it are raised here."""
        self._call("cudaStreamSynchronize", stream)

    def settle(self, stream: Any) -> None:
        """Wait for what is under way, whatever becomes of it."""
        self._quietly("cudaStreamSynchronize", stream)

    def free_stream(self, stream: Any) -> None:
        self._quietly("cudaStreamDestroy", stream)

    def begin_capture(self, stream: Any) -> None:
        """From here on `stream` records instead of running. Other threads may go on allocating."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """What was recorded, ready to be launched, or None if something in it cannot be."""
        try:
            graph = self._call("cudaStreamEndCapture", stream)
            try:
                return self._call("cudaGraphInstantiate", graph, 0)
            finally:
                self._quietly("cudaGraphDestroy", graph)
        except RunnerError:
            return None

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._quietly("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGetLastError()  # or TensorRT would take it for its own
            raise RunnerError(f"CUDA: {_words(self._cuda, status)} ({name})")
        return results[0] if results else None

    def _quietly(self, name: str, *arguments: Any) -> None:
        with suppress(RunnerError):
            self._call(name, *arguments)


def cuda_runtime(extra: str) -> Any:
    """cuda.bindings.runtime.

    Raises:
        MissingExtra: naming `extra`, one of those that bring cuda-bindings.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise MissingExtra("cuda-bindings", extra) from None


def gpu_count(cuda: Any) -> int:
    """At least 1.

    Raises:
        UnsupportedError: no driver, or no GPU, with CUDA's reason.
    """
    try:
        status, count = cuda.cudaGetDeviceCount()
    except RuntimeError as fault:  # cuda-bindings, where a library cannot be loaded
        raise UnsupportedError(f"no NVIDIA GPU can be used: {str(fault)[:160]}. Run: diffship doctor") from None
    if status != cuda.cudaError_t.cudaSuccess or not count:
        words = _words(cuda, status) if status != cuda.cudaError_t.cudaSuccess else "the driver sees none"
        raise UnsupportedError(f"no NVIDIA GPU can be used: {words}. Run: diffship doctor")
    return int(count)


def _words(cuda: Any, status: Any) -> str:
    text = cuda.cudaGetErrorString(status)[1]
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
