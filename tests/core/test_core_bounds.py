"""Bounds of a dataclass's fields hold however an instance is made."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import typing
from dataclasses import dataclass, field
from typing import Any

import pytest

import diffship
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.strict import bounded, bounds, choices, load, plain

RULES = {"low", "high", "choices"}


def _bounded_classes() -> list[type[Any]]:
    """Every dataclass of the package that has a bounded field and that can be made."""
    found = {}
    for info in pkgutil.walk_packages(diffship.__path__, "diffship."):
        if not info.name.endswith("__main__"):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value) and not inspect.isabstract(value):
                    if any(entry.metadata.keys() & RULES for entry in dataclasses.fields(value)):
                        found[f"{value.__module__}.{value.__qualname__}"] = value
    return [found[name] for name in sorted(found)]


CLASSES = _bounded_classes()


def _illegal(kind: Any, metadata: Any) -> Any:
    """A value of the right form that the field's metadata forbids."""
    if "choices" in metadata:
        bad: Any = "no such choice"
    else:
        bad = 2 * abs(metadata["high"]) + 1 if math.isfinite(metadata["high"]) else metadata["low"] - 1
    origins = {typing.get_origin(part) or part for part in (kind, *typing.get_args(kind))}
    if tuple in origins or list in origins:
        return (bad,)
    return {"name": bad} if dict in origins else bad


def test_the_walk_finds_options_facts_and_samplers() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert {"Family", "Tolerance", "Onnx", "TensorRt", "DistillPass", "Euler", "OnnxRuntimeRunner"} <= names


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_bound_holds_in_the_constructor(cls: Any) -> None:
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        if not entry.metadata.keys() & RULES:
            continue
        # a bare instance: the fields before this one are legal, those behind it are not there yet
        made = object.__new__(cls)
        for other in dataclasses.fields(cls):
            if other is entry:
                object.__setattr__(made, other.name, _illegal(hints[other.name], other.metadata))
                break
            if other.default is not dataclasses.MISSING:
                object.__setattr__(made, other.name, other.default)
            elif other.default_factory is not dataclasses.MISSING:
                object.__setattr__(made, other.name, other.default_factory())
            else:
                object.__setattr__(made, other.name, _legal(hints[other.name], other.metadata))
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{entry.name}"):
            made.__post_init__()


def _legal(kind: Any, metadata: Any) -> Any:
    if "choices" in metadata:
        return metadata["choices"][0]
    if typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind):
        return tuple(_legal(part, metadata) for part in typing.get_args(kind))
    if "low" in metadata and typing.get_origin(kind) not in (tuple, list, dict):
        return kind(metadata["low"]) if kind in (int, float) else metadata["low"]
    return {tuple: (), list: [], dict: {}}.get(typing.get_origin(kind) or kind)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps_default", 200),
        ("guidance_default", 50.0),
        ("scaling_factor", -0.18215),
        ("scaling_factor", math.nan),
        ("default_size", 8192),
        ("prediction_type", "flow_prediction"),
        ("latent_channels", 512),
        ("latent_channels", 4.0),
        ("latent_channels", True),
    ],
)
def test_a_family_that_no_manifest_may_hold_cannot_be_made(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Family\.{name}"):
        Family("sd", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(Family("sd"), **{name: value})


def test_what_can_be_made_is_what_can_be_loaded() -> None:
    family = Family("sd", guidance_default=7)  # whole numbers are numbers
    assert load(Family, plain(family), "family") == family


def test_the_own_check_of_a_class_comes_after_its_bounds() -> None:
    seen = []

    @dataclass(frozen=True)
    @bounded
    class Options:
        low: int = field(default=1, metadata=bounds(1, 9))
        kind: str = field(default="a", metadata=choices("a", "b"))

        def __post_init__(self) -> None:
            seen.append(self.low)

    @dataclass(frozen=True)
    class More(Options):
        high: int = field(default=9, metadata=bounds(1, 9))

    with pytest.raises(ConfigError, match=r"More\.high is 10"):
        More(high=10)
    with pytest.raises(ConfigError, match=r"Options\.low is '2'"):
        Options("2")  # type: ignore[arg-type]
    assert not seen
    assert More(3).low == 3 and seen == [3]
