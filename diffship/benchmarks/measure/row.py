"""Row: one measured figure. Every table, plot and gate is made of Rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffship.core.errors import ConfigError
from diffship.core.strict import bounded, choices, load, plain

STATUSES = ("ok", "failed", "OOM", "missing", "skipped", "unsupported")
KINDS = ("latency", "memory", "size", "quality", "load", "training")


@dataclass(frozen=True)
@bounded
class Row:
    """`Row("parity", "sd15/unet", "max_abs", 4e-6, "", "ok")`: `value` is None if nothing was measured.

    `unit` is spelt out (`ms`, `bytes`, `dB`, `""` for a plain number); `environment` says where it was measured.
    `status` is "OOM" if memory ran out and "missing" if what was to be measured is not installed; `reason` says
    why a value is None. `low` and `high` are its spread over `n` measurements (docs/benchmarks.md says which spread);
    `conditions` are what a table sorts by: model, runner, part, batch, size, steps.
    """

    suite: str
    subject: str
    metric: str
    value: float | None
    unit: str = ""
    status: str = field(default="ok", metadata=choices(*STATUSES))
    environment: dict[str, Any] = field(default_factory=dict)
    kind: str = field(default="latency", metadata=choices(*KINDS))
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reason: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.value, self.low, self.high):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"row {self.suite}/{self.subject}/{self.metric}: {value} is not finite")

    def to_json(self) -> dict[str, Any]:
        return dict(plain(self))

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Row:
        """The inverse of `to_json`; raises ConfigError for anything else."""
        return load(cls, data, "row")
