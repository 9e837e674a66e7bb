"""The targets of a fleet: exporters with names, made in code or read from the `[[target]]` tables of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffship.core import registry
from diffship.core.document import read_toml
from diffship.core.errors import BundleError, ConfigError
from diffship.core.limits import LIMITS
from diffship.core.manifest import check_path
from diffship.core.recipe import Step, parse_recipe
from diffship.core.strict import load, plain, unknown

MOST = 64  # targets of one fleet


@dataclass(frozen=True)
class FleetTarget:
    """One bundle of a fleet: `name` is its folder, `exporter` the frozen dataclass that writes it. If `optional`, it is
    left out where the packages of its exporter are not installed.

    Raises:
        ConfigError: `name` is not one plain folder name that means the same on every system.
    """

    name: str
    exporter: Any
    optional: bool = False

    def __post_init__(self) -> None:
        try:
            plain = "/" not in check_path(self.name)
        except BundleError as fault:
            raise ConfigError(f"name of a target: {fault}") from None
        if not plain:
            raise ConfigError(f"name of a target: {self.name[:80]!a} has a slash; it is one folder")


@dataclass(frozen=True)
class Fleet:
    """A recipe with targets. `source` is "" if it names none; `passes` are what `compress` makes of it."""

    source: str
    base: str | None
    passes: tuple[Step, ...]
    targets: tuple[FleetTarget, ...]


@dataclass(frozen=True)
class _Own:
    """The keys of a `[[target]]` table that are the fleet's; all others are fields of the exporter."""

    name: str | None = None
    optional: bool = False


_OWN = tuple(field.name for field in dataclasses.fields(_Own))


def fleet_target(to: str, name: str | None = None, optional: bool = False, **options: Any) -> FleetTarget:
    """The target `to` (a name of `core.registry.EXPORTERS`) with the exporter's fields `options`. Without a `name` it
    is called by target and precision, such as `onnx-fp16`.

    Raises:
        ConfigError: an unknown target or option (the nearest legal one is named), or a value that is not legal.
    """
    exporter = load(registry.load(registry.EXPORTERS, to, "target"), options, f"target {to}")
    return FleetTarget(_named(name, exporter), exporter, optional)


def _named(name: str | None, exporter: Any) -> str:
    if name is not None:
        return name
    precision = plain(exporter).get("precision")
    return f"{exporter.name}-{precision}" if precision else str(exporter.name)


def read_fleet(path: str | Path) -> Fleet:
    """The fleet in a TOML file: `schema = 1`, `source = ...`, and a `[[target]]` table for each bundle, with `to`,
    perhaps `name` and `optional`, and fields of the exporter.

    Raises:
        ConfigError: not TOML, an unknown key or name (the nearest legal one is named), a wrong type or value, no
            target, or two of one name.
    """
    return parse_fleet(read_toml(path, LIMITS.recipe_bytes), str(path))


def parse_fleet(table: Mapping[str, Any], where: str = "recipe") -> Fleet:
    """`read_fleet` of a table that is parsed already."""
    entries = table.get("target", [])
    listed = entries if isinstance(entries, list) else []
    if len(listed) > MOST:
        raise ConfigError(f"{where} has {len(listed)} targets; at most {MOST} are made")
    for at, entry in enumerate(listed, 1):
        _refuse_unknown(entry, f"{where}: target {at}")
    own = [_own(entry, f"{where}: target {at}") for at, entry in enumerate(listed, 1)]
    recipe = parse_recipe({**table, "target": [*map(_exporters, listed)] if listed else entries}, where)
    targets = tuple(
        FleetTarget(_named(said.name, exporter), exporter, said.optional)
        for said, (_, exporter) in zip(own, recipe.targets, strict=True)
    )
    require_distinct(targets, where)
    return Fleet(recipe.source, recipe.base, recipe.passes, targets)


def require_distinct(targets: Sequence[FleetTarget], where: str) -> None:
    """Raises ConfigError if there is no target, or if two folders would be one on some systems."""
    if not targets:
        raise ConfigError(f'{where} has no [[target]]; add one for each bundle, such as: [[target]] to = "onnx"')
    names = [target.name.casefold() for target in targets]
    twice = next((target.name for target in targets if names.count(target.name.casefold()) > 1), None)
    if twice is not None:
        raise ConfigError(f'{where} has two targets called {twice}; give each its own name = "..."')


def _refuse_unknown(entry: object, where: str) -> None:
    """Raises ConfigError for a key that neither the fleet nor the exporter of the table has; `core.recipe` would offer
    those of the exporter alone."""
    to = entry.get("to") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(to, str) or to not in registry.EXPORTERS:
        return  # `core.recipe` says what is wrong
    fields = dataclasses.fields(registry.load(registry.EXPORTERS, to, "target"))
    legal = ("to", *_OWN, *(field.name for field in fields if field.init))
    for key in entry:
        if key not in legal:
            raise ConfigError(f"{where} ({to}): {unknown('key', key, legal)}")


def _own(entry: object, where: str) -> _Own:
    given = entry if isinstance(entry, Mapping) else {}
    return load(_Own, {key: given[key] for key in _OWN if key in given}, where)


def _exporters(entry: object) -> object:
    """What `core.recipe` reads of a table: all but the fleet's own keys."""
    return {key: value for key, value in entry.items() if key not in _OWN} if isinstance(entry, Mapping) else entry
