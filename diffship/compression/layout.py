"""The layout pass: a published reduction of the U-Net, with the teacher's weights copied into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from diffship.compression.narrow import Kept, by_norm, cut, first
from diffship.compression.outline import U_NETS, Outline
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job
from diffship.core.problem import Problem
from diffship.core.strict import bounded, choices
from diffship.core.weights import Weights, count_parameters, renamed
from diffship.models.assemble import with_denoiser
from diffship.models.parts.component import Component
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.layouts import LAYOUTS, find_layout, layout_widths, student_config, weight_map
from diffship.models.reduced.widths import Widths, widths_now, widths_of, with_widths

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
@bounded
class LayoutPass:
    """Keep the layers of a published layout; the rest of the pipeline stays as it is.

    name: which layout.
    """

    kind: ClassVar[str] = "layout"
    networks: ClassVar[tuple[str, ...]] = U_NETS
    kept: ClassVar[bool] = False  # made in seconds

    name: str = field(metadata=choices(*LAYOUTS))

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop `run`, found from configs alone."""
        try:
            config, _ = self.student(pipeline)
            self._copied(config, pipeline.denoiser)
        except DiffshipError as fault:
            return [Problem(pipeline.family.kind.denoiser, f"{self.name}: {fault}")]
        return []

    def student(self, pipeline: Pipeline) -> tuple[dict[str, Any], Widths]:
        """The student's config, without widths, and its widths.

        Raises:
            ConfigError: the layout does not fit the teacher.
        """
        layout, teacher = find_layout(self.name), pipeline.denoiser.config
        if widths_of(teacher):
            raise ConfigError("the teacher is narrowed already; layouts are made of a whole U-Net")
        config = student_config(layout, teacher)
        return config, layout_widths(layout, config)

    def outline(self, pipeline: Pipeline) -> Outline:
        """The student's shapes; if it is narrowed, with the first channels and heads instead of the strongest."""
        return Outline(self._made(pipeline, lambda _weights, widths, _heads: first(widths)))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the student as its U-Net; tensors are cut and copied when they are read."""
        job.progress(f"layout {self.name}", 0, 1)
        made = self._made(pipeline, by_norm)
        job.progress(f"layout {self.name}", 1, 1)
        return made

    def _made(self, pipeline: Pipeline, choose: Callable[[Weights, Widths, Mapping[str, int]], Kept]) -> Pipeline:
        config, widths = self.student(pipeline)
        teacher = pipeline.denoiser
        weights, student = self._copied(config, teacher)
        if widths:
            heads = widths_now(student).heads
            weights = cut(weights, choose(weights, widths, heads), heads)
        entry = {"pass": self.kind, **asdict(self)}
        entry |= {"parameters_before": teacher.parameters, "parameters": count_parameters(weights)}
        return with_denoiser(pipeline, with_widths(config, widths), weights, entry)

    def _copied(self, config: Mapping[str, Any], teacher: Component) -> tuple[Weights, nn.Module]:
        """The teacher's tensors under the student's names, and the student as diffusers builds it, without values."""
        student = unet(config, teacher.weights).meta.get_submodule("inner")
        shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
        weights: Weights = renamed(teacher.weights, weight_map(find_layout(self.name), teacher.config, list(shapes)))
        for name, shape in shapes.items():
            given = weights.meta(name).shape
            if given != shape:
                raise ConfigError(
                    f"it has {name} of shape {shape}, the teacher {given}: its levels are of other widths"
                )
        return weights, student
