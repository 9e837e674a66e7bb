"""Onnx: the exporter class, whose fields are the flags, the recipe entry and the manifest entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffship.core import precision, spec
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.job import Bytes, Job, digest_of
from diffship.core.lazy import lazy, need
from diffship.core.manifest import Part
from diffship.core.precision import PRECISIONS, Precision, precision_of
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices, plain
from diffship.exporters.onnx import operators  # noqa: F401  fills the table of operators
from diffship.exporters.onnx.capture import capture, decomposed, trace_sizes
from diffship.exporters.onnx.graph import IR_VERSION
from diffship.exporters.onnx.layout import DATA_FILE, MODEL_FILE, write_part_config, write_pipeline_files
from diffship.exporters.onnx.pour import data_bytes, pour
from diffship.exporters.onnx.translate import OPERATORS, Translation
from diffship.models.parts.component import SHOWN, Component, unexpected, weight_problems
from diffship.models.parts.filling import INNER, computed, sources
from diffship.models.pipeline import Pipeline
from diffship.models.walks.points import point_paths

if TYPE_CHECKING:
    import onnx
    from torch import nn
else:
    onnx = lazy("onnx")

_BF16_OPSET = 22  # the first whose convolutions take it
_GRAPH_BYTES = 1 << 30  # memory that making a graph takes: measured 0.6 for SD1.5, 0.75 for SDXL


@dataclass(frozen=True)
@bounded
class Onnx:
    """ONNX files in the layout of optimum's ONNX Runtime pipelines.

    precision: type of weights and of float inputs and outputs (`timestep` is float32 in all). "bf16" is for graphs
    that GPU engines are built from: no CPU engine runs it, so it is proved in float32 arithmetic with the weights as
    they were rounded; its inputs and outputs are float32, since numpy has no bfloat16. A VAE whose config
    says that float16 is too narrow for it (`force_upcast`) stays in fp32.
    opset: from 20, 21 and 23 on, Gelu, GroupNormalization and Attention are single operators.
    """

    name: ClassVar[str] = "onnx"
    extra: ClassVar[str] = "onnx"
    proved_here: ClassVar[bool] = True
    trajectory_steps: ClassVar[int] = 0  # each part is proved here; `--trajectory` for those that run elsewhere

    precision: str = field(
        default="fp32",
        metadata={
            **choices(*PRECISIONS),
            "help": "of weights and of float inputs and outputs; no CPU engine runs bf16, which GPU builders take",
        },
    )
    opset: int = field(
        default=23,
        metadata={**bounds(min(IR_VERSION), max(IR_VERSION)), "help": f"{min(IR_VERSION)} to {max(IR_VERSION)}"},
    )

    def __post_init__(self) -> None:
        if self.format.activations == "bfloat16" and self.opset < _BF16_OPSET:
            raise ConfigError(f"opset {self.opset} has no bfloat16 convolution; bf16 needs {_BF16_OPSET} or more")

    @property
    def format(self) -> Precision:
        """What `precision` means."""
        return precision_of(self.precision)

    def of(self, component: Component) -> Onnx:
        """The exporter of this part: itself, or one of fp32 if fp16 would overflow; bf16 has float32's range."""
        fitting = self.format.for_range(component.overflows_half)
        return self if fitting is self.format else replace(self, precision=fitting.name)

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop an export of these components, found without reading a weight.

        Raises:
            MissingExtra: onnx is not installed.
        """
        need("onnx")
        return [problem for component in pipeline.components.values() for problem in weight_problems(component)]

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        """Twice the least height by three times the least width: height is not width, no attention has one token."""
        factors = {"height": 2, "width": 3}
        sizes = {
            axis: least * factors.get(axis.rpartition("_")[2], 1) for axis, least in component.smallest_sizes().items()
        }
        return {**sizes, "batch_size": batch}

    def disk_bytes(self, component: Component) -> int:
        """What the files of a part take, to a few per cent."""
        return component.parameters * self.of(component).format.weight_bytes + (4 << 20)

    def memory_bytes(self, component: Component) -> int:
        """Memory that `export` takes beside the process as it is: the graph, or the largest tensor three times."""
        largest = max((component.weights.meta(n).count for n in component.weights.names()), default=0)
        return max(_GRAPH_BYTES, 3 * 4 * largest)

    def export(self, component: Component, out: Path, job: Job) -> Part:
        """Write `<part>/model.onnx`, its data and config below `out`; not proved yet.

        A graph is made once per (architecture, options, versions) if `job` keeps a folder; only weights stream
        through the second time.

        Raises:
            SourceError: the weights do not fit the config, or are not finite.
            UnsupportedError: the module has an operation without an ONNX form.
        """
        if self.of(component) is not self:
            return self.of(component).export(component, out, job)
        job.progress(f"graph {component.name}", 0, 1)
        cached = job.once(self.graph_digest(component), lambda path: path.write_bytes(self.graph(component)))
        job.progress(f"graph {component.name}", 1, 1)
        model = onnx.load(str(cached), load_external_data=False)
        folder = out / component.name
        folder.mkdir(parents=True)
        done, total = 0, Bytes(component.weights.nbytes)

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            job.progress(f"weights {component.name}", done, total)

        module = component.meta
        digest = pour(model, component.weights, folder, component.name, on_bytes, _held(module, component))
        (folder / MODEL_FILE).write_bytes(cached.read_bytes())
        write_part_config(component, folder)
        files = tuple(f"{component.name}/{name}" for name in (MODEL_FILE, DATA_FILE))
        count = component.parameters
        extra = {
            "opset": self.opset,
            "nodes": len(model.graph.node),
            "data_bytes": data_bytes(model),
            "parameters": count,
            **_left_out(module, component),
        }
        return Part(
            name=component.name,
            files=files,
            inputs=tuple(map(self.format.port, component.inputs)),
            outputs=tuple(map(self.format.port, component.outputs)),
            precision=self.precision,
            source_digest=digest,
            extra=extra,
        )

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        """Write model_index.json, scheduler and tokenizers below `out`."""
        write_pipeline_files(pipeline, out)

    def graph(self, component: Component) -> bytes:
        """The ONNX file without its weights: it names them, and where in the data file they will lie."""
        specs = component.inputs
        module = component.meta
        programs = capture(module, specs, trace_sizes(component.smallest_sizes()), self.format)
        need("onnx")  # teaches numpy bfloat16
        constants = computed(module, component.build, component.name)
        programs = decomposed(programs, OPERATORS)
        translation = Translation(programs, self.opset, lambda name: name.removeprefix(INNER), constants)
        points = point_paths(component, module.get_submodule("inner"))
        model = translation.run(specs, component.outputs, "diffship", points)
        return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]

    def graph_digest(self, component: Component) -> str:
        """Names everything that `graph` depends on."""
        facts = {
            "code": _code_digest(),
            "options": asdict(self),
            "part": [component.name, component.class_name],
            "config": component.config,
            "specs": [plain(spec) for spec in (*component.inputs, *component.outputs)],
            "versions": _versions(),
        }
        return digest_of(facts)


def _left_out(module: nn.Module, component: Component) -> dict[str, object]:
    """What the manifest says of weights that the part does not take."""
    names = unexpected(module, component.weights)
    return {"unused_tensors": {"count": len(names), "first": names[:SHOWN]}} if names else {}


def _held(module: nn.Module, component: Component) -> dict[str, str]:
    """{name in a graph: name in the weights} of tied tensors whose names differ there."""
    found = sources(module, set(component.weights.names()))
    return {name.removeprefix(INNER): source for name, source in found.items() if name.removeprefix(INNER) != source}


@cache
def _code_digest() -> str:
    """sha256 over the source of everything that makes a graph: this room, models, kinds, precisions and specs."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    package = here.parents[1]
    files = [file for room in (here, package / "models", package / "kinds") for file in room.rglob("*.py")]
    for file in sorted([*files, Path(precision.__file__), Path(spec.__file__)]):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _versions() -> Mapping[str, str]:
    return {name: need(name).__version__ for name in ("torch", "diffusers", "transformers")}
