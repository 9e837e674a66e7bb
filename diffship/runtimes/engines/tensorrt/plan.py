"""A plan that is loaded: TensorRT's engine, its tensors, and the execution contexts that run it."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffship.core.errors import BundleError, DiffshipError, RunnerError, UnsupportedError
from diffship.runtimes.engines.engine import first_line
from diffship.runtimes.engines.tensorrt.jit_cache import JitCache
from diffship.runtimes.engines.tensorrt.values import native_dtype
from diffship.targets.tensorrt.libraries import PACKAGES, journal
from diffship.targets.tensorrt.plan import KINDS, PlanFacts


class Plan:
    """An engine of TensorRT, or of TensorRT-RTX, which has a runtime config and captures CUDA graphs itself.

    inputs and outputs: native dtypes by name. capture: whether CUDA graphs are to be captured here; the first context
    that cannot be captured turns it off.
    """

    def __init__(self, trt: Any, runtime: Any, engine: Any, facts: PlanFacts, graphs: bool, cache: Path | None) -> None:
        """Raises BundleError if the engine is not what `facts` says."""
        self.trt = trt
        self._runtime = runtime  # must outlive its engine
        self.engine = engine
        self.facts = facts
        self.label = PACKAGES[facts.flavour]
        self.inputs, self.outputs = _tensors(trt, engine)
        _compare(trt, engine, facts, self.inputs, self.outputs)
        self.scratch_bytes = int(engine.device_memory_size_v2)
        rtx = facts.flavour == "rtx"
        self.capture = graphs and not rtx
        self._config = _runtime_config(trt, engine, graphs) if rtx else None
        self._jit = JitCache(self._config, cache) if rtx else None
        self._lock = threading.Lock()

    def context(self) -> Any:
        """A new execution context, to which the caller gives its memory.

        So all contexts of one stream can share that memory: a context that was captured must not be changed any more,
        and there is one for each shape.
        """
        own = self._config
        if own is None:
            own = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            context = self.engine.create_execution_context(own)
        return self.expect(context, "gives no execution context")

    def expect(self, given: Any, complaint: str) -> Any:
        """`given`, unless it is None or False, by which TensorRT reports failure: then raises RunnerError with its last
        words."""
        if given is None or given is False:
            raise RunnerError(f"{self.label} {complaint}: {journal(self.trt).words()}")
        return given

    def save_kernels(self) -> None:
        """Keep what was compiled so far, if a folder for it was given."""
        if self._jit is not None:
            self._jit.save()

    def close(self) -> None:
        """Let go of the engine; its contexts must be gone."""
        self._jit = self._config = self.engine = None
        self._runtime = None


def load_engine(trt: Any, path: Path, where: str) -> tuple[Any, Any]:
    """TensorRT's runtime and engine, deserialised from a memory map: the plan is never on the heap.

    Raises:
        BundleError: it is no plan.
        UnsupportedError: it is none for this machine, with the library's reasons.
        RunnerError: it is refused.
    """
    runtime = trt.Runtime(journal(trt))
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            _require_valid(trt, runtime, view, where)
            engine = runtime.deserialize_cuda_engine(view)
    except DiffshipError:
        raise
    except Exception as fault:
        raise BundleError(f"{where} cannot be read: {first_line(fault)}") from None
    if engine is None:
        raise RunnerError(f"{where} is refused: {journal(trt).words()}")
    return runtime, engine


def _require_valid(trt: Any, runtime: Any, view: mmap.mmap, where: str) -> None:
    """RTX can tell from the first bytes why a plan would not load."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, bits = runtime.get_engine_validity(view)
    if validity != trt.EngineValidity.INVALID:
        return
    causes = trt.EngineInvalidityDiagnostics.__members__
    names = [name for name, cause in causes.items() if int(bits) & int(cause)]
    if "MALFORMED_ENGINE" in names:
        raise BundleError(
            f"{where} is damaged, or no plan of {trt.__name__} {trt.__version__}. Run: diffship verify DIR"
        )
    raise UnsupportedError(
        f"{where} does not load here: {', '.join(names) or journal(trt).words()}. Run: diffship doctor"
    )


def _runtime_config(trt: Any, engine: Any, graphs: bool) -> Any:
    """RTX swaps better kernels in while it runs, so only its own capture knows when a graph is worth keeping."""
    config = engine.create_runtime_config()
    strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else trt.CudaGraphStrategy.DISABLED
    config.cuda_graph_strategy = strategy
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return config


def _tensors(trt: Any, engine: Any) -> tuple[dict[str, str], dict[str, str]]:
    sides: dict[Any, dict[str, str]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise UnsupportedError(f"tensor {name} of the plan lies in host memory; parts of ours have none such")
        sides[engine.get_tensor_mode(name)][name] = native_dtype(name, engine.get_tensor_dtype(name))
    return sides[trt.TensorIOMode.INPUT], sides[trt.TensorIOMode.OUTPUT]


def _compare(trt: Any, engine: Any, facts: PlanFacts, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """The file beside the plan may be of another plan."""
    again = "plan and metadata are not of one export; export the part again"
    for told, found in ((facts.inputs, inputs), (facts.outputs, outputs)):
        if {name: entry.dtype for name, entry in told.items()} != found:
            raise BundleError(f"the plan has {dict(found)}, its metadata says {', '.join(told)}: {again}"[:400])
    if engine.num_optimization_profiles != facts.profiles:
        raise BundleError(f"the plan has {engine.num_optimization_profiles} profiles, not {facts.profiles}: {again}")
    for name, entry in facts.inputs.items():
        if -1 not in tuple(engine.get_tensor_shape(name)):
            continue  # a fixed shape needs no profile
        for index, shapes in enumerate(entry.profiles):
            found_shapes = [list(dims) for dims in engine.get_tensor_profile_shape(name, index)]
            if found_shapes != [shapes[kind] for kind in KINDS]:
                raise BundleError(f"profile {index} of {name} is {found_shapes} in the plan: {again}")
