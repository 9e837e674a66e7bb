"""CoreMl: the exporter class, whose fields are the flags, the recipe entry and the manifest entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.job import Job
from diffship.core.lazy import need
from diffship.core.limits import MIB
from diffship.core.manifest import Part
from diffship.core.precision import PALETTES, Precision, precision_of
from diffship.core.problem import Problem
from diffship.core.spec import BATCH, TensorSpec
from diffship.core.strict import bounded, bounds, choices
from diffship.exporters.coreml.convert import Order, converted, histogram, quiet, save
from diffship.exporters.coreml.layout import package_name, part_files, write_pipeline_files
from diffship.exporters.coreml.lowering import FORMS, channels_first
from diffship.exporters.coreml.palettes import Palettes, palettize
from diffship.exporters.coreml.ports import (
    CLASSES,
    NativePart,
    native_inputs,
    native_outputs,
    with_given_outputs,
)
from diffship.models.parts.component import Component, weight_problems
from diffship.models.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import nn

TARGETS = ("iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15")
GROUPED_TARGETS = ("iOS18", "macOS15")
PRECISIONS = ("fp16", "fp32", *PALETTES)
# measured: the module, its program and its file, in float32, and 0.9 GB of torch and coremltools
_MEMORY_FACTOR, _MEMORY_BYTES = 4.0, 900 * MIB


def _option(text: str, default: Any, legal: Mapping[str, Any]) -> Any:
    return field(default=default, metadata={**legal, "help": text})


@dataclass(frozen=True)
@bounded
class CoreMl:
    """Core ML packages (.mlpackage) with the names, types and shapes that Apple's Swift package opens.

    precision: fp16, fp32, or paletteN: weights as indices of N bits into tables of float16, computed in float16. A VAE
    whose config says that float16 is too narrow for it stays in fp32.
    attention: how a U-Net attends; split-einsum is for the Neural Engine, original for GPUs.
    width, height: of the picture in pixels, 0 for the model's own; a package has fixed shapes. batch: rows of a call of
    the U-Net, 2 with classifier-free guidance.
    oldest: the oldest system that opens the package. group: output channels that share a table; 0: one table for all.
    """

    name: ClassVar[str] = "coreml"
    extra: ClassVar[str] = "coreml"
    proved_here: ClassVar[bool] = True  # by the engine mil, which runs on any machine
    trajectory_steps: ClassVar[int] = 0  # each part is proved here; `--trajectory` for those that run elsewhere

    precision: str = _option("of weights and arithmetic; paletteN: indices of N bits", "fp16", choices(*PRECISIONS))
    attention: str = _option("split-einsum for the Neural Engine, original for GPUs", FORMS[1], choices(*FORMS))
    width: int = _option("of the picture, in pixels; 0: the model's own", 0, bounds(0, 4096))
    height: int = _option("of the picture, in pixels; 0: as wide as it is, or the model's own", 0, bounds(0, 4096))
    batch: int = _option("rows of a call of the U-Net; 2 with guidance", 2, bounds(1, 2))
    oldest: str = _option("the oldest system that opens the package", TARGETS[0], choices(*TARGETS))
    group: int = _option("output channels that share a palette; 0: all of them", 0, bounds(0, 65536))

    def __post_init__(self) -> None:
        if self.group and not self.format.palette_bits:
            raise ConfigError(f"--group {self.group} is for palettes; take --precision palette4, or leave it out")
        if self.group and self.oldest not in GROUPED_TARGETS:
            raise ConfigError(
                f"--group {self.group} makes several palettes for a weight, which {self.oldest} does not open; "
                f"legal with --oldest {' or '.join(GROUPED_TARGETS)}"
            )
        if self.height and not self.width:
            raise ConfigError(f"--height {self.height} stands alone; give --width too")

    @property
    def format(self) -> Precision:
        """What `precision` means."""
        return precision_of(self.precision)

    def of(self, component: Component) -> CoreMl:
        """The exporter of this part: itself, or one of fp32 if float16 would overflow."""
        fitting = self.format.for_range(component.overflows_half)
        return self if fitting is self.format else replace(self, precision=fitting.name, group=0)

    def sides(self, family: Family) -> tuple[int, int]:
        """(width, height) of the picture in pixels. Raises ConfigError if the model draws no such picture."""
        width, height = (self.width, self.height or self.width) if self.width else family.default_sides
        family.check_size(width, height)
        return width, height

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop an export of these components, found without reading a weight.

        Raises:
            MissingExtra: coremltools is not installed.
            ConfigError: the model draws no picture of this size.
        """
        with quiet():
            need("coremltools")
        self.sides(pipeline.family)
        odd = [
            Problem(part.name, f"{part.class_name} has no Core ML form here; legal: {', '.join(CLASSES)}")
            for part in pipeline.components.values()
            if part.class_name not in CLASSES
        ]
        return odd or [problem for part in pipeline.components.values() for problem in weight_problems(part)]

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        """The fixed sizes of the package, and `batch` samples: an engine takes them in calls of the package's own."""
        return {**self.sizes(component, family), BATCH: batch}

    def sizes(self, component: Component, family: Family) -> dict[str, int]:
        """The sizes of a package by axis: a U-Net has `batch` rows, other parts one."""
        width, height = self.sides(family)
        image = {"sample_width": width, "sample_height": height}
        known = {**component.smallest_sizes(), **family.kind.axis_sizes(family, width, height), **image}
        latent = {"latent_height": height // family.vae_factor, "latent_width": width // family.vae_factor}
        rows = self.batch if component.name == family.kind.denoiser else 1
        sizes = {**known, **latent, BATCH: rows}
        return {axis: sizes[axis] for axis in {axis for spec in component.inputs for axis in spec.axes()}}

    def disk_bytes(self, component: Component) -> int:
        """What the files of a part take, and those that coremltools writes beside them."""
        return 2 * component.parameters * self.of(component).format.weight_bytes + (8 << 20)

    def memory_bytes(self, component: Component) -> int:
        """Memory that `export` takes beside the process as it is."""
        return int(4 * component.parameters * _MEMORY_FACTOR) + _MEMORY_BYTES

    def held(self, component: Component) -> Component:
        """The part as a package holds it: with the outputs that it gives, and weights out of their palettes."""
        own = self.of(component)
        given = with_given_outputs(component)
        if not own.format.palette_bits:
            return given
        return replace(given, weights=Palettes(given.weights, own.format.palette_bits, own.group))

    def package(self, component: Component, pipeline: Pipeline, out: Path, job: Job) -> Part:
        """Write the package of a part below `out`; not proved yet.

        Raises:
            SourceError: the weights do not fit the config, or are not finite.
            UnsupportedError: the module has an operation without a form in Core ML.
        """
        if self.of(component) is not self:
            return self.of(component).package(component, pipeline, out, job)
        held = self.held(component)
        sizes = self.sizes(component, pipeline.family)
        order = self._order(held, pipeline, sizes)
        job.progress(f"convert {component.name}", 0, 1)
        model = converted(self._native(held, order), order)
        operations = histogram(model)
        if self.format.palette_bits:
            with quiet():
                model = palettize(model, self.group)
        save(model, out / package_name(component.name))
        job.progress(f"convert {component.name}", 1, 1)
        extra = {
            "parameters": component.parameters,
            "sizes": sizes,
            "attention": self.attention,
            "oldest": self.oldest,
            "operations": operations,
        }
        return Part(
            name=component.name,
            files=part_files(component.name),
            inputs=tuple(map(self.format.port, held.inputs)),
            outputs=held.outputs,
            precision=self.precision,
            source_digest=component.digest,
            bindings=(*order.inputs, *order.outputs),
            extra=extra,
        )

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        """Write model_index.json, scheduler and tokenizers below `out`."""
        write_pipeline_files(pipeline, out)

    def _order(self, held: Component, pipeline: Pipeline, sizes: Mapping[str, int]) -> Order:
        ports = native_inputs(held, self.format.ports)
        shapes = [TensorSpec(port.native, "float32", port.shape).resolve(sizes) for port in ports]
        about = {
            "diffship.part": held.name,
            "diffship.precision": self.precision,
            "diffship.attention": self.attention,
            "diffship.source": str(pipeline.source.get("id")),
        }
        half = self.format.activations == "float16"
        return Order(ports, native_outputs(held), shapes, half, self.oldest, about)

    def _native(self, held: Component, order: Order) -> nn.Module:
        """The part with the inputs that a package has, and its transformers in the form that `attention` names."""
        module = held.module()
        plain = ["encoder_hidden_states"] if channels_first(module, self.attention) else []
        return NativePart(module, held, order.inputs, plain).eval()
