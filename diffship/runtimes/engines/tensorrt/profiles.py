"""Which optimisation profile of a plan takes a call, and what to say if none does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from diffship.core.errors import RunnerError, UnsupportedError
from diffship.core.strict import unknown
from diffship.targets.tensorrt.plan import PlanInput, Shapes

Shape = tuple[int, ...]


def choose_profile(inputs: Mapping[str, PlanInput], shapes: Mapping[str, Shape]) -> int:
    """The profile whose ranges hold all `shapes`; among several the one whose best shape is nearest.

    Near is measured in factors: a side of half the best size is as far as one of twice. Of equal ones the first.

    Raises:
        RunnerError: an input has no shape, or a shape no input.
        UnsupportedError: no profile holds them, with the legal ranges and the nearest legal shapes.
    """
    for name in shapes:
        if name not in inputs:
            raise RunnerError(unknown("feed", name, inputs))
    missing = [name for name in inputs if name not in shapes]
    if missing:
        raise RunnerError(f"missing feed {', '.join(missing)}; the plan takes {', '.join(inputs)}")
    count = len(next(iter(inputs.values())).profiles)
    ranges = [{name: entry.profiles[index] for name, entry in inputs.items()} for index in range(count)]
    fitting = [index for index in range(count) if all(_holds(ranges[index][name], shapes[name]) for name in inputs)]
    if not fitting:
        raise UnsupportedError(_refusal(ranges, shapes))
    return min(fitting, key=lambda index: sum(_factors(ranges[index][name]["opt"], shapes[name]) for name in inputs))


def _holds(entry: Shapes, shape: Shape) -> bool:
    if len(entry["min"]) != len(shape):
        return False
    return all(low <= size <= high for low, size, high in zip(entry["min"], shape, entry["max"], strict=True))


def _factors(first: Sequence[int], second: Sequence[int]) -> float:
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(first, second, strict=True))


def _refusal(ranges: Sequence[Mapping[str, Shapes]], shapes: Mapping[str, Shape]) -> str:
    """What the nearest profile does not take, in one line."""
    for name, shape in shapes.items():
        rank = len(ranges[0][name]["min"])
        if len(shape) != rank:
            return f"{name} has shape {shape}; the plan takes {rank} axes: {_legal(ranges, name)}"
    near = min(
        ranges, key=lambda each: sum(_factors(_clamped(each[name], shapes[name]), shapes[name]) for name in shapes)
    )
    off = [name for name in shapes if not _holds(near[name], shapes[name])]
    said = [
        f"{name} {shapes[name]}: legal is {_legal(ranges, name)}, nearest {_clamped(near[name], shapes[name])}"
        for name in off
    ]
    flags = " ".join(f"{name}:{'x'.join(map(str, shapes[name]))}" for name in off)
    return f"the plan has no profile for {'; '.join(said)}. Export one with --min-shapes or --max-shapes {flags}"


def _clamped(entry: Shapes, shape: Shape) -> Shape:
    return tuple(min(max(size, low), high) for low, size, high in zip(entry["min"], shape, entry["max"], strict=True))


def _legal(ranges: Iterable[Mapping[str, Shapes]], name: str) -> str:
    """`(1 to 8, 4, 8 to 96)`, or several of them."""
    return " or ".join(dict.fromkeys(_text(each[name]) for each in ranges))


def _text(entry: Shapes) -> str:
    sides = [
        str(low) if low == high else f"{low} to {high}" for low, high in zip(entry["min"], entry["max"], strict=True)
    ]
    return f"({', '.join(sides)})"
