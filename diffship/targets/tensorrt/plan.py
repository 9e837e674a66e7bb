"""What lies beside a TensorRT plan: which GPUs and library it is for, and the shapes that it takes.

The exporter writes it and the runner reads it: this is the only definition of that file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.document import read_json
from diffship.core.dtype import TensorMeta
from diffship.core.errors import BundleError, ConfigError
from diffship.core.limits import LIMITS
from diffship.core.spec import DTYPES
from diffship.core.strict import bounded, bounds, choices, load, plain

SCHEMA = 1
KINDS = ("min", "opt", "max")
_AXIS = 1 << 20
Shapes = dict[str, list[int]]  # "min", "opt", "max"


@dataclass(frozen=True)
@bounded
class PlanInput:
    """One range of shapes per optimisation profile."""

    dtype: str = field(metadata=choices(*DTYPES))
    profiles: tuple[Shapes, ...] = field(metadata=bounds(1, _AXIS))

    def __post_init__(self) -> None:
        for shapes in self.profiles:
            _check_range(shapes)


@dataclass(frozen=True)
@bounded
class PlanOutput:
    dtype: str = field(metadata=choices(*DTYPES))


@dataclass(frozen=True)
@bounded
class PlanFacts:
    """`version` is the library's, which an RTX engine needs exactly; `sm` the compute capabilities it was built for.

    sm: empty if it was built for the GPU of its builder. weights: what a refit may replace, by name; empty if
    that is not known here.
    """

    flavour: str = field(metadata=choices("rtx", "trt"))
    version: str
    precision: str
    inputs: dict[str, PlanInput]
    outputs: dict[str, PlanOutput]
    sm: tuple[int, ...] = field(default=(), metadata=bounds(10, 999))
    refit: bool = False
    stripped: bool = False
    weights: dict[str, TensorMeta] = field(default_factory=dict)
    schema: int = field(default=SCHEMA, metadata=bounds(SCHEMA, SCHEMA))

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs:
            raise ConfigError("the plan has no inputs or no outputs")
        counts = {len(entry.profiles) for entry in self.inputs.values()}
        if len(counts) != 1 or 0 in counts:
            raise ConfigError("every input must have one range per profile, and there must be a profile")
        if self.stripped and not self.refit:
            raise ConfigError("a stripped plan that cannot be refitted can never run")
        if self.weights and not self.refit:
            raise ConfigError("only a plan that can be refitted lists weights")

    @property
    def profiles(self) -> int:
        """How many optimisation profiles the plan has."""
        return len(next(iter(self.inputs.values())).profiles)

    def to_json(self) -> dict[str, Any]:
        """The content of the file beside the plan; `weights` only if a refit is possible."""
        data: dict[str, Any] = plain(self)
        if not self.refit:
            data.pop("weights")
        return {"schema": data.pop("schema"), **data}


def read_facts(path: Path) -> PlanFacts:
    """Raises BundleError for anything that this version did not write, and says what."""
    return load(PlanFacts, read_json(path, LIMITS.manifest_bytes, BundleError), path.name, BundleError)


def _check_range(shapes: Shapes) -> None:
    if set(shapes) != set(KINDS):
        raise ConfigError(f"a range has {', '.join(sorted(shapes))[:80] or 'nothing'}; it must have {', '.join(KINDS)}")
    ranks = {len(shapes[kind]) for kind in KINDS}
    rising = all(low <= best <= high for low, best, high in zip(*(shapes[kind] for kind in KINDS), strict=False))
    if len(ranks) != 1 or not rising:
        raise ConfigError(f"the range {shapes['min']}, {shapes['opt']}, {shapes['max']} does not rise on every axis")
