"""ONNX bundles in ONNX Runtime, on the CPU or an NVIDIA GPU, from the same files."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffship.core.errors import ConfigError, MissingExtra, RunnerError, UnsupportedError
from diffship.core.lazy import need
from diffship.core.strict import bounded, bounds, choices
from diffship.runtimes.engines.engine import Probe, Session, first_line, installed, package_version
from diffship.runtimes.engines.onnx_tune import tuned
from diffship.runtimes.engines.onnxruntime_sessions import (
    PLACEMENT,
    CpuSession,
    DeviceSession,
    GraphSession,
    require_placement,
)

LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_REORDER_BYTES = 256 << 20
_TUNE_BYTES = 64 << 20  # a graph without its weights; ours have fewer than 4 MB
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_ERROR = 3  # log severity: errors only


@dataclass(frozen=True)
@bounded
class OnnxRuntimeRunner:
    """Options of ONNX Runtime.

    threads: 0 takes every core this process may use. spinning: workers wait actively between operators.
    optimisation: "all" also reorders convolution weights: 11 % faster calls of an 11 M U-Net, none of SD1.5's, which
    then loads in 11 s instead of 2 and holds its weights twice; "auto" takes it for parts below 256 MB.
    arena, memory_pattern: faster repeated calls for more resident memory. prepack: reorder weights once at load.
    sizes: fixed values of named axes, for example {"batch_size": 2}; calls of other sizes are then refused.
    tune: rewrite GroupNormalization and Attention in memory to operators with faster kernels.
    graphs: CUDA graphs, one for each combination of shapes; calls then wait for each other.
    allow_host: on a GPU, accept that operators for which there is no kernel are computed on the host.
    """

    name: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"
    targets: ClassVar[frozenset[str]] = frozenset({"onnx"})

    device: str = field(default="cpu", metadata=choices("cpu", "cuda"))
    device_id: int = field(default=0, metadata=bounds(0, 63))
    threads: int = field(default=0, metadata=bounds(0, 1024))
    optimisation: str = field(default="auto", metadata=choices("auto", *LEVELS))
    spinning: bool = True
    arena: bool = True
    memory_pattern: bool = True
    prepack: bool = True
    tune: bool = True
    graphs: bool = False
    allow_host: bool = False
    sizes: dict[str, int] = field(default_factory=dict, metadata=bounds(1, 65536))

    def __post_init__(self) -> None:
        if self.graphs and self.device != "cuda":
            raise ConfigError("graphs are CUDA graphs: they go with device cuda")

    def open(self, files: Sequence[Path]) -> Session:
        """Open `files[0]`, an ONNX file in a bundle (or a stage cut from one) with its data beside it."""
        runtime = _import()
        providers = self._providers(runtime)
        options = self._options(runtime, sum(file.stat().st_size for file in files))
        try:
            model = self._model(files[0], options)
            session = runtime.InferenceSession(model, options, providers=providers)
        except Exception as fault:
            raise RunnerError(
                f"onnxruntime refuses {files[0].parent.name}/{files[0].name}: {first_line(fault)}"
            ) from None
        if self.device == "cpu":
            return CpuSession(session)
        self._require_cuda(session)
        if not self.allow_host:
            require_placement(session, runtime.__version__)
        return (GraphSession if self.graphs else DeviceSession)(session, runtime, self.device, self.device_id)

    def _model(self, path: Path, options: Any) -> str | bytes:
        """The path, or the tuned model, which finds its weights in the same folder."""
        if not self.tune or self.optimisation == "off" or path.stat().st_size > _TUNE_BYTES:
            return str(path)
        options.add_session_config_entry(_DATA_FOLDER, str(path.parent))
        return tuned(path.read_bytes()) or str(path)

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        """Measured: the process grows to 1.13 times an fp32 file, weights that stay in it included; fp16: 4.1 times."""
        growth = 1.5 if precision == "fp32" else 4.3
        return int(growth * file_bytes) + (64 << 20)

    @classmethod
    def probe(cls) -> Probe:
        install = "pip install 'diffship[onnxruntime]', or 'diffship[onnxruntime-gpu]' for NVIDIA GPUs"
        if not installed("onnxruntime"):
            return Probe(cls.name, False, reason="onnxruntime is not installed", install=install)
        both = package_version("onnxruntime") and package_version("onnxruntime-gpu")
        conflict = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, "
        conflict = conflict + "then install one" if both else ""
        try:
            runtime = _import()
            devices = tuple(
                device for device, provider in _PROVIDERS.items() if provider in runtime.get_available_providers()
            )
            return Probe(cls.name, True, runtime.__version__, devices, conflict=conflict)
        except (ImportError, OSError, AttributeError, MissingExtra) as fault:
            reason = f"onnxruntime does not start: {first_line(fault)}"
            return Probe(cls.name, False, package_version("onnxruntime"), (), reason, install, conflict)

    def _options(self, runtime: Any, file_bytes: int) -> Any:
        options = runtime.SessionOptions()
        options.log_severity_level = _ERROR
        level = self.optimisation
        if level == "auto":
            level = "all" if file_bytes < _REORDER_BYTES else "extended"
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, LEVELS[level])
        options.intra_op_num_threads = self.threads or usable_cores()
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = self.arena
        options.enable_mem_pattern = self.memory_pattern
        entries = {
            "session.intra_op.allow_spinning": str(int(self.spinning)),
            # Else the workers of one part wait actively after its call, on the cores that the next part needs: pictures
            # in four steps took 1.6 times as long.
            "session.force_spinning_stop": "1",
            "session.disable_prepacking": str(int(not self.prepack)),
            # Else activations before weights of 4 or 8 bits are rounded to 8 bits, in silence: 56 dB instead of 150.
            "session.qdq_matmulnbits_accuracy_level": "1",
            # Not session.set_denormal_as_zero: it flushes denormals in the caller's thread too, for good.
        }
        entries |= {PLACEMENT: "1"} if self.device == "cuda" else {}
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        for axis, size in self.sizes.items():
            options.add_free_dimension_override_by_name(axis, size)
        return options

    def _providers(self, runtime: Any) -> list[Any]:
        wanted = _PROVIDERS[self.device]
        there = runtime.get_available_providers()
        if wanted not in there:
            raise UnsupportedError(
                f"this onnxruntime has no {wanted}; it has {', '.join(there)}. "
                "Run: pip uninstall onnxruntime && pip install 'diffship[onnxruntime-gpu]'"
            )
        if self.device == "cpu":
            return [wanted]
        options = {"device_id": str(self.device_id), "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        options |= {"enable_cuda_graph": "1"} if self.graphs else {}
        return [(wanted, options), _PROVIDERS["cpu"]]

    def _require_cuda(self, session: Any) -> None:
        """ONNX Runtime falls back to the CPU with a log line only; that is refused here."""
        if _PROVIDERS["cuda"] not in session.get_providers():
            raise UnsupportedError(
                "onnxruntime could not start CUDA: no driver, CUDA or cuDNN. Run: diffship doctor, or use --device cpu"
            )


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def usable_cores() -> int:
    """Cores that this process may run on; ONNX Runtime's own default counts those of the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_imported = threading.Lock()


def _import() -> Any:
    """The onnxruntime module, with telemetry off."""
    onnxruntime = need("onnxruntime")
    with _imported:
        if hasattr(onnxruntime, "disable_telemetry_events"):
            onnxruntime.disable_telemetry_events()
    return onnxruntime
