"""Suites: strict TOML under benchmarks/suites/, one command each.

`schema = 1`, `title = ...`, `rounds = 3`, then `[[bench]]` tables (fields of Bench) and `[[export]]` tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure.case import Bench
from diffship.core.document import read_toml
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.precision import FLOATS
from diffship.core.strict import bounded, bounds, choices, load, unknown

SCHEMA = 1
FOLDER = Path("benchmarks") / "suites"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z")


@dataclass(frozen=True)
@bounded
class ExportBench:
    """Whole exports of a source, proof included: ours with and without the proof, and `against` (optimum)."""

    source: str
    precision: str = field(default="fp32", metadata=choices(*FLOATS))
    against: tuple[str, ...] = field(default=(), metadata=choices("optimum"))


@dataclass(frozen=True)
class Suite:
    """What a suite file says."""

    name: str
    title: str
    rounds: int
    benches: tuple[Bench, ...]
    exports: tuple[ExportBench, ...]


@dataclass(frozen=True)
@bounded
class _File:
    title: str
    schema: int = field(metadata=bounds(SCHEMA, SCHEMA))
    rounds: int = field(default=3, metadata=bounds(1, 100))
    bench: tuple[Bench, ...] = ()
    export: tuple[ExportBench, ...] = ()


def read_suite(name: str, folder: Path = FOLDER) -> Suite:
    """The suite called `name` in `folder`, or a path to a `.toml` file.

    Raises:
        ConfigError: there is none of that name (the nearest is named), it is not TOML, or a key or value is not legal.
    """
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not name.endswith(".toml") and (not _NAME.match(name) or not path.is_file()):
        raise ConfigError(_no_suite(name, folder))
    return parse_suite(read_toml(path, LIMITS.recipe_bytes), path.stem, str(path))


def _no_suite(name: str, folder: Path) -> str:
    if not folder.is_dir():
        where = f"suite {name[:64]!r} is looked for in {folder.absolute()}, and there is no such folder"
        return f"{where}: run it in a clone of diffship, or name a .toml file"
    return f"{unknown('suite', name, sorted(file.stem for file in folder.glob('*.toml')))} (in {folder.absolute()})"


def parse_suite(table: Mapping[str, Any], name: str, where: str = "suite") -> Suite:
    file = load(_File, dict(table), where)
    if not file.bench and not file.export:
        raise ConfigError(f"{where}: nothing to measure; it needs [[bench]] or [[export]]")
    return Suite(name, file.title, file.rounds, file.bench, file.export)
