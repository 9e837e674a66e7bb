"""Recipes: strict TOML into frozen dataclasses. The resolved recipe goes into the manifest."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from diffship.core.errors import BundleError, ConfigError
from diffship.core.bundle_check import read_small
from diffship.core.limits import LIMITS
from diffship.core.strict import load, plain

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """`schema = 1`, `source`, any number of `[[pass]]` (each with `type`) and `[[target]]` (each with `to`)."""

    source: str
    schema: int = SCHEMA
    base: str | None = None
    passes: tuple[Any, ...] = field(default=())
    targets: tuple[Any, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe: every value, defaults included; steps keep the name they were chosen by."""
        return {
            "schema": self.schema,
            "source": self.source,
            "base": self.base,
            "pass": [{"type": name, **plain(step)} for name, step in self.passes],
            "target": [{"to": name, **plain(step)} for name, step in self.targets],
        }
