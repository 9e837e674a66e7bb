"""Build one engine from one ONNX file with TensorRT's own parser and builder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffship.core.errors import UnsupportedError
from diffship.core.memory import peak_bytes
from diffship.targets.tensorrt.libraries import journal, library
from diffship.targets.tensorrt.plan import KINDS

_WORDS = 400  # of an error of the library


@dataclass(frozen=True)
class Order:
    """What to build: an ONNX file with its weights beside it, and where the plan goes.

    shapes: {input: {"min": [...], "opt": [...], "max": [...]}}. sm: compute capabilities (RTX). timing: a file that
    keeps measured timings (TensorRT).
    """

    onnx: str
    out: str
    flavour: str
    shapes: dict[str, dict[str, list[int]]]
    sm: tuple[int, ...] = ()
    refit: bool = False
    strip: bool = False
    timing: str = ""


Say = Callable[[dict[str, Any]], None]


def build(order: Order, say: Say) -> dict[str, Any]:
    """Write the plan; what is reported of it. `say` hears {"phase", "done", "total"}.

    Raises:
        UnsupportedError: the parser or the builder refuses the graph, with the library's reason.
    """
    trt, started = library(order.flavour), time.monotonic()
    log = journal(trt)
    builder = trt.Builder(log)
    if not builder:
        raise UnsupportedError(f"TensorRT has no builder here (it needs a GPU and its driver): {log.words()}")
    network, parser = parsed(trt, builder, log, order.onnx)
    decomposable = allow_decomposition(trt, network)
    config = _configured(trt, builder, order)
    config.progress_monitor = _monitor(trt, say)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedError(f"TensorRT cannot build {Path(order.onnx).parent.name}: {log.words()}")
    with open(order.out, "wb") as file:
        file.write(plan)
    _keep_timing(config, order)
    del parser  # it owns the weights that the network points to
    seconds, peak = time.monotonic() - started, peak_bytes()
    facts = {"layers": network.num_layers, "attentions": decomposable, "bytes": Path(order.out).stat().st_size}
    return {"seconds": round(seconds, 2), "peak_bytes": peak, "version": str(trt.__version__), **facts}


def parsed(trt: Any, builder: Any, log: Any, onnx: str) -> tuple[Any, Any]:
    """A strongly typed network of the file, and its parser, which must outlive it.

    Raises:
        UnsupportedError: naming the first operator that the parser refuses.
    """
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(onnx):
        faults = [parser.get_error(place) for place in range(parser.num_errors)]
        told = f"{faults[0].node_operator() or 'a node'} {faults[0].node_name()}: {faults[0].desc()}" if faults else ""
        raise UnsupportedError(f"TensorRT cannot read the graph: {_short(told or log.words())}")
    return network, parser


def allow_decomposition(trt: Any, network: Any) -> int:
    """Let every attention become plain products if there is no fused kernel for its shapes; how many there are.

    Without it a build ends at head widths 4, 8 and 512 in half precision, and at shapes that are not fixed.
    """
    count = 0
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding gives the base class
            layer.attention.decomposable = True
            count += 1
    return count


def _configured(trt: Any, builder: Any, order: Order) -> Any:
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, shapes in order.shapes.items():
        profile.set_shape(name, *(tuple(shapes[kind]) for kind in KINDS))
    if config.add_optimization_profile(profile) < 0:
        raise UnsupportedError(f"TensorRT refuses the shapes {order.shapes}")
    for flag, wanted in (("REFIT", order.refit), ("STRIP_PLAN", order.strip)):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if order.sm:
        config.num_compute_capabilities = len(order.sm)
        for place, value in enumerate(order.sm):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{value}"), place)
    if order.timing:
        known = Path(order.timing).read_bytes() if Path(order.timing).is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _keep_timing(config: Any, order: Order) -> None:
    if order.timing:
        from diffship.core.atomic import write_file

        write_file(Path(order.timing), bytes(config.get_timing_cache().serialize()))


def _monitor(trt: Any, say: Say) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the steps of the outermost phases; those within them are hundreds."""

        def __init__(self) -> None:
            super().__init__()
            self._totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._totals[phase] = steps
                say({"phase": phase, "done": 0, "total": steps})

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._totals:
                say({"phase": phase, "done": step + 1, "total": self._totals[phase]})
            return True

        def phase_finish(self, phase: str) -> None:
            if phase in self._totals:
                steps = self._totals.pop(phase)
                say({"phase": phase, "done": steps, "total": steps})

    return Monitor()


def _short(text: str) -> str:
    return " ".join(str(text).split())[:_WORDS]
