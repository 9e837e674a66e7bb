"""The options of TensorRT, and how a plan is opened with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffship.core.errors import BundleError, DiffshipError, MissingExtra, UnsupportedError
from diffship.core.strict import bounded, bounds, choices
from diffship.runtimes.engines.engine import Probe
from diffship.runtimes.engines.tensorrt.device import Device, cuda_runtime, gpu_count
from diffship.runtimes.engines.tensorrt.jit_cache import cache_file
from diffship.runtimes.engines.tensorrt.library import check_gpu, check_version
from diffship.runtimes.engines.tensorrt.plan import Plan, load_engine
from diffship.runtimes.engines.tensorrt.session import TensorRtSession
from diffship.runtimes.engines.tensorrt.weights import read_weights
from diffship.targets.tensorrt.gpus import capability_text
from diffship.targets.tensorrt.libraries import MODULES, PACKAGES, library
from diffship.targets.tensorrt.plan import PlanFacts, read_facts


@dataclass(frozen=True)
@bounded
class TensorRtRunner:
    """Options of TensorRT-RTX and TensorRT.

    device_id: which GPU. contexts: how many calls run at once; each has its own activations on the GPU. wait_seconds:
    how long a call waits if all are busy. graphs: CUDA graphs, one for each combination of shapes. runtime_cache: a
    folder that keeps the kernels which TensorRT-RTX compiles for this GPU ("" = compiled anew in each process).
    weights: an ONNX bundle of the same precision (of a fine-tune, or with a fused LoRA), or a folder with
    PART.safetensors by the names of the plan: parts that are found there are refitted as they open, which a stripped
    plan needs.
    """

    name: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt-rtx"
    targets: ClassVar[frozenset[str]] = frozenset({"tensorrt"})

    device: str = field(default="cuda", metadata=choices("cuda"))
    device_id: int = field(default=0, metadata=bounds(0, 63))
    contexts: int = field(default=1, metadata=bounds(1, 64))
    wait_seconds: float = field(default=60.0, metadata=bounds(0.001, 86400))
    graphs: bool = True
    runtime_cache: str = ""
    weights: str = ""

    def open(self, files: Sequence[Path]) -> TensorRtSession:
        """Open `files[0]`, a plan, with the metadata `files[1]` beside it.

        Raises:
            MissingExtra: the library that built it, or cuda-bindings, is not installed.
            UnsupportedError: another version of it, no GPU or another kind, or a stripped plan without weights.
            BundleError: plan or metadata is damaged. RunnerError: the library refuses the plan.
        """
        plan, facts = _checked(files)
        where = f"{plan.parent.name}/{plan.name}"
        trt = library(facts.flavour)
        check_version(trt, facts, where)
        device = Device(self.device_id, PACKAGES[facts.flavour])
        device.use()
        check_gpu(facts, device, where)
        weights = self._weights(facts, plan, where)
        cache = cache_file(self.runtime_cache, plan, device.capability()) if facts.flavour == "rtx" else None
        loaded = Plan(trt, *load_engine(trt, plan, where), facts, self.graphs, cache)
        session = TensorRtSession(loaded, device, self.contexts, self.wait_seconds)
        if weights is not None:
            try:
                session.refit(weights)
            except BaseException:
                session.close()
                raise
        return session

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        """0, so that no part is run in stretches: weights go from a memory map to the GPU, and a plan cannot be cut."""
        return 0

    @classmethod
    def probe(cls) -> Probe:
        install = "pip install 'diffship[tensorrt-rtx]', or 'diffship[tensorrt]' for data-centre GPUs"
        found, reasons = _libraries()
        if not found:
            reason = "; ".join(reasons) or "tensorrt-rtx and tensorrt are not installed"
            return Probe(cls.name, False, reason=reason, install=install)
        version = ", ".join(f"{flavour} {module.__version__}" for flavour, module in found.items())
        try:
            gpus = _gpus(next(iter(found)))
        except DiffshipError as fault:
            return Probe(cls.name, False, version, (), str(fault).removesuffix(". Run: diffship doctor"), install)
        return Probe(cls.name, True, version, gpus)

    def _weights(self, facts: PlanFacts, plan: Path, where: str) -> dict[str, np.ndarray] | None:
        part = plan.parent.name
        found = read_weights(Path(self.weights), part, facts) if self.weights else None
        if found is None and facts.stripped:
            raise UnsupportedError(
                f"{where} holds no weights: it was exported with --strip. Give an ONNX bundle of its precision, or "
                f"the folder of {part}.safetensors, with --option weights=FOLDER"
            )
        return found


def _checked(files: Sequence[Path]) -> tuple[Path, PlanFacts]:
    if len(files) != 2:
        raise BundleError(f"a TensorRT part has two files, a plan and its metadata; this one has {len(files)}")
    return files[0], read_facts(files[1])


def _libraries() -> tuple[dict[str, Any], list[str]]:
    """(module by flavour, why not for those that are installed and do not start)."""
    found: dict[str, Any] = {}
    reasons = []
    for flavour in MODULES:
        try:
            found[flavour] = library(flavour)
        except MissingExtra:
            continue
        except DiffshipError as fault:
            reasons.append(str(fault))
    return found, reasons


def _gpus(flavour: str) -> tuple[str, ...]:
    """`cuda:0 NVIDIA L4 (SM 8.9)` for each.

    Raises:
        DiffshipError: no driver, no GPU, or no cuda-bindings to ask with.
    """
    extra = PACKAGES[flavour]
    devices = [Device(index, extra) for index in range(gpu_count(cuda_runtime(extra)))]
    return tuple(f"cuda:{each.index} {each.model()} (SM {capability_text(each.capability())})" for each in devices)
