"""Row: one measured figure. Every table, plot and gate is made of Rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffship.core.errors import ConfigError
from diffship.core.strict import choices, load, plain

STATUSES = ("ok", "failed", "skipped", "unsupported")


@dataclass(frozen=True)
class Row:
    """`Row("parity", "sd15/unet", "max_abs", 4e-6, "", "ok")`: `value` is None where nothing was measured.

    `unit` is spelt out (`ms`, `bytes`, `dB`, `""` for a plain number); `environment` says where it was measured.
    """

    suite: str
    subject: str
    metric: str
    value: float | None
    unit: str = ""
    status: str = field(default="ok", metadata=choices(*STATUSES))
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigError(f"row status {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.value is not None and not math.isfinite(self.value):
            raise ConfigError(f"row {self.suite}/{self.subject}/{self.metric}: {self.value} is not finite")

    def to_json(self) -> dict[str, Any]:
        return dict(plain(self))

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Row:
        """The inverse of `to_json`; raises ConfigError for anything else."""
        return load(cls, data, "row")
