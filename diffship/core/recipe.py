"""Recipes: strict TOML into frozen dataclasses. The resolved recipe goes into the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffship.core import registry
from diffship.core.document import read_toml
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.strict import bounded, bounds, load, plain, unknown

SCHEMA = 1
Step = tuple[str, Any]
Changes = Mapping[str, Mapping[str, Any]]  # type of pass -> option -> value


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe; each step is (the name it was chosen by, its frozen dataclass). `source` "": it names none."""

    source: str
    base: str | None
    passes: tuple[Step, ...]
    targets: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Every value, defaults included; what `parse_recipe` reads back to an equal recipe."""
        head: dict[str, Any] = {"schema": SCHEMA, **({"source": self.source} if self.source else {})}
        if self.base is not None:
            head["base"] = self.base
        passes = [{"type": name, **_present(step)} for name, step in self.passes]
        return {**head, "pass": passes, "target": [{"to": name, **_present(step)} for name, step in self.targets]}


@dataclass(frozen=True)
@bounded
class _File:
    schema: int = field(metadata=bounds(SCHEMA, SCHEMA))
    source: str = ""
    base: str | None = None
    passes: tuple[dict[str, Any], ...] = ()
    targets: tuple[dict[str, Any], ...] = ()


def read_recipe(
    path: str | Path,
    passes: Mapping[str, str] = registry.PASSES,
    exporters: Mapping[str, str] = registry.EXPORTERS,
    changes: Changes = MappingProxyType({}),
) -> Recipe:
    """The recipe in a TOML file: `schema = 1`, `source = ...`, `[[pass]] type = ...`, `[[target]] to = ...`.

    `changes` are options that win over those of the file, for every pass of a type. Paths in options are relative to
    the current folder, as on a command line.

    Raises:
        ConfigError: not TOML, an unknown key or name (the nearest legal one is named), a wrong type or value.
    """
    table = read_toml(path, LIMITS.recipe_bytes)
    return parse_recipe(_changed(table, changes, str(path)), str(path), passes, exporters)


def _changed(table: Mapping[str, Any], changes: Changes, where: str) -> dict[str, Any]:
    steps = table.get("pass")
    if not changes or not isinstance(steps, list):
        return dict(table)
    types = [str(step.get("type")) if isinstance(step, dict) else "" for step in steps]
    for name in changes:
        if name not in types:
            raise ConfigError(f"{where}: {unknown('pass', name, filter(None, types))}")
    changed = [{**step, **changes[kind]} if kind in changes else step for step, kind in zip(steps, types, strict=True)]
    return {**table, "pass": changed}


def parse_recipe(
    table: Mapping[str, Any],
    where: str = "recipe",
    passes: Mapping[str, str] = registry.PASSES,
    exporters: Mapping[str, str] = registry.EXPORTERS,
) -> Recipe:
    """`read_recipe` of a table that is parsed already; `passes` and `exporters` are registry tables of dataclasses."""
    spelling = {"pass": "passes", "target": "targets"}
    file = load(_File, {spelling.get(key, key): value for key, value in table.items()}, where)
    return Recipe(
        file.source,
        file.base,
        tuple(_step(entry, "type", passes, f"{where}: pass {at}") for at, entry in enumerate(file.passes, 1)),
        tuple(_step(entry, "to", exporters, f"{where}: target {at}") for at, entry in enumerate(file.targets, 1)),
    )


def _step(entry: Mapping[str, Any], key: str, table: Mapping[str, str], where: str) -> Step:
    name = entry.get(key)
    if not isinstance(name, str):
        raise ConfigError(f"{where} has no {key!r}; legal: {', '.join(table) or 'none'}")
    rest = {option: value for option, value in entry.items() if option != key}
    return name, load(registry.load(table, name, f"{key} in {where}:"), rest, f"{where} ({name})")


def _present(step: object) -> dict[str, Any]:
    # TOML has no null: an option that is not set is left out
    return {key: value for key, value in plain(step).items() if value is not None}
