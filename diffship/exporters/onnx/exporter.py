"""Onnx: the exporter class, whose fields are the flags, the recipe entry and the manifest entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffship.calibration.packings import packed_summary, packings, weight_bytes, without
from diffship.calibration.ranges import METHODS, affine
from diffship.calibration.stored import Calibration, calibration_digest, read_calibration
from diffship.core import precision, spec
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.family import Family
from diffship.core.job import Bytes, Job, digest_of
from diffship.core.lazy import lazy, need
from diffship.core.manifest import Part
from diffship.core.precision import INT8_WEIGHTS, MIXED_WEIGHTS, PRECISIONS, Precision, precision_of
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices, plain
from diffship.exporters.onnx.capture import capture, trace_sizes
from diffship.exporters.onnx.graph import IR_VERSION
from diffship.exporters.onnx.layout import DATA_FILE, MODEL_FILE, beside, write_part_config, write_pipeline_files
from diffship.exporters.onnx.pour import data_bytes, place_in, pour
from diffship.exporters.onnx.translate import Translation
from diffship.models.digests import remembered_digest
from diffship.models.parts.component import SHOWN, Component, unexpected, weight_problems
from diffship.models.parts.filling import INNER, computed, sources
from diffship.models.pipeline import Pipeline
from diffship.models.walks.points import point_paths

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from diffship.calibration import sensitivity
    from diffship.exporters.onnx import operators
else:
    onnx, sensitivity = lazy("onnx"), lazy("diffship.calibration.sensitivity")
    operators = lazy("diffship.exporters.onnx.operators")  # its first use fills the table: not for --help

_BF16_OPSET = 22  # the first whose convolutions take it
_BLOCKS_OPSET = 21  # the first whose DequantizeLinear takes blocks and four bits
_ROOMS = ("models", "kinds", "calibration")  # beside this one, what makes a graph
_GRAPH_BYTES = 1 << 30  # memory that making a graph takes: measured 0.6 for SD1.5, 0.75 for SDXL


@dataclass(frozen=True)
@bounded
class Onnx:
    """ONNX files in the layout of optimum's ONNX Runtime pipelines.

    precision: type of weights and of float inputs and outputs (`timestep` is float32 in all). "bf16" is for graphs
    that GPU engines are built from: no CPU engine runs it, so it is proved in float32 arithmetic with the weights as
    they were rounded; its inputs and outputs are float32, since numpy has no bfloat16. A VAE whose config
    says that float16 is too narrow for it (`force_upcast`) stays in fp32. "int8-weights" and "int4-weights" store the
    weights of large layers as integers, and compute in float32. "int8" and "w8a16" also round what these layers read to
    codes of 8 or 16 bits; parts that the calibration has no ranges of are "int8-weights".
    "mixed-weights" gives each layer 32, 8 or 4 bits, so that all of them together take `bits` a weight at the most.
    calibration: folder that `diffship calibrate` wrote, of the same weights. ranges: how ranges follow from it. keep:
    layers, or modules around them, that stay as they are, by part and path (`unet.mid_block`).
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
            "help": "of weights and of float inputs and outputs; no CPU engine runs bf16, which GPU builders take; "
            "int8-weights and int4-weights store large weights as integers, and compute in float32; int8 and w8a16 "
            "round activations too, with --calibration",
        },
    )
    opset: int = field(
        default=23,
        metadata={**bounds(min(IR_VERSION), max(IR_VERSION)), "help": f"{min(IR_VERSION)} to {max(IR_VERSION)}"},
    )

    calibration: str = field(
        default="", metadata={"help": "folder that diffship calibrate wrote; for int8 and w8a16", "later": True}
    )
    ranges: str = field(
        default="mse",
        metadata={**choices(*METHODS), "help": f"with --calibration: {', '.join(METHODS)}", "later": True},
    )
    bits: float = field(
        default=0.0,
        metadata={**bounds(0, 32), "help": "a weight, at the most, of --precision mixed-weights", "later": True},
    )
    keep: tuple[str, ...] = field(
        default=(), metadata={"help": "layers whose weights stay float32, such as unet.mid_block", "later": True}
    )

    def __post_init__(self) -> None:
        measured = bool(self.format.inputs) or self.format == MIXED_WEIGHTS
        if measured and not self.calibration:
            raise ConfigError(f"{self.precision} needs what diffship calibrate measured: give --calibration CAL")
        if self.calibration and not measured:
            raise ConfigError(f"{self.precision} takes no --calibration: leave it out")
        if bool(self.bits) != (self.format == MIXED_WEIGHTS):
            raise ConfigError("--bits is the budget of --precision mixed-weights: give both, or neither")
        if self.keep and self.format.packing is None:
            raise ConfigError(f"{self.precision} packs no layer, so there is none to --keep")
        if self.format.activations == "bfloat16" and self.opset < _BF16_OPSET:
            raise ConfigError(f"opset {self.opset} has no bfloat16 convolution; bf16 needs {_BF16_OPSET} or more")
        if self.format.packing is not None and self.opset < _BLOCKS_OPSET:
            raise ConfigError(
                f"opset {self.opset} has no weights of 4 bits; {self.precision} needs {_BLOCKS_OPSET} or more"
            )

    @property
    def format(self) -> Precision:
        """What `precision` means."""
        return precision_of(self.precision)

    def of(self, component: Component) -> Onnx:
        """The exporter of this part: itself, or one of fp32 if fp16 would overflow; bf16 has float32's range.

        Of a part that the calibration has no ranges of, one of int8-weights.
        """
        if self.format.inputs and component.name not in self._calibrated().parts:
            return replace(self, precision=INT8_WEIGHTS.name, calibration="")
        if self.format == MIXED_WEIGHTS and component.name != sensitivity.measured_part(self.calibration):
            return replace(self, precision=INT8_WEIGHTS.name, calibration="", bits=0.0)
        fitting = self.format.for_range(component.overflows_half)
        return self if fitting is self.format else replace(self, precision=fitting.name)

    def bound(self, component: Component) -> Precision:
        """What `precision` means for this part: with its packings and its ranges, if it has any.

        Raises:
            ConfigError: the calibration cannot be read, is of another model, or lacks a layer; or nothing is to `keep`.
        """
        kind = self.of(component).format
        if kind.packing is None:
            return kind
        digest = remembered_digest(component.weights) if self.calibration else ""
        if kind == MIXED_WEIGHTS:
            chosen = dict(sensitivity.choose(self._sensitivity(component), component, self.bits).packings)
        else:
            chosen = packings(component, kind)
        prefix = f"{component.name}."
        kept = [path.removeprefix(prefix) for path in self.keep if path.startswith(prefix)]
        chosen = without(chosen, kept, component.name)
        if not kind.inputs:
            return replace(kind, chosen=chosen)
        seen = self._calibrated().of(component.name, digest)
        paths = [name.removesuffix(".weight") for name in chosen]
        missing = next((path for path in paths if path not in seen), None)
        if missing is not None:
            raise ConfigError(
                f"{self.calibration} has no ranges of {component.name}: {missing}. Run: diffship calibrate"
            )
        method = METHODS[self.ranges]
        ranges = {path: affine(method(seen[path], kind.inputs), kind.inputs) for path in paths}
        return replace(kind, chosen=chosen, ranges=ranges)

    def _sensitivity(self, component: Component) -> sensitivity.Sensitivity:
        return sensitivity.read_sensitivity(self.calibration, component.name, remembered_digest(component.weights))

    def _calibrated(self) -> Calibration:
        return _calibration(self.calibration, calibration_digest(self.calibration))

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop an export of these components, found without reading a weight.

        Raises:
            MissingExtra: onnx is not installed.
            UnsupportedError: a ControlNet beside packed weights.
        """
        need("onnx")
        for path in self.keep:
            if path.partition(".")[0] not in pipeline.components:
                raise ConfigError(f"keep: {path} does not begin with a part: {', '.join(pipeline.components)}")
        for component in pipeline.components.values():
            if component.shares is not None and self.format.packing is not None:
                raise UnsupportedError(
                    f"{component.name} reads the weights of {component.shares}, which {self.precision} packs: "
                    "leave --controlnet out, or take fp32, fp16 or bf16"
                )
            self.bound(component)
        return [problem for component in pipeline.components.values() for problem in weight_problems(component)]

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        """Twice the least height by three times the least width: height is not width, no attention has one token."""
        factors = {"height": 2, "width": 3, "tokens": 6}  # six times the tokens of the least picture
        sizes = {
            axis: least * factors.get(axis.rpartition("_")[2], 1) for axis, least in component.smallest_sizes().items()
        }
        return {**sizes, "batch_size": batch}

    def disk_bytes(self, component: Component) -> int:
        """What the files of a part take, to a few per cent."""
        if component.shares is not None:
            return 4 << 20
        kind = self.bound(component)
        return weight_bytes(component, kind, packings(component, kind)) + (4 << 20)

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
        fitting = self.of(component)
        if fitting is not self:
            return fitting.export(component, out, job)
        job.progress(f"graph {component.name}", 0, 1)
        cached = job.once(self.graph_digest(component), lambda path: path.write_bytes(self.graph(component)))
        job.progress(f"graph {component.name}", 1, 1)
        model = onnx.load(str(cached), load_external_data=False)
        if component.shares is not None:
            return self._beside(component, component.shares, model, out)
        folder = out / component.name
        folder.mkdir(parents=True)
        done, total = 0, Bytes(component.weights.nbytes)

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            job.progress(f"weights {component.name}", done, total)

        module = component.meta
        packed = packings(component, self.bound(component))
        held = _held(module, component)
        digest = pour(model, component.weights, folder, component.name, on_bytes, held, packed)
        (folder / MODEL_FILE).write_bytes(cached.read_bytes())
        write_part_config(component, folder)
        files = tuple(f"{component.name}/{name}" for name in (MODEL_FILE, DATA_FILE))
        count = component.parameters
        extra = {
            "opset": self.opset,
            "nodes": len(model.graph.node),
            "data_bytes": data_bytes(model),
            "parameters": count,
            **({"packed": packed_summary(component, packed)} if packed else {}),
            **self._named(component),
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

    def _beside(self, component: Component, owner: str, model: onnx.ModelProto, out: Path) -> Part:
        """Write the graph of a part into the folder of `owner`, whose data it reads: `unet/model_controlled.onnx`.

        Raises:
            SourceError: the graph holds a weight in a form that the data does not have.
        """
        name = beside(component.name, owner)
        whole = onnx.load(str(out / owner / MODEL_FILE), load_external_data=False)
        place_in(model, whole, component.name)
        (out / owner / name).write_bytes(model.SerializeToString(deterministic=True))
        return Part(
            name=component.name,
            files=(f"{owner}/{name}", f"{owner}/{DATA_FILE}"),
            inputs=tuple(map(self.format.port, component.inputs)),
            outputs=tuple(map(self.format.port, component.outputs)),
            precision=self.precision,
            source_digest=component.digest,
            extra={"opset": self.opset, "nodes": len(model.graph.node), "shares": owner},
        )

    def _named(self, component: Component) -> dict[str, object]:
        """What the manifest says of the calibration, and of a budget."""
        if not self.calibration:
            return {}
        told = {"digest": calibration_digest(self.calibration)}
        if self.format != MIXED_WEIGHTS:
            return {"calibration": {**told, "ranges": self.ranges}}
        found = sensitivity.choose(self._sensitivity(component), component, self.bits)
        return {"calibration": {**told, "bits": round(found.bits, 4), "predicted_db": round(found.predicted_db, 2)}}

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        """Write model_index.json, scheduler and tokenizers below `out`."""
        write_pipeline_files(pipeline, out)

    def graph(self, component: Component) -> bytes:
        """The ONNX file without its weights: it names them, and where in the data file they will lie."""
        specs = component.inputs
        module = component.meta
        sizes = trace_sizes(component.smallest_sizes())
        captured = capture(module, specs, sizes, self.format, operators.OPERATORS)
        need("onnx")  # teaches numpy bfloat16
        constants = computed(module, component.build, component.name)
        kind = self.bound(component)
        packed = packings(component, kind, module)
        translation = Translation(captured, self.opset, _weight_name, constants, packed, kind.ranges)
        points = point_paths(component, module.get_submodule("inner"))
        model = translation.run(specs, component.outputs, "diffship", points)
        return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]

    def graph_digest(self, component: Component) -> str:
        """Names everything that `graph` depends on."""
        kind = self.bound(component)
        facts = {
            "code": _code_digest(),
            "options": asdict(self),
            "part": [component.name, component.class_name],
            "config": component.config,
            "ranges": {path: asdict(codes) for path, codes in kind.ranges.items()},
            "packed": {name: asdict(packing) for name, packing in packings(component, kind).items()},
            "specs": [plain(spec) for spec in (*component.inputs, *component.outputs)],
            "versions": _versions(),
        }
        return digest_of(facts)


def _weight_name(name: str) -> str:
    return name.removeprefix(INNER)


def _left_out(module: nn.Module, component: Component) -> dict[str, object]:
    """What the manifest says of weights that the part does not take."""
    names = unexpected(module, component.weights)
    return {"unused_tensors": {"count": len(names), "first": names[:SHOWN]}} if names else {}


def _held(module: nn.Module, component: Component) -> dict[str, str]:
    """{name in a graph: name in the weights} of tied tensors whose names differ there."""
    found = sources(module, set(component.weights.names()))
    return {name.removeprefix(INNER): source for name, source in found.items() if name.removeprefix(INNER) != source}


@lru_cache(maxsize=2)
def _calibration(folder: str, digest: str) -> Calibration:
    """The calibration in `folder`, read once as long as its `digest` is the same."""
    return read_calibration(folder)


@cache
def _code_digest() -> str:
    """sha256 over the source of everything that makes a graph: this room, models, kinds, packings, precisions and
    specs."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    package = here.parents[1]
    files = [file for room in (here, *(package / name for name in _ROOMS)) for file in room.rglob("*.py")]
    for file in sorted([*files, Path(precision.__file__), Path(spec.__file__)]):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _versions() -> Mapping[str, str]:
    return {name: need(name).__version__ for name in ("torch", "diffusers", "transformers")}
