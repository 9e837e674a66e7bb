"""Sessions of ONNX Runtime: on the host, on a GPU, and on a GPU with captured CUDA graphs."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError, UnsupportedError
from diffship.runtimes.engines.engine import first_line

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
PLACEMENT = "session.record_ep_graph_assignment_info"
CAPTURED_SHAPES = 8  # combinations of shapes that have a graph at a time; each keeps its activations on the GPU
GRAPHS_EVER = 64  # onnxruntime frees a graph with its session only
_WORTH = 4  # calls of other shapes, while a graph is not used once, after which theirs replaces it
_GRAPH_ID = "gpu_graph_id"
_NO_GRAPH = "-1"
# where one of these is computed on the host, whole activations travel; shape arithmetic belongs there
_HEAVY = frozenset(
    "Attention Conv ConvTranspose Gemm GroupNorm GroupNormalization InstanceNormalization LayerNormalization MatMul "
    "MultiHeadAttention Resize SkipLayerNormalization Softmax".split()
)


class CpuSession:
    """Host memory in and out; ONNX Runtime's own `run` may be entered by many threads."""

    def __init__(self, session: Any) -> None:
        self._session: Any = session
        self.inputs: Mapping[str, str] = _ports(session.get_inputs())
        self.outputs: Mapping[str, str] = _ports(session.get_outputs())

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        session = self._live()
        try:
            return list(session.run(list(outputs), dict(feeds)))
        except Exception as fault:
            raise RunnerError(f"onnxruntime stopped: {first_line(fault)}") from None

    def keep(self, array: np.ndarray) -> Any:
        return array

    def close(self) -> None:
        self._session = None

    def _live(self) -> Any:
        # a local reference keeps the engine alive for this call when another thread closes it
        session = self._session
        if session is None:
            raise RunnerError("the onnxruntime model is closed; open it again")
        return session


class DeviceSession(CpuSession):
    """Constants stay on the device; other feeds are copied there, outputs back. Many threads may be inside."""

    def __init__(self, session: Any, runtime: Any, device: str, device_id: int) -> None:
        super().__init__(session)
        self._runtime = runtime
        self._device = (device, device_id)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        session = self._live()
        try:
            binding = session.io_binding()
            for name, feed in feeds.items():
                if isinstance(feed, np.ndarray):
                    binding.bind_cpu_input(name, feed)
                else:
                    binding.bind_ortvalue_input(name, feed)
            for name in outputs:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            return list(binding.copy_outputs_to_cpu())
        except Exception as fault:
            raise RunnerError(f"onnxruntime stopped: {first_line(fault)}") from None

    def keep(self, array: np.ndarray) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(array, *self._device)


@dataclass(frozen=True, eq=False)
class Constant:
    """A feed that is used again and again; it is copied to the graph's own input only if something else lies there."""

    array: np.ndarray


@dataclass
class _Captured:
    """Buffers of one combination of shapes, whose addresses a graph is bound to, and what lies in its inputs."""

    binding: Any
    options: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    held: dict[str, Constant | None] = field(default_factory=dict)

    def fill(self, feeds: Mapping[str, Any]) -> None:
        for name, feed in feeds.items():
            constant = feed if isinstance(feed, Constant) else None
            if constant is None or self.held.get(name) is not constant:
                self.inputs[name].update_inplace(_array(feed))
            self.held[name] = constant


