"""A double of cuda.bindings.runtime that keeps the rules which a real GPU punishes.

Device memory is memory of this process behind addresses that are checked; a stream holds closures that run only when
somebody synchronises, so a copy that nobody waited for is a result that is not there. What would be undefined behaviour
(memory in use freed, a captured context changed, two calls in one scratch memory) is noted in `violations`.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

POISON = 0xCD


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Kind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Attribute(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class Mode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Graph:
    def __init__(self, works: list[Callable[[], None]]) -> None:
        self.works = works


class Cuda(types.ModuleType):
    """`faults[name] = n`: the n-th call from now of that function fails, with `status`."""

    cudaError_t = Status
    cudaMemcpyKind = Kind
    cudaDeviceAttr = Attribute
    cudaStreamCaptureMode = Mode
    cudaStreamNonBlocking = 1

    def __init__(self, capability: int = 89, gpus: int = 1) -> None:
        super().__init__("cuda.bindings.runtime")
        self.__spec__ = importlib.machinery.ModuleSpec("cuda.bindings.runtime", None)
        self.capability, self.gpus = capability, gpus
        self.memory: dict[int, tuple[str, Any]] = {}
        self.buried: list[Any] = []  # freed memory stays mapped, full of poison
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self.recorders: dict[int, int] = {}  # stream -> thread, which must not free memory
        self.graphs = 0
        self.counts: dict[str, int] = {}
        self.faults: dict[str, int] = {}
        self.status = Status.cudaErrorIllegalAddress
        self.violations: list[str] = []
        self.lock = threading.RLock()
        self.current = threading.local()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("cuda") and callable(found) and not isinstance(found, type):
            return lambda *arguments: self._counted(name, found, arguments)
        return found

    def _counted(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.faults.get(name, 0):
                self.faults[name] -= 1
                if not self.faults[name]:
                    if name == "cudaStreamEndCapture":
                        self.recording.pop(arguments[0])
                        self.recorders.pop(arguments[0])
                    return (self.status, None)
        if name not in FREE_OF_DEVICE and not hasattr(self.current, "device"):
            self.violations.append(f"{name} in a thread without cudaSetDevice")
        return call(*arguments)

    def cudaGetDeviceCount(self) -> Any:
        return (Status.cudaSuccess, self.gpus) if self.gpus >= 0 else (Status.cudaErrorInsufficientDriver, None)

    def cudaSetDevice(self, index: int) -> Any:
        self.current.device = index
        return (Status.cudaSuccess,)

    def cudaGetLastError(self) -> Any:
        return (Status.cudaSuccess,)

    def cudaGetErrorString(self, status: Status) -> Any:
        return (Status.cudaSuccess, status.name.encode())

    def cudaDeviceGetAttribute(self, attribute: Attribute, index: int) -> Any:
        major = attribute is Attribute.cudaDevAttrComputeCapabilityMajor
        return (Status.cudaSuccess, self.capability // 10 if major else self.capability % 10)

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return (Status.cudaSuccess, types.SimpleNamespace(name=b"NVIDIA Double\0\0"))

    def cudaMalloc(self, size: int) -> Any:
        return (Status.cudaSuccess, self._allocated("device", size))

    def cudaMallocHost(self, size: int) -> Any:
        return (Status.cudaSuccess, self._allocated("pinned", size))

    def cudaFree(self, address: int) -> Any:
        return self._freed("device", address)

    def cudaFreeHost(self, address: int) -> Any:
        return self._freed("pinned", address)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        with self.lock:
            stream = max(self.streams, default=100) + 1
            self.streams[stream] = []
        return (Status.cudaSuccess, stream)

    def cudaStreamDestroy(self, stream: int) -> Any:
        if self.streams.pop(stream):
            self.violations.append("a stream was destroyed with work in it")
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        if stream in self.recording:
            self.violations.append("a stream that records was waited for")
        works = self.streams[stream]
        while works:
            works.pop(0)()
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Kind, stream: int) -> Any:
        sides = {
            Kind.cudaMemcpyHostToDevice: ("", "device"),
            Kind.cudaMemcpyDeviceToHost: ("device", "pinned"),
            Kind.cudaMemcpyDeviceToDevice: ("device", "device"),
        }
        self.counts[kind.name] = self.counts.get(kind.name, 0) + 1
        origin, target = sides[kind]
        if not origin and not self.inside("pinned", source, size):
            # pageable: the driver takes a copy before it returns
            data = (ctypes.c_uint8 * size).from_buffer_copy(ctypes.string_at(source, size))
            self.buried.append(data)
            source = ctypes.addressof(data)

        def work() -> None:
            if (origin and not self.inside(origin, source, size)) or not self.inside(target, to, size):
                self.violations.append(f"{kind.name} of {size} bytes leaves its memory")
                return
            ctypes.memmove(to, source, size)

        self.put(stream, work)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Mode) -> Any:
        self.recording[stream] = []
        self.recorders[stream] = threading.get_ident()
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        del self.recorders[stream]
        return (Status.cudaSuccess, Graph(self.recording.pop(stream)))

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        self.graphs += 1
        return (Status.cudaSuccess, graph)

    def cudaGraphDestroy(self, graph: Graph) -> Any:
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Graph) -> Any:
        self.graphs -= 1
        graph.works = []
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Graph, stream: int) -> Any:
        for work in graph.works:
            self.put(stream, work)
        return (Status.cudaSuccess,)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        (self.recording[stream] if stream in self.recording else self.streams[stream]).append(work)

    def inside(self, kind: str, address: int, size: int) -> bool:
        with self.lock:
            return any(
                start <= address and address + size <= start + len(data)
                for start, (own, data) in self.memory.items()
                if own == kind
            )

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """Device memory as an array, or None where it is not all there."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not self.inside("device", address, size):
            self.violations.append(f"{size} bytes at {address:#x} are not device memory")
            return None
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _allocated(self, kind: str, size: int) -> int:
        data = (ctypes.c_uint8 * size)()
        ctypes.memset(data, POISON, size)
        with self.lock:
            self.memory[ctypes.addressof(data)] = (kind, data)
        return ctypes.addressof(data)

    def _freed(self, kind: str, address: int) -> Any:
        with self.lock:
            if threading.get_ident() in self.recorders.values():
                self.violations.append("memory was freed by a thread that records")
            own, data = self.memory.pop(address, ("nothing", None))
            if own != kind:
                self.violations.append(f"{kind} memory was freed that is {own}")
            else:
                ctypes.memset(data, POISON, len(data))
                self.buried.append(data)
        return (Status.cudaSuccess,)


FREE_OF_DEVICE = (
    *("cudaGetDeviceCount", "cudaSetDevice", "cudaGetErrorString", "cudaGetLastError"),
    *("cudaDeviceGetAttribute", "cudaGetDeviceProperties"),
)
