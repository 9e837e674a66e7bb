"""The table of operations: functions over numpy arrays, whose parameters are the names of an operation's arguments.

Float arrays are float32, whatever the program calls them. A scalar argument is an array without axes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, TypeVar

import numpy as np

from diffship.core.errors import RunnerError
from diffship.core.limits import LIMITS

Array: TypeAlias = Any  # a numpy array; arithmetic on arrays of any type is Any to the type checker
Function = TypeVar("Function", bound=Callable[..., Any])
OPERATORS: dict[str, Callable[..., Any]] = {}


def operator(*names: str) -> Callable[[Function], Function]:
    """Enter the decorated function under each of `names`."""

    def enter(function: Function) -> Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return enter


@cache
def parameters(kind: str) -> frozenset[str]:
    """Names of the arguments that the operation `kind` takes here."""
    return frozenset(inspect.signature(OPERATORS[kind]).parameters)


def ints(values: Any) -> list[int]:
    """An argument that is a list of whole numbers."""
    return [int(value) for value in np.asarray(values).reshape(-1)]


def bools(values: Any, count: int) -> list[bool]:
    """An argument that is a list of `count` booleans; one that is left out (None) has False everywhere."""
    return [False] * count if values is None else [bool(value) for value in np.asarray(values).reshape(-1)]


def bounded_shape(shape: list[int]) -> list[int]:
    """`shape`, if a tensor may have it; raises RunnerError before anything is allocated."""
    if min(shape, default=0) < 0 or math.prod(shape) > LIMITS.tensor_elements:
        raise RunnerError(f"it would make a tensor of shape {shape}; at most {LIMITS.tensor_elements} elements")
    return shape