class GraphSession(DeviceSession):
    """One CUDA graph for each combination of shapes: a call is two copies and one launch.

    ONNX Runtime captures by itself if a run has a `gpu_graph_id` and all its tensors have fixed addresses. Calls wait
    for each other, because they share those. The first CAPTURED_SHAPES combinations get a graph; another one runs
    without, until it is called so often that it takes the place of the graph that was used least recently.
    """

    def __init__(self, session: Any, runtime: Any, device: str, device_id: int) -> None:
        super().__init__(session, runtime, device, device_id)
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()  # the least recently used one first
        self._graphs = 0  # ever begun: an id is never given twice, as its graph stays bound to the buffers of its time
        self._without: Counter[tuple[Any, ...]] = Counter()  # calls since the oldest graph was used, by shapes
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        session = self._live()
        key = tuple((name, _array(feed).shape) for name, feed in feeds.items())
        with self._lock:
            try:
                slot = self._slot(session, key, feeds)
                if slot is None:
                    _, made = self._once(session, feeds)
                    return [np.array(made[name].numpy()) for name in outputs]
                slot.fill(feeds)
                session.run_with_iobinding(slot.binding, slot.options)
                # in host memory `numpy` shows the buffer itself, which the next call fills anew
                return [np.array(slot.outputs[name].numpy()) for name in outputs]
            except Exception as fault:
                self._captured.pop(key, None)  # its buffers, or its graph, may hold half of a call
                raise RunnerError(f"onnxruntime stopped: {first_line(fault)}") from None

    def _slot(self, session: Any, key: tuple[Any, ...], feeds: Mapping[str, Any]) -> _Captured | None:
        """The buffers and the graph of these shapes; None if they have none and are not to get one now."""
        if key in self._captured:
            if key == next(iter(self._captured)):
                self._without.clear()
            self._captured.move_to_end(key)
            return self._captured[key]
        if self._graphs >= GRAPHS_EVER:
            return None
        if len(self._captured) >= CAPTURED_SHAPES:
            if len(self._without) > GRAPHS_EVER:
                self._without.clear()
            self._without[key] += 1
            if self._without[key] < _WORTH:
                return None
            self._captured.popitem(last=False)
        self._without.clear()
        return self._made(session, key, feeds)

    def keep(self, array: np.ndarray) -> Constant:
        return Constant(array)

    def close(self) -> None:
        with self._lock:
            self._captured.clear()
            super().close()

    def _made(self, session: Any, key: tuple[Any, ...], feeds: Mapping[str, Any]) -> _Captured:
        """Buffers for these shapes. A first run without a graph tells the shapes of the outputs, and keeps them."""
        inputs, outputs = self._once(session, feeds)
        fixed = _bound(session, inputs)
        for name, value in outputs.items():
            fixed.bind_ortvalue_output(name, value)
        self._graphs += 1
        made = self._captured[key] = _Captured(fixed, self._options(str(self._graphs)), inputs, outputs)
        return made

    def _once(self, session: Any, feeds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """One run without a graph: its inputs and all outputs, on the device."""
        inputs = {}
        for name, feed in feeds.items():
            array = _array(feed)
            value = self._runtime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, *self._device)
            value.update_inplace(array)
            inputs[name] = value
        binding = _bound(session, inputs)
        for name in self.outputs:
            binding.bind_output(name, *self._device)
        session.run_with_iobinding(binding, self._options(_NO_GRAPH))
        return inputs, dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def _options(self, graph: str) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options


def _array(feed: Any) -> np.ndarray:
    found: np.ndarray = feed.array if isinstance(feed, Constant) else feed
    return found


def _bound(session: Any, inputs: Mapping[str, Any]) -> Any:
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    return binding


def require_placement(session: Any, version: str) -> None:
    """Raises UnsupportedError if operators that move whole activations were placed on the host.

    ONNX Runtime says so in its log only: up to 1.24 it had no CUDA kernel for opset 23's Attention, and computed every
    one of them on the host (github.com/microsoft/onnxruntime/issues/28025).
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # before 1.24 nobody can ask
    assigned = session.get_provider_graph_assignment_info()
    counts = Counter(
        node.op_type
        for part in assigned
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type in _HEAVY
    )
    if counts:
        found = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        raise UnsupportedError(
            f"onnxruntime {version} would compute {found} on the host instead of the GPU. Run: pip install --upgrade "
            "onnxruntime-gpu, or export with --opset 18, or accept it with --option allow_host=true"
        )


def _ports(arguments: Sequence[Any]) -> dict[str, str]:
    unknown = [argument for argument in arguments if argument.type not in DTYPES]
    if unknown:
        raise RunnerError(f"tensor {unknown[0].name} has type {unknown[0].type}; legal: {', '.join(DTYPES.values())}")
    return {argument.name: DTYPES[argument.type] for argument in arguments}
