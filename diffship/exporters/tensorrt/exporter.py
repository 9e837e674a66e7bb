"""TensorRt: the exporter class, whose fields are the flags, the recipe entry and the manifest entry."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from diffship.core.dtype import TensorMeta
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.family import Family
from diffship.core.job import Job, digest_of, require_memory
from diffship.core.lazy import lazy
from diffship.core.limits import MIB
from diffship.core.manifest import Part
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices
from diffship.exporters.onnx.graph import IR_VERSION, NAMES
from diffship.exporters.onnx.layout import write_part_config, write_pipeline_files
from diffship.exporters.tensorrt.build import Order
from diffship.exporters.tensorrt.process import run_build
from diffship.exporters.tensorrt.shapes import Range, Shape, axis_ranges, check_names, parse_shapes, profile
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.targets.tensorrt.gpus import check_sm
from diffship.targets.tensorrt.libraries import FLAVOURS, RTX, has_driver, journal, library
from diffship.targets.tensorrt.plan import KINDS, PlanFacts, PlanInput, PlanOutput

if TYPE_CHECKING:
    import onnx

    from diffship.exporters.onnx import Onnx
else:
    onnx = lazy("onnx")

# measured (RTX 1.7.1): a build grows to about 3.1 times the file of the weights, and 0.65 GB
_BUILD_FACTOR, _BUILD_BYTES = 3.1, 650 * MIB
_BF16_SM = 80


def _option(text: str, default: Any, legal: Mapping[str, Any] = MappingProxyType({})) -> Any:
    return field(default=default, metadata={**legal, "help": text})


@dataclass(frozen=True)
@bounded
class TensorRt:
    """TensorRT engines ("plans"), strongly typed: the graph says in which precision everything is computed.

    flavour: `rtx` (TensorRT-RTX) builds on any machine, for the GPUs of `sm`; `trt` (TensorRT) builds on the GPU that
    will run it. sm: compute capabilities, such as 89 for an L4 and RTX 40, 120 for RTX 50; all go into one file.
    precision: of the graph; an SDXL decoder that overflows in half precision stays float32. bf16 needs SM 80 or more.
    min_shapes, opt_shapes, max_shapes: NAME:AxBx..., as in trtexec; by default half to one and a half times the model's
    size, and up to four images with guidance. refit: weights can be replaced in the engine. strip: the plan holds no
    weights; they are put in before the first run. opset: of the graph that is built from.
    """

    name: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt-rtx"
    trajectory_steps: ClassVar[int] = 4  # what is built here runs elsewhere, and is proved there

    flavour: str = _option("rtx: built on any machine; trt: built on its GPU", RTX, choices(*FLAVOURS))
    sm: tuple[int, ...] = _option("compute capabilities of the GPUs, such as 89,120", (), bounds(50, 200))
    precision: str = _option("of the graph; bf16 needs SM 80", "fp16", choices("fp16", "bf16", "fp32"))
    min_shapes: tuple[str, ...] = _option("least sizes, as in trtexec: NAME:AxBx...", ())
    opt_shapes: tuple[str, ...] = _option("sizes that are tuned for", ())
    max_shapes: tuple[str, ...] = _option("largest sizes", ())
    refit: bool = _option("weights can be replaced in the engine", False)
    strip: bool = _option("leave the weights out until the first run; with --refit", False)
    opset: int = _option("of the graph that is built from", 23, bounds(min(IR_VERSION), max(IR_VERSION)))

    def __post_init__(self) -> None:
        capabilities = self._capabilities
        self._graphs()  # it refuses an opset, and `_asked` a shape, that cannot be
        self._asked()
        if self._graphs().format.activations == "bfloat16" and any(sm < _BF16_SM for sm in capabilities):
            raise ConfigError(
                f"GPUs below SM {_BF16_SM} have no bfloat16: take --precision fp16, or leave them out of --sm"
            )
        if self.strip and not self.refit:
            raise ConfigError("--strip leaves the weights out, and only --refit can put them in: give both")

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop an export of these components, found without reading a weight.

        Raises:
            MissingExtra: TensorRT is not installed.
            UnsupportedError: `refit` or `strip` without an NVIDIA driver.
            ConfigError: shapes that no input has, that do not fit, or that do not rise.
        """
        library(self.flavour)
        if (self.refit or self.strip) and not has_driver():
            # measured with RTX 1.7.1: the build ends in a failed CUDA call where there is no driver
            raise UnsupportedError(
                "--refit and --strip build on a machine with an NVIDIA driver only; leave them out, or export there"
            )
        check_names(pipeline.components.values(), self._asked())
        for component in pipeline.components.values():
            self.ranges(component, pipeline.family)
        return self._graphs().check(pipeline)

    def disk_bytes(self, component: Component) -> int:
        """What the plan takes at the most, and the graph that it is built from while it is."""
        weights = self.through(component).disk_bytes(component)
        twin = 0 if self._graphs().format.on_cpu else 2 * weights  # in float32, which can be proved here
        return (1 + max(1, len(self._capabilities))) * weights + twin

    def memory_bytes(self, component: Component) -> int:
        """Memory that a build takes beside this process."""
        return int(_BUILD_FACTOR * self.through(component).disk_bytes(component)) + _BUILD_BYTES

    def ranges(self, component: Component, family: Family) -> dict[str, Range]:
        """What the engine of a part takes, by input."""
        return profile(component, family, self._asked())

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        """The smallest sizes that the engine takes, and as near to `batch` samples as it does."""
        ranges = axis_ranges(component, family, self._asked())
        low, _, high = (ranges[kind].get("batch_size", batch) for kind in KINDS)
        return {**ranges["min"], "batch_size": min(max(batch, low), high)}

    @property
    def _capabilities(self) -> tuple[int, ...]:
        """The compute capabilities to build for, rising; raises ConfigError for those that cannot be."""
        return check_sm(self.flavour, self.sm)

    def _graphs(self) -> Onnx:
        from diffship.exporters.onnx import Onnx  # not for --help

        return Onnx(precision=self.precision, opset=self.opset)

    def through(self, component: Component) -> Onnx:
        """The exporter of the graph that a part's engine is built from: in float32 if float16 would overflow."""
        return self._graphs().of(component)

    def build(self, component: Component, pipeline: Pipeline, graph: Part, folder: Path, out: Path, job: Job) -> Part:
        """Write `<part>/model_<flavour>_sm<...>_<precision>.plan` and its metadata below `out`.

        `graph` is the ONNX part below `folder`, proved or not.

        A plan is built once per (graph, weights, flags, shapes, library) if `job` keeps a folder.

        Raises:
            UnsupportedError: an operator that TensorRT does not have, a build that fails, or too little memory.
        """
        model = folder / graph.files[0]
        refuse_operators(library(self.flavour), self.flavour, model)
        ranges = self.ranges(component, pipeline.family)
        require_memory(self.memory_bytes(component), f"the engine of {component.name}")
        key = self.key(graph, model, ranges)
        made: dict[str, Any] = {}

        def make(place: Path) -> None:
            order = Order(
                str(model), str(place), self.flavour, {name: shapes.to_json() for name, shapes in ranges.items()},
                self._capabilities, self.refit, self.strip, self._timing(job),
            )  # fmt: skip
            made.update(run_build(order, component.name, job))

        place = job.once(key, make)
        target = out / component.name
        target.mkdir(parents=True, exist_ok=True)
        stem = self.stem(graph.precision)
        (shutil.copyfile if job.lasting else shutil.move)(place, target / f"{stem}.plan")
        facts = self._facts(graph, ranges, weight_metas(model) if self.refit else {})
        (target / f"{stem}.json").write_text(json.dumps(facts.to_json(), indent=1) + "\n", encoding="utf-8")
        write_part_config(component, target)
        extra = {**graph.extra, "library": facts.version, "key": key, **({"build": made} if made else {})}
        files = tuple(f"{component.name}/{stem}.{kind}" for kind in ("plan", "json"))
        shared = (graph.inputs, graph.outputs, graph.precision, graph.source_digest)
        return Part(component.name, files, *shared, extra=extra)

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        """Write model_index.json, scheduler and tokenizers below `out`."""
        write_pipeline_files(pipeline, out)

    def stem(self, precision: str) -> str:
        """`model_rtx_sm89-sm120_fp16`."""
        sm = "-".join(f"sm{value}" for value in self._capabilities) or "local"
        return f"model_{self.flavour}_{sm}_{precision}"

    def key(self, graph: Part, model: Path, ranges: Mapping[str, Range]) -> str:
        """Names everything that a plan depends on."""
        facts = {
            "graph": hashlib.sha256(model.read_bytes()).hexdigest(),  # without its weights, which lie beside it
            "weights": graph.source_digest,
            "options": [self.flavour, self._capabilities, self.refit, self.strip, graph.precision],
            "shapes": {name: shapes.to_json() for name, shapes in ranges.items()},
            "library": str(library(self.flavour).__version__),
        }
        return f"plan-{digest_of(facts)}"

    def _asked(self) -> dict[str, dict[str, Shape]]:
        flags = zip(KINDS, (self.min_shapes, self.opt_shapes, self.max_shapes), strict=True)
        return {kind: parse_shapes(kind, entries) for kind, entries in flags}

    def _timing(self, job: Job) -> str:
        """TensorRT measures kernels on the GPU and can keep what it found; RTX compiles without one."""
        return "" if self.flavour == RTX or not job.lasting else str(job.folder / "tensorrt-timing.cache")

    def _facts(self, graph: Part, ranges: Mapping[str, Range], weights: dict[str, TensorMeta]) -> PlanFacts:
        inputs = {spec.name: PlanInput(spec.dtype, (ranges[spec.name].to_json(),)) for spec in graph.inputs}
        return PlanFacts(
            flavour=self.flavour,
            version=str(library(self.flavour).__version__),
            sm=self._capabilities,
            precision=graph.precision,
            refit=self.refit,
            stripped=self.strip,
            weights=weights,
            inputs=inputs,
            outputs={spec.name: PlanOutput(spec.dtype) for spec in graph.outputs},
        )


def refuse_operators(trt: Any, flavour: str, model: Path) -> None:
    """Look at every operator before a long build.

    Raises:
        UnsupportedError: naming those that this TensorRT does not have.
    """
    graph = onnx.load(str(model), load_external_data=False)
    used = {node.op_type for node in _nodes(graph.graph)}
    log = journal(trt)
    builder = trt.Builder(log)
    if not builder:
        return  # TensorRT without a GPU: the build says so
    parser = trt.OnnxParser(builder.create_network(0), log)
    missing = sorted(name for name in used if not parser.supports_operator(name))
    if missing:
        raise UnsupportedError(
            f"{model.parent.name}: this TensorRT ({flavour} {trt.__version__}) has no {', '.join(missing)}; "
            "--opset 18 uses simpler operators"
        )


def weight_metas(model: Path) -> dict[str, TensorMeta]:
    """What a refit may replace: the graph's weights, by name."""
    graph = onnx.load(str(model), load_external_data=False).graph
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return {tensor.name: TensorMeta(NAMES[tensor.data_type], tuple(tensor.dims)) for tensor in external}


def _nodes(graph: Any) -> Iterable[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
