"""A double of TensorRT's Python module in either flavour; see `Engine` for what its plans compute."""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import mmap
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_double import Cuda, Status

MAGIC = b"FAKEPLAN"
ITEMS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64}


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64 = "float32", "float16", "bfloat16", "int64"


class Io(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class Location(enum.Enum):
    DEVICE, HOST = range(2)


class Allocation(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphs(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class Validity(enum.IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class Diagnostics(enum.IntEnum):
    VERSION_MISMATCH, OLD_CUDA_DRIVER, MALFORMED_ENGINE = 1, 4, 32


class Logger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class Weights:
    def __init__(self, dtype: DataType, ptr: int, count: int) -> None:
        self.dtype, self.ptr, self.size = dtype, ptr, count


class Trt(types.ModuleType):
    """One flavour of the library; `words` of the plan say what an engine does (see `plan_bytes`)."""

    DataType, TensorIOMode, TensorLocation, ILogger = DataType, Io, Location, Logger
    ExecutionContextAllocationStrategy, CudaGraphStrategy = Allocation, CudaGraphs
    EngineValidity, EngineInvalidityDiagnostics, Weights = Validity, Diagnostics, Weights

    def __init__(self, name: str, version: str, cuda: Cuda) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = version
        self.rtx = name.startswith("tensorrt_rtx")
        self.cuda = cuda
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.configs: list[Any] = []
        self.created = 0  # execution contexts
        self.executed = 0
        self.compiled: list[Any] = []  # shapes whose kernels no cache had
        self.bad_header = 0
        self.refuse_execution = 0
        self.refuse_refit = False
        self.while_recording: Callable[[], object] = lambda: None
        kind = RtxRuntime if self.rtx else Runtime
        self.Runtime = lambda logger: kind(self, logger)
        self.Refitter = lambda engine, logger: Refitter(engine)


class Runtime:
    def __init__(self, trt: Trt, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data: Any) -> Any:
        assert isinstance(data, mmap.mmap), "the plan was read to the heap"
        if data[: len(MAGIC)] != MAGIC:
            self.logger.log(Logger.Severity.ERROR, "magic tag does not match")
            return None
        return Engine(self.trt, self, json.loads(data[len(MAGIC) :]))


class RtxRuntime(Runtime):
    def get_engine_validity(self, data: Any) -> Any:
        bits = self.trt.bad_header or (0 if data[: len(MAGIC)] == MAGIC else Diagnostics.MALFORMED_ENGINE)
        return (Validity.INVALID if bits else Validity.VALID, int(bits))


class Engine:
    """scale * sample + shift + timestep / 1000 + the mean of the states of that sample."""

    def __init__(self, trt: Trt, runtime: Runtime, words: dict[str, Any]) -> None:
        self.trt, self.runtime, self.words = trt, weakref.ref(runtime), words
        self.device_memory_size_v2 = 64
        self.num_optimization_profiles = len(next(iter(words["inputs"].values()))["profiles"])
        self.tensors = {**words["inputs"], **words["outputs"]}
        self.num_io_tensors = len(self.tensors)
        given = None if words["stripped"] else {"scale": np.float32(2), "shift": np.float32(0)}
        self.weights: dict[str, Any] | None = given
        trt.engines.add(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Io:
        return Io.INPUT if name in self.words["inputs"] else Io.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name]["dtype"])

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if self.tensors[name].get("host") else Location.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        low, _, high = self.tensors[name]["profiles"][0]
        return tuple(a if a == b else -1 for a, b in zip(low, high, strict=True))

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return [tuple(shape) for shape in self.tensors[name]["profiles"][index]]

    def create_runtime_config(self) -> Any:
        assert self.trt.rtx
        config = Config()
        self.trt.configs.append(config)
        return config

    def create_execution_context(self, how: Any) -> Any:
        managed = how.allocation if self.trt.rtx else how
        assert managed is Allocation.USER_MANAGED
        self.trt.created += 1
        return RtxContext(self, how) if self.trt.rtx else CapturableContext(self, None)


class Config:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphs.DISABLED
        self.allocation = Allocation.STATIC
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Allocation) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> Any:
        return Cache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class Cache:
    def __init__(self) -> None:
        self.kernels: list[Any] = []

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"JIT"):
            return False
        self.kernels = json.loads(blob[3:])
        return True

    def serialize(self) -> bytes:
        return b"JIT" + json.dumps(self.kernels).encode()


class Context:
    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.profile = 0
        self.version = 0  # of what a graph would have captured
        self.settled = -1  # the version that has run

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)
        self.version += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shapes = index, {}
        self.version += 1
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self.engine.tensors[name]["profiles"][self.profile]
        self.shapes[name] = tuple(shape)
        self.version += 1
        return all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.words["inputs"] if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"] if name == "out_sample" else self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self.version += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        trt, cuda = self.engine.trt, self.engine.trt.cuda
        recording = stream in cuda.recording
        if trt.refuse_execution:
            trt.refuse_execution -= 1
            if not trt.refuse_execution:
                return False
        if recording:
            trt.while_recording()
        if recording and self.engine.words["breaks_capture"]:
            cuda.faults["cudaStreamEndCapture"] = 1
            cuda.status = Status.cudaErrorStreamCaptureInvalidated
        if recording and self.settled != self.version:
            cuda.violations.append("a context was captured that had not run with its shapes")
        self._compile()
        own, version, weights = weakref.ref(self), self.version, self.engine.weights
        addresses, shapes, scratch = dict(self.addresses), dict(self.shapes), self.scratch
        words = self.engine.words

        def work() -> None:
            context = own()
            if recording and (context is None or context.version != version):
                cuda.violations.append("a graph was launched whose context has changed or is gone")
            trt.executed += 1
            _compute(cuda, words, addresses, shapes, scratch, weights)

        cuda.put(stream, work)
        self.settled = self.version
        return True

    def _compile(self) -> None:
        pass


