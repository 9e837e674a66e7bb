"""What `export` asks of a target's exporter. An exporter is a frozen dataclass whose fields are its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from diffship.core.family import Family
from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.core.precision import Precision
from diffship.core.problem import Problem
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline


class Target(Protocol):
    """What both kinds of exporters have. `trajectory_steps`: denoising steps that lie in a bundle by default."""

    name: ClassVar[str]
    extra: ClassVar[str]
    trajectory_steps: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # it is a dataclass

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop an export of these components, found without reading a weight."""
        ...

    def golden_sizes(self, component: Component, family: Family, batch: int) -> dict[str, int]:
        """Sizes by axis of the golden vectors, which the target must take."""
        ...

    def disk_bytes(self, component: Component) -> int:
        """What the files of a part take at the most while it is exported."""
        ...

    def memory_bytes(self, component: Component) -> int:
        """Memory that the export of a part takes beside this process."""
        ...

    def finish(self, pipeline: Pipeline, out: Path) -> None:
        """Write what belongs to the whole bundle below `out`: tokenizers, scheduler config, model_index.json."""
        ...


class Exporter(Target, Protocol):
    """An exporter that writes the files of a part itself.

    `proved_here`: an engine for the target can be installed on every machine, so export proves each part or fails.
    Otherwise a part is proved if an engine runs here, and is written unproven if none does.
    """

    proved_here: ClassVar[bool]

    def export(self, component: Component, out: Path, job: Job) -> Part:
        """Write the files of a part below `out`; returns its manifest entry, not proved yet."""
        ...


@runtime_checkable
class Bound(Exporter, Protocol):
    """An exporter whose precision takes ranges from a calibration."""

    def bound(self, component: Component) -> Precision:
        """What its precision means for this part, with the ranges that a proof simulates."""
        ...


@runtime_checkable
class Packaging(Target, Protocol):
    """An exporter whose files have fixed sizes, or hold weights that are not those of the source.

    It says what torch must compute to be compared with them. Parts are proved as wholes, as `Exporter` says.
    """

    proved_here: ClassVar[bool]

    def held(self, component: Component) -> Component:
        """The part as its files hold it: weights as they are stored, and those outputs that the target gives."""
        ...

    def package(self, component: Component, pipeline: Pipeline, out: Path, job: Job) -> Part:
        """Write the files of a part of `pipeline` below `out`; returns its manifest entry, not proved yet."""
        ...


@runtime_checkable
class BuiltFromGraph(Target, Protocol):
    """An exporter that builds a part from an ONNX graph, which is proved; what is built is proved where it runs."""

    def through(self, component: Component) -> Exporter:
        """The exporter of the graph that a part is built from."""
        ...

    def build(self, component: Component, pipeline: Pipeline, graph: Part, folder: Path, out: Path, job: Job) -> Part:
        """Write the files of a part below `out`; `graph` is the ONNX part whose files are below `folder`."""
        ...
