"""ONNX bundles in OpenVINO on the CPU: the same files, no conversion step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffship.core.errors import RunnerError
from diffship.core.lazy import need
from diffship.core.strict import bounded, bounds, choices
from diffship.runtimes.engines.engine import Probe, Session, first_line, installed, package_version

DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "u8": "uint8",
    "boolean": "bool",
}


@dataclass(frozen=True)
@bounded
class OpenVinoRunner:
    """Options of OpenVINO.

    hint: "latency" for one call at a time, "throughput" for many. precision: what it computes in; OpenVINO alone would
    choose bf16 or fp16 if the CPU has them. cache: a folder for compiled models ("" = none).
    """

    name: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    targets: ClassVar[frozenset[str]] = frozenset({"onnx"})

    device: str = field(default="cpu", metadata=choices("cpu"))
    threads: int = field(default=0, metadata=bounds(0, 1024))
    hint: str = field(default="latency", metadata=choices("latency", "throughput"))
    precision: str = field(default="f32", metadata=choices("f32", "f16", "bf16"))
    cache: str = ""

    def open(self, files: Sequence[Path]) -> Session:
        """Open `files[0]`, an ONNX file in a bundle (or a stage cut from one) with its data beside it."""
        core = _core()
        try:
            model = core.read_model(str(files[0]))
            # from the file: compiling merges tensors, and then a port may answer to an inner name
            inputs, outputs = _ports(model.inputs), _ports(model.outputs)
            _give_ranks(model)
            return _CompiledSession(core.compile_model(model, "CPU", self._properties()), inputs, outputs)
        except RunnerError:
            raise
        except Exception as fault:
            raise RunnerError(f"openvino refuses {files[0].parent.name}/{files[0].name}: {first_line(fault)}") from None

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        growth = 2.3 if precision == "fp32" else 4.5
        return int(growth * file_bytes) + (128 << 20)

    @classmethod
    def probe(cls) -> Probe:
        install = "pip install 'diffship[openvino]'"
        if not installed("openvino"):
            return Probe(cls.name, False, reason="openvino is not installed", install=install)
        try:
            version = need("openvino").__version__
            devices = tuple(device.lower() for device in _core().available_devices if device == "CPU")
            return Probe(cls.name, bool(devices), version, devices, "" if devices else "no CPU device", install)
        except Exception as fault:
            reason = f"openvino does not start: {first_line(fault)}"
            return Probe(cls.name, False, package_version("openvino"), (), reason, install)

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": self.hint.upper(),
            "INFERENCE_PRECISION_HINT": self.precision,
            # The latency hint may pick half the cores; DESIGN's figures use all of them.
            "ENABLE_CPU_PINNING": False,
        }
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = self.threads
        if self.cache:
            properties["CACHE_DIR"] = self.cache
        return properties


@cache
def _core() -> Any:
    """One for the process, never given back.

    OpenVINO sets an alternate signal stack for the thread that first asks a core for its devices, and unmaps it with
    the core. If another thread lets go of that, the first one keeps a stack that is gone, and the next Ctrl-C is a
    segmentation fault, for Python's handlers run on it (measured with OpenVINO 2026).
    """
    return need("openvino").Core()


class _CompiledSession:
    """A pool of infer requests: each serves one thread at a time and is kept for the next."""

    def __init__(self, compiled: Any, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self._compiled: Any = compiled
        self._idle: deque[Any] = deque()
        self._lock = threading.Lock()
        self.inputs = inputs
        self.outputs = outputs
        self._feeds = {name: index for index, name in enumerate(inputs)}
        self._results = {name: index for index, name in enumerate(outputs)}

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        request = self._borrow()
        try:
            results = request.infer(
                {self._feeds[name]: feed for name, feed in feeds.items()}, share_inputs=True, share_outputs=True
            )
            return [np.array(results[self._results[name]]) for name in outputs]
        except Exception as fault:
            raise RunnerError(f"openvino stopped: {first_line(fault)}") from None
        finally:
            self._idle.append(request)

    def keep(self, array: np.ndarray) -> Any:
        return array

    def close(self) -> None:
        with self._lock:
            self._compiled = None
        self._idle.clear()

    def _borrow(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._lock:
            if self._compiled is None:
                raise RunnerError("the openvino model is closed; open it again")
            return self._compiled.create_infer_request()


def _give_ranks(model: Any) -> None:
    """OpenVINO 2026 fails on inputs of unknown rank; ours is the timestep, which the shell always gives as (batch,)."""
    shapes = {port: [-1] for port in model.inputs if port.get_partial_shape().rank.is_dynamic}
    if shapes:
        model.reshape(shapes)


def _ports(ports: Sequence[Any]) -> dict[str, str]:
    return {port.get_any_name(): _dtype(port) for port in ports}


def _dtype(port: Any) -> str:
    code = port.get_element_type().get_type_name()
    if code not in DTYPES:
        raise RunnerError(f"tensor {port.get_any_name()} has type {code}; legal: {', '.join(DTYPES)}")
    return DTYPES[code]