class RtxContext(Context):
    def _compile(self) -> None:
        kernels = self.config.cache.kernels
        key = [self.profile, [list(shape) for shape in self.shapes.values()]]
        if key not in kernels:
            kernels.append(key)
            self.engine.trt.compiled.append(key)


class CapturableContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self.engine.words["capturable"])


def _compute(cuda: Cuda, words: Any, addresses: Any, shapes: Any, scratch: tuple[int, int], weights: Any) -> None:
    shapes = {**shapes, "out_sample": shapes["sample"]}
    dtypes = {name: entry["dtype"] for name, entry in {**words["inputs"], **words["outputs"]}.items()}
    views = {name: cuda.view(addresses[name], ITEMS[dtypes[name]], shapes[name]) for name in addresses}
    busy = cuda.view(scratch[0], np.uint8, (64,))
    if weights is None:
        cuda.violations.append("a stripped engine was run")
    if weights is None or busy is None or any(view is None for view in views.values()):
        return
    token = np.random.default_rng().integers(0, 255, 64, np.uint8)
    busy[:] = token
    time.sleep(0.001)
    sample, steps, states = (_floats(views[name]) for name in ("sample", "timestep", "encoder_hidden_states"))
    column = steps.reshape(-1, 1, 1, 1) / 1000 + states.mean((1, 2)).reshape(-1, 1, 1, 1)
    result = weights["scale"] * sample + weights["shift"] + column
    if not np.array_equal(busy, token):
        cuda.violations.append("two calls ran in one scratch memory")
    out = views["out_sample"]
    out[:] = (result.astype(np.float32).view(np.uint32) >> 16) if out.dtype == np.uint16 else result


def _floats(view: np.ndarray) -> np.ndarray:
    return (view.astype(np.uint32) << 16).view(np.float32) if view.dtype == np.uint16 else view.astype(np.float32)


class Refitter:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.words["weights"])

    def get_weights_prototype(self, name: str) -> Any:
        entry = self.engine.words["weights"][name]
        return types.SimpleNamespace(dtype=DataType(entry["dtype"]), size=int(np.prod(entry["shape"])))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        prototype = self.get_weights_prototype(name)
        self.given[name] = weights
        return bool(weights.dtype is prototype.dtype and weights.size == prototype.size)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.get_all_weights() if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        cuda = self.engine.trt.cuda
        if any(cuda.streams.values()):
            cuda.violations.append("a refit with work under way")
        if self.engine.trt.refuse_refit:
            return False
        found: dict[str, Any] = {}
        for name, weights in self.given.items():
            entry = self.engine.words["weights"][name]
            dtype = np.dtype(ITEMS[entry["dtype"]])
            raw = ctypes.string_at(weights.ptr, weights.size * dtype.itemsize)
            found[name] = _floats(np.frombuffer(raw, dtype).reshape(entry["shape"]))
        self.engine.weights = found
        return True


def plan_bytes(**words: Any) -> bytes:
    """A plan of the double."""
    return MAGIC + json.dumps({"stripped": False, "capturable": True, "breaks_capture": False, **words}).encode()
