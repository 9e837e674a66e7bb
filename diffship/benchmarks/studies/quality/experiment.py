"""Experiments: which small models are made of a teacher, how they are judged, and which are compared.

Strict TOML under benchmarks/experiments/: `schema = 1`, `title`, `teacher`, then `[[model]]` tables (fields of Model,
passes as in a recipe) and `[[compare]]` tables (fields of Comparison).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.document import read_toml
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.recipe import parse_recipe
from diffship.core.strict import bounded, bounds, choices, load, unknown

SCHEMA = 1
DATA = "DATA"  # in a pass: the folder that the command is given
METRICS = ("top1", "top5", "teacher_rms")  # figures of each single prompt, which can be compared in pairs


@dataclass(frozen=True)
@bounded
class Model:
    """One model of an experiment. passes: as in a recipe; none is the teacher itself. seeds: it is made once with each,
    put in place of `seed` in every pass that has one. shown: whether it stands in the picture grid."""

    name: str
    passes: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = field(default=(0,), metadata=bounds(0, 2**31))
    shown: bool = False


@dataclass(frozen=True)
@bounded
class Comparison:
    """Is `ours` better than each of `theirs`? Paired over seeds and prompts."""

    ours: str
    theirs: tuple[str, ...]
    metric: str = field(default="top5", metadata=choices(*METRICS))


@dataclass(frozen=True)
@bounded
class Experiment:
    """What an experiment's file says. prompts: training captions, drawn with `steps` DDIM steps and `guidance`."""

    title: str
    teacher: str
    schema: int = field(metadata=bounds(SCHEMA, SCHEMA))
    models: tuple[Model, ...]
    comparisons: tuple[Comparison, ...] = ()
    prompts: int = field(default=500, metadata=bounds(2, 10_000))
    steps: int = field(default=25, metadata=bounds(*LIMITS.steps))
    guidance: float = field(default=4.0, metadata=bounds(*LIMITS.guidance))

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names) or not names:
            raise ConfigError("every model of an experiment needs a name of its own, and there must be one")
        for comparison in self.comparisons:
            for name in (comparison.ours, *comparison.theirs):
                if name not in names:
                    raise ConfigError(unknown("model", name, names))
        seeds = {model.name: model.seeds for model in self.models}
        for comparison in self.comparisons:
            for name in comparison.theirs:
                if seeds[name] != seeds[comparison.ours]:
                    raise ConfigError(f"{comparison.ours} and {name} are compared, so they need the same seeds")


def read_experiment(path: Path, data: Path | None = None) -> Experiment:
    """The experiment in a TOML file; every pass is checked now; `data` stands where passes say DATA.

    Raises:
        ConfigError: it cannot be read, or a key, name or value is not legal.
    """
    table = read_toml(path, LIMITS.recipe_bytes)
    spelling = {"model": "models", "compare": "comparisons"}
    found = load(Experiment, {spelling.get(key, key): value for key, value in table.items()}, str(path))
    for model in found.models:
        made_passes(found, model, model.seeds[0], data)
    return found


def made_passes(experiment: Experiment, model: Model, seed: int, data: Path | None = None) -> list[Any]:
    """The passes of `model`, with `seed` in those that take one, and `data` where they say DATA."""
    entries = [_filled(entry, data) for entry in model.passes]
    table = {"schema": 1, "source": experiment.teacher, "pass": entries}
    steps = [made for _, made in parse_recipe(table, f"model {model.name}").passes]
    return [_seeded(step, seed) for step in steps]


def _filled(entry: Mapping[str, Any], data: Path | None) -> dict[str, Any]:
    """`entry` with the folder of pictures in place of DATA."""
    return {key: str(data) if value == DATA and data is not None else value for key, value in entry.items()}


def _seeded(step: Any, seed: int) -> Any:
    has = any(entry.name == "seed" for entry in dataclasses.fields(step))
    return dataclasses.replace(step, seed=seed) if has else step
