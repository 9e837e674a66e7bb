"""Which node of a graph TensorRT gets wrong: its stretches are built one by one, and run beside ONNX Runtime.

An engine cannot be looked into, but the graph that it was built from can: `export --to onnx` in the same precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Part
from diffship.exporters.onnx.graph import NAMES
from diffship.exporters.tensorrt.build import Order
from diffship.exporters.tensorrt.process import run_build
from diffship.runtimes.engines.engine import Engine, Opener, Session, make_engine
from diffship.runtimes.proof.suspects import Arrays, Look, suspects, tolerance_of
from diffship.targets.tensorrt.libraries import library
from diffship.targets.tensorrt.plan import KINDS, PlanFacts, PlanInput, PlanOutput, read_facts

if TYPE_CHECKING:
    import onnx
    from onnx import numpy_helper
else:
    onnx, numpy_helper = lazy("onnx"), lazy("onnx.numpy_helper")

_FIXED = "stage_fixed.onnx"  # beside the stretch, whose weights it shares, and removed with it


def through_graphs(graphs: str | Path) -> Look:
    """A `Look` that finds the wrong node of a failed part of a TensorRT bundle in the ONNX bundle `graphs`."""
    opened = Bundle.open(Path(graphs))

    def look(bundle: Bundle, part: Part, engine: Engine, feeds: Arrays) -> tuple[str, ...]:
        graph = _graph_of(opened, part)
        flavour = read_facts(bundle.file(part.files[1])).flavour
        stretches = _Stretches(engine, flavour, frozenset(spec.name for spec in part.inputs))
        return suspects(opened.file(graph.files[0]), stretches, feeds, tolerance_of(part))

    return look


def _graph_of(graphs: Bundle, part: Part) -> Part:
    """The graph that the plan of `part` was built from.

    Raises:
        ConfigError: `graphs` holds no graphs, or those of other weights or another precision.
    """
    if graphs.manifest.target != "onnx":
        raise ConfigError(f"{graphs.path} holds {graphs.manifest.target}; --graphs takes a bundle of --to onnx")
    graph = graphs.part(part.name)
    for what in ("precision", "source_digest"):
        ours, theirs = getattr(graph, what), getattr(part, what)
        if ours != theirs:
            raise ConfigError(f"{graphs.path}: {what} of {part.name} is {ours[:16]}; the engine's is {theirs[:16]}")
    return graph


@dataclass(frozen=True)
class _Stretches:
    """Opens ONNX files, the stretches of a graph, in TensorRT: each is built for the shapes of its first call.

    fed: names that the caller feeds; other integer inputs are sizes, and become constants.
    """

    engine: Opener
    flavour: str
    fed: frozenset[str]

    def open(self, files: Sequence[Path]) -> Session:
        return _Stretch(files[0], self)


class _Stretch:
    """A Session that builds a plan when it is run."""

    def __init__(self, file: Path, stretches: _Stretches) -> None:
        self._file, self._stretches = file, stretches
        self._model = onnx.load(str(file), load_external_data=False)
        self.inputs: Mapping[str, str] = _types(self._model.graph.input)
        self.outputs: Mapping[str, str] = _types(self._model.graph.output)

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
        fixed = {name: array for name, array in feeds.items() if self._is_size(name, array)}
        kept = {name: np.asarray(array) for name, array in feeds.items() if name not in fixed}
        if not kept:  # of constants and sizes alone the library makes no engine
            return _run(make_engine("onnxruntime", {"optimisation": "off"}), [self._file], feeds, outputs)
        model = self._file.with_name(_FIXED)
        model.write_bytes(_with_shapes(self._model, kept, fixed))
        with temporary_folder("stretch") as folder:
            return _run(self._stretches.engine, self._built(model, kept, folder), kept, outputs)

    def keep(self, array: np.ndarray) -> Any:
        return array

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _is_size(self, name: str, array: np.ndarray) -> bool:
        return name not in self._stretches.fed and array.dtype.kind in "iub"

    def _built(self, model: Path, feeds: Arrays, folder: Path) -> list[Path]:
        """Plan and metadata."""
        flavour, plan, beside = self._stretches.flavour, folder / "stretch.plan", folder / "stretch.json"
        shapes = {name: {kind: list(array.shape) for kind in KINDS} for name, array in feeds.items()}
        run_build(Order(str(model), str(plan), flavour, shapes), "a stretch", Job())
        facts = PlanFacts(
            flavour=flavour,
            version=str(library(flavour).__version__),
            precision="",
            inputs={name: PlanInput(self.inputs[name], (shapes[name],)) for name in feeds},
            outputs={name: PlanOutput(dtype) for name, dtype in self.outputs.items()},
        )
        beside.write_text(json.dumps(facts.to_json()), encoding="utf-8")
        return [plan, beside]


def _run(engine: Opener, files: Sequence[Path], feeds: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
    session = engine.open(files)
    try:
        return session.run(feeds, outputs)
    finally:
        session.close()


def _with_shapes(model: onnx.ModelProto, feeds: Arrays, sizes: Arrays) -> bytes:
    """The stretch for these shapes only, with `sizes` as constants."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    ports = [port for port in graph.input if port.name in feeds]
    for port in ports:
        port.CopyFrom(
            onnx.helper.make_tensor_value_info(port.name, port.type.tensor_type.elem_type, feeds[port.name].shape)
        )
    del graph.input[:]
    graph.input.extend(ports)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in sizes.items())
    return fixed.SerializeToString()  # type: ignore[no-any-return]


def _types(ports: Any) -> dict[str, str]:
    return {port.name: NAMES[port.type.tensor_type.elem_type] for port in ports}
