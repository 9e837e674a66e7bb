"""Element by element: numbers, comparisons, activations, reductions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.exporters.onnx.graph import FREE, Size, Value, Weight
from diffship.exporters.onnx.translate import Translation, dtype_name, implements

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

_SQRT_HALF = math.sqrt(0.5)


def _binary(t: Translation, op: str, a: Any, b: Any) -> Value:
    return t.emit(op, t.cast(a, t.dtype), t.cast(b, t.dtype))


def _same(t: Translation, a: Any, b: Any, neutral: float) -> Value | None:
    """`a` if `b` is the neutral number and nothing else changes."""
    if isinstance(b, (int, float)) and b == neutral and isinstance(a, Value):
        if a.dtype == t.dtype and a.shape == t.shape:
            return a
    return None


@implements("aten.add.Tensor", "aten.add.Scalar")
def add(t: Translation, a: Any, b: Any, alpha: float = 1) -> Value:
    scaled = _scaled(t, b, alpha)
    return _same(t, a, scaled, 0) or _binary(t, "Add", a, scaled)


@implements("aten.sub.Tensor", "aten.sub.Scalar")
def sub(t: Translation, a: Any, b: Any, alpha: float = 1) -> Value:
    scaled = _scaled(t, b, alpha)
    return _same(t, a, scaled, 0) or _binary(t, "Sub", a, scaled)


@implements("aten.rsub.Scalar")
def rsub(t: Translation, a: Any, b: Any, alpha: float = 1) -> Value:
    return _binary(t, "Sub", b, _scaled(t, a, alpha))


def _scaled(t: Translation, x: Any, factor: float) -> Any:
    if factor == 1:
        return x
    found = t.cast(x, t.dtype)
    return t.emit("Mul", found, t.value(factor), shape=found.shape)


@implements("aten.mul.Tensor", "aten.mul.Scalar")
def mul(t: Translation, a: Any, b: Any) -> Value:
    return _same(t, a, b, 1) or _binary(t, "Mul", a, b)


@implements("aten.div.Tensor", "aten.div.Scalar")
def div(t: Translation, a: Any, b: Any) -> Value:
    return _same(t, a, b, 1) or _binary(t, "Div", a, b)


@implements("aten.pow.Tensor_Scalar")
def power(t: Translation, a: Any, b: float) -> Value:
    base = t.cast(a, t.dtype)
    return t.emit("Mul", base, base) if b == 2 else t.emit("Pow", base, t.cast(b, t.dtype))


def _elementwise(aten: str, op: str) -> None:
    @implements(aten)
    def emit(t: Translation, x: Any) -> Value:
        return t.emit(op, t.cast(x, t.dtype))


for _aten, _op in {
    "exp": "Exp",
    "log": "Log",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "sqrt": "Sqrt",
    "neg": "Neg",
    "abs": "Abs",
    "erf": "Erf",
    "floor": "Floor",
    "reciprocal": "Reciprocal",
    "logical_not": "Not",
}.items():
    _elementwise(f"aten.{_aten}.default", _op)


@implements("aten.relu.default")
def relu(t: Translation, x: Any) -> Value:
    """ONNX Runtime has no Relu of 64-bit integers."""
    return t.emit("Relu", x) if t.dtype.startswith(("float", "bfloat")) else t.emit("Clip", x, t.value(0))


@implements("aten.rsqrt.default")
def rsqrt(t: Translation, x: Any) -> Value:
    return t.emit("Reciprocal", t.emit("Sqrt", t.cast(x, t.dtype)))


def _comparison(aten: str, op: str) -> None:
    @implements(f"aten.{aten}.Tensor", f"aten.{aten}.Scalar")
    def emit(t: Translation, a: Any, b: Any) -> Value:
        common = _common(t, a, b)
        result = t.emit(op, t.cast(a, common), t.cast(b, common), dtype="bool")
        return t.emit("Not", result) if aten == "ne" else result


def _common(t: Translation, a: Any, b: Any) -> str:
    """The type in which torch compares: numbers do not widen a tensor of their own kind."""
    parts = [_stand_in(value) for value in (a, b)]
    return dtype_name(torch.result_type(*parts))


def _stand_in(value: Any) -> Any:
    if isinstance(value, Size):
        return 1
    if not isinstance(value, (Value, Weight)):
        return value
    return torch.empty((1,) * len(value.shape), dtype=getattr(torch, value.dtype))


for _aten, _op in {"le": "LessOrEqual", "lt": "Less", "ge": "GreaterOrEqual", "gt": "Greater", "eq": "Equal"}.items():
    _comparison(_aten, _op)
_comparison("ne", "Equal")


@implements("aten.logical_and.default")
def logical_and(t: Translation, a: Any, b: Any) -> Value:
    return t.emit("And", t.cast(a, "bool"), t.cast(b, "bool"))


@implements("aten.where.self")
def where(t: Translation, condition: Any, a: Any, b: Any) -> Value:
    return t.emit("Where", condition, t.cast(a, t.dtype), t.cast(b, t.dtype))


@implements("aten.masked_fill.Scalar")
def masked_fill(t: Translation, x: Any, mask: Any, value: float) -> Value:
    return t.emit("Where", mask, t.value(value), x)


@implements("aten.clamp.default", "aten.clip.default")
def clamp(t: Translation, x: Any, low: float | None = None, high: float | None = None) -> Value:
    bounds = [None if bound is None else t.value(bound) for bound in (low, high)]
    return t.emit("Clip", t.cast(x, t.dtype), *bounds)


@implements("aten.minimum.default", "aten.min.other")
def minimum(t: Translation, a: Any, b: Any) -> Value:
    return _binary(t, "Min", a, b)


@implements("aten.clamp.Tensor")
def clamp_between(t: Translation, x: Any, low: Any = None, high: Any = None) -> Value:
    """If `low` is above `high`, the result is `high`."""
    raised = t.cast(x, t.dtype) if low is None else _binary(t, "Max", x, low)
    return raised if high is None else _binary(t, "Min", raised, high)


@implements("aten.isinf.default")
def isinf(t: Translation, x: Any) -> Value:
    return t.emit("IsInf", t.cast(x, "float32"))  # below opset 20, of float32 alone


@implements("aten.any.default")
def any_(t: Translation, x: Any) -> Value:
    """ONNX has no reduction of truths."""
    return t.cast(_reduce(t, "ReduceMax", t.cast(x, "bool"), None, False, "int32"), "bool")


@implements("aten.silu.default")
def silu(t: Translation, x: Any) -> Value:
    return t.emit("Mul", x, t.emit("Sigmoid", x))


@implements("aten.gelu.default")
def gelu(t: Translation, x: Any, approximate: str = "none") -> Value:
    if t.opset >= 20:
        return t.emit("Gelu", x, approximate=approximate)
    if approximate == "tanh":
        cube = t.emit("Mul", t.emit("Mul", t.emit("Mul", x, x), x), t.value(0.044715))
        inner = t.emit("Tanh", t.emit("Mul", t.emit("Add", x, cube), t.value(math.sqrt(2 / math.pi))))
    else:
        inner = t.emit("Erf", t.emit("Mul", x, t.value(_SQRT_HALF)))
    return t.emit("Mul", t.emit("Mul", x, t.value(0.5)), t.emit("Add", inner, t.value(1.0)))


@implements("aten.softmax.int", "aten._softmax.default")
def softmax(t: Translation, x: Any, axis: int) -> Value:
    return t.emit("Softmax", t.cast(x, t.dtype), axis=axis)


@implements("aten.argmax.default")
def argmax(t: Translation, x: Any, axis: int | None = None, keepdim: bool = False) -> Value:
    """Index of the greatest value, of the first one if several are; without `axis`, in the flattened tensor."""
    found = t.value(x)
    if axis is not None:
        return t.emit("ArgMax", found, axis=axis, keepdims=int(keepdim))
    flat = t.emit("Reshape", found, t.graph.ints([-1]), dtype=found.dtype, shape=(FREE,))
    index = t.emit("ArgMax", flat, axis=0, keepdims=0, shape=())
    return t.emit("Reshape", index, t.graph.ints([1] * len(found.shape))) if keepdim else index


@implements("aten.mean.default", "aten.mean.dim")
def mean(t: Translation, x: Any, axes: list[int] | None = None, keepdim: bool = False) -> Value:
    return _reduce(t, "ReduceMean", x, axes, keepdim)


@implements("aten.sum.dim_IntList")
def sum_(t: Translation, x: Any, axes: list[int] | None, keepdim: bool = False) -> Value:
    return _reduce(t, "ReduceSum", x, axes, keepdim)


def _reduce(t: Translation, op: str, x: Any, axes: list[int] | None, keepdim: bool, dtype: str = "") -> Value:
    """In `dtype`, by default the result's. No axes are all axes, in torch as in ONNX."""
    over = [t.graph.ints(axes)] if axes else []
    kind = dtype or t.dtype
    return t.emit(op, t.cast(x, kind), *over, dtype=kind, keepdims=int(keepdim))
