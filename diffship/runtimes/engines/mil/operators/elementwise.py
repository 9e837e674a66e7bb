"""Operations on one element, or on two at the same place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.mil.operators.table import OPERATORS, Array, operator

_F = np.float32


def _pair(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def run(x: Array, y: Array) -> Array:
        return function(x, y)

    return run


def _single(function: Callable[[Array], Array]) -> Callable[..., Array]:
    def run(x: Array) -> Array:
        return function(x)

    return run


_PAIRS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "pow": np.power, "maximum": np.maximum,
    "minimum": np.minimum, "floor_div": np.floor_divide, "mod": np.mod, "equal": np.equal, "not_equal": np.not_equal,
    "less": np.less, "less_equal": np.less_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip
_SINGLES: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "sqrt": np.sqrt, "square": np.square, "exp": np.exp, "exp2": np.exp2, "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "tanh": np.tanh, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "logical_not": np.logical_not, "identity": np.asarray, "atan": np.arctan,
}  # fmt: skip
OPERATORS.update({name: _pair(function) for name, function in _PAIRS.items()})
OPERATORS.update({name: _single(function) for name, function in _SINGLES.items()})


@operator("real_div")
def real_div(x: Array, y: Array) -> Array:
    return x / y if x.dtype.kind == "f" else np.trunc(x / y).astype(x.dtype)


@operator("rsqrt")
def rsqrt(x: Array, epsilon: Any = 1e-12) -> Array:
    return 1 / np.sqrt(x + _F(epsilon))


@operator("inverse")
def inverse(x: Array, epsilon: Any = 1e-4) -> Array:
    return 1 / (x + _F(epsilon))


@operator("log")
def log(x: Array, epsilon: Any = 1e-45) -> Array:
    return np.log(x + _F(epsilon))


@operator("clip")
def clip(x: Array, alpha: Any, beta: Any) -> Array:
    return np.clip(x, _F(alpha), _F(beta))


@operator("relu")
def relu(x: Array) -> Array:
    return np.maximum(x, _F(0))


@operator("leaky_relu")
def leaky_relu(x: Array, alpha: Any = 0.01) -> Array:
    return np.where(x > 0, x, _F(alpha) * x)


@operator("sigmoid")
def sigmoid(x: Array) -> Array:
    # tanh neither overflows nor loses small values
    return _F(0.5) * (np.tanh(_F(0.5) * x) + _F(1))


@operator("silu")
def silu(x: Array) -> Array:
    return x * sigmoid(x)


@operator("softplus")
def softplus(x: Array) -> Array:
    return np.logaddexp(x, _F(0))


@operator("erf")
def erf(x: Array) -> Array:
    """Cubic Hermite interpolation of math.erf at steps of 1/512, of which error is below 1e-12."""
    values, slopes = _erf_table()
    place = (np.clip(x, -_EDGE, _EDGE).astype(np.float64) + _EDGE) * _STEPS
    low = np.minimum(place.astype(np.int64), len(values) - 2)
    t = place - low
    a, b, c, d = values[low], values[low + 1], slopes[low] / _STEPS, slopes[low + 1] / _STEPS
    return (a + t * (c + t * (3 * (b - a) - 2 * c - d + t * (2 * (a - b) + c + d)))).astype(x.dtype)


@operator("gelu")
def gelu(x: Array, mode: Any = "EXACT") -> Array:
    """Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    if mode == "EXACT":
        return _F(0.5) * x * (_F(1) + erf(x * _F(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        inner = _F(math.sqrt(2 / math.pi)) * (x + _F(0.044715) * x**3)
        return _F(0.5) * x * (_F(1) + np.tanh(inner))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(_F(1.702) * x)
    raise UnsupportedError(
        f"gelu has the mode {str(mode)[:40]!r}; legal: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION"
    )


@operator("select")
def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


@operator("cast")
def cast(x: Array, dtype: Any) -> Array:
    """Float types are all float32 here; the interpreter rounds what the program calls float16."""
    names = {
        "fp16": "f4",
        "fp32": "f4",
        "bool": "?",
        "int32": "i4",
        "int16": "i2",
        "uint16": "u2",
        "int8": "i1",
        "uint8": "u1",
    }
    if dtype not in names:
        raise UnsupportedError(f"cast to {str(dtype)[:40]!r}; legal: {', '.join(names)}")
    return x.astype(names[str(dtype)])


_EDGE, _STEPS = 6.0, 512  # erf(6) is 1 in float32


@cache
def _erf_table() -> tuple[Array, Array]:
    points = np.arange(-_EDGE * _STEPS, _EDGE * _STEPS + 1) / _STEPS
    return np.array([math.erf(x) for x in points]), 2 / math.sqrt(math.pi) * np.exp(-(points**2))
