"""What a mutant is: one fault of a kind, at one place of one part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MODULE, GRAPH = "module", "graph"
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Mutant:
    """way: "module" (the network that is exported differs from the one that torch proves it against) or "graph" (the
    files of a proved bundle are edited). place: a module's path, a tensor or a node. variant: which of several faults
    of this kind.
    """

    way: str
    source: str
    part: str
    kind: str
    place: str
    variant: str = ""

    @property
    def name(self) -> str:
        where = self.place if not self.variant else f"{self.place} ({self.variant})"
        return f"{self.source}, {self.part}, {self.way}: {self.kind} at {where}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What the proof said of one mutant in one precision.

    status: "caught", "survived", "not opened" (the engine refuses the file, which is no merit of the proof) or
    "not made" (this precision has no such place, or the graph cannot be written). by: what caught it: "graph",
    "engine", "whole", or "points" if the graph lacks a point that the proof compares. margin_db: how far the
    closest figure stayed from its limit, negative if it missed. whole: whether the comparison of whole outputs
    alone caught it; None if that was not computed.
    """

    status: str
    by: str = ""
    margin_db: float | None = None
    closest: str = ""
    whole: bool | None = None
    why: str = ""
    seconds: float = 0.0
