"""Shapes, slices, joins, look-ups and conversions: no arithmetic on the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffship.core.errors import UnsupportedError
from diffship.exporters.onnx.graph import Dim, Size, Value
from diffship.exporters.onnx.translate import Translation, implements

_END = 2**63 - 1
_WRAP_OPSET = 19  # the first whose Pad goes round


@implements(
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.alias.default",
)
def unchanged(t: Translation, x: Any) -> Value:
    return t.value(x)


@implements("aten.dropout.default")
def dropout(t: Translation, x: Any, share: float, train: bool) -> Value:
    if train and share:
        raise UnsupportedError("dropout that is on has no ONNX form here: call eval() first")
    return t.value(x)


@implements("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default")
def convert(t: Translation, x: Any) -> Value:
    return t.cast(x, t.dtype)


@implements("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def reshape(t: Translation, x: Any, sizes: Sequence[Any]) -> Value:
    return _reshape(t, t.value(x), list(sizes))


@implements("aten.unflatten.int")
def unflatten(t: Translation, x: Any, axis: int, sizes: Sequence[Any]) -> Value:
    asked: list[Any] = [None] * len(t.shape)
    place = axis % len(t.value(x).shape)
    asked[place : place + len(sizes)] = sizes
    return _reshape(t, t.value(x), asked)


@implements("aten.flatten.using_ints")
def flatten(t: Translation, x: Any, start: int = 0, end: int = -1) -> Value:
    """The result's shape says what `start` and `end` do."""
    return _reshape(t, t.value(x), [None] * len(t.shape))


def _reshape(t: Translation, x: Value, asked: list[Any]) -> Value:
    """Free sizes are copied (0) if they stay in place; at most one is left to infer (-1), so most need no Shape."""
    if x.shape == t.shape:
        return x
    target = [_target(dim, x.shape[i] if i < len(x.shape) else None) for i, dim in enumerate(t.shape)]
    unknown = [i for i, dim in enumerate(target) if dim is None]
    inferred = next((i for i in unknown if not isinstance(asked[i], Size)), unknown[-1] if unknown else None)
    for i in unknown:
        target[i] = -1 if i == inferred else asked[i]
    if None in target:
        raise UnsupportedError(f"a reshape of {x.shape} to {t.shape} leaves more than one size open")
    return t.emit("Reshape", x, t.sizes(target))


def _target(dim: Dim, before: Dim | None) -> int | None:
    if isinstance(dim, int):
        return dim
    return 0 if dim == before else None


@implements("aten.unsqueeze.default")
def unsqueeze(t: Translation, x: Any, axis: int) -> Value:
    return t.emit("Unsqueeze", x, t.graph.ints([axis % len(t.shape)]))


@implements("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(t: Translation, x: Any, axes: int | Sequence[int]) -> Value:
    found = t.value(x)
    listed = [axes] if isinstance(axes, int) else list(axes)
    if not all(isinstance(found.shape[axis], int) for axis in listed):
        raise UnsupportedError("squeezing an axis that may have any size has no ONNX form: at size 1 it would go")
    ones = [axis for axis in listed if found.shape[axis] == 1]
    return t.emit("Squeeze", found, t.graph.ints(ones)) if ones else found


@implements("aten.permute.default")
def permute(t: Translation, x: Any, axes: Sequence[int]) -> Value:
    rank = len(t.shape)
    return t.emit("Transpose", x, perm=[axis % rank for axis in axes])


@implements("aten.transpose.int")
def transpose(t: Translation, x: Any, first: int, second: int) -> Value:
    order = list(range(len(t.shape)))
    order[first], order[second] = order[second], order[first]
    return t.emit("Transpose", x, perm=order)


@implements("aten.t.default")
def matrix_transpose(t: Translation, x: Any) -> Value:
    return t.emit("Transpose", x, perm=[1, 0]) if len(t.shape) == 2 else t.value(x)


@implements("aten.expand.default", "aten.broadcast_to.default")
def expand(t: Translation, x: Any, sizes: Sequence[Any]) -> Value:
    """A vector is always expanded: `timestep` may hold one value if the program saw one per sample."""
    found = t.value(x)
    if found.shape == t.shape and len(found.shape) != 1:
        return found
    # -1 keeps the size; ONNX's Expand broadcasts, so 1 does the same
    return t.emit("Expand", found, t.sizes([1 if isinstance(size, int) and size == -1 else size for size in sizes]))


@implements("aten.repeat.default")
def repeat(t: Translation, x: Any, times: Sequence[Any]) -> Value:
    found = t.value(x)
    more = len(times) - len(found.shape)
    wide = t.emit("Unsqueeze", found, t.graph.ints(list(range(more))), shape=(1,) * more + found.shape)
    return t.emit("Tile", wide if more else found, t.sizes(times))


@implements("aten.slice.Tensor")
def slice_(t: Translation, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    found = t.value(x)
    whole = start in (None, 0) and (end is None or end == _END or isinstance(found.shape[axis], int))
    if found.shape == t.shape and step == 1:
        if not whole and not isinstance(end, Size):
            raise UnsupportedError(f"a slice up to {end} of an axis that may be longer has no ONNX form here")
        return found
    ends = [t.sizes([value]) for value in (0 if start is None else start, _END if end is None else end)]
    return t.emit("Slice", found, *ends, t.graph.ints([axis]), t.graph.ints([step]))


@implements("aten.select.int")
def select(t: Translation, x: Any, axis: int, index: Any) -> Value:
    return t.emit("Gather", x, t.value(index, "int64"), axis=axis)


@implements("aten.unbind.int")
def unbind(t: Translation, x: Any, axis: int = 0) -> list[Value]:
    """As many results as the axis is long; traces at other lengths have other results, which is refused before."""
    pieces = enumerate(t.shapes)
    return [t.emit("Gather", x, t.value(place, "int64"), axis=axis, shape=shape) for place, shape in pieces]


@implements("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")
def split(t: Translation, x: Any, sizes: Any, axis: int = 0) -> list[Value]:
    """The results' shapes say how long the pieces are, whatever `sizes` gives: a number of pieces, or lengths."""
    found = t.value(x)
    lengths = [shape[axis] for shape in t.shapes]
    if not all(isinstance(length, int) for length in lengths):
        return _slices(t, found, axis)
    outputs = [(found.dtype, shape) for shape in t.shapes]
    return t.graph.emit_many("Split", [found.name, t.sizes(lengths)], outputs, axis=axis)


def _slices(t: Translation, x: Value, axis: int) -> list[Value]:
    """The pieces of a free axis one by one: TensorRT takes no Split whose lengths are computed."""
    pieces, start = [], t.graph.ints([0])
    for i, shape in enumerate(t.shapes):
        last = i + 1 == len(t.shapes)
        end = (
            t.graph.ints([_END])
            if last
            else t.emit("Add", start, t.sizes([_size(shape[axis])]), dtype="int64", shape=(1,)).name
        )
        ends = (start, end, t.graph.ints([axis]), t.graph.ints([1]))
        pieces.append(t.emit("Slice", x, *ends, dtype=x.dtype, shape=shape))
        start = end
    return pieces


def _size(dim: Dim) -> int | Size:
    return dim if isinstance(dim, int) else Size(dim)


@implements("aten.cat.default", "aten.concat.default")
def cat(t: Translation, parts: Sequence[Any], axis: int = 0) -> Value:
    if len(parts) == 1:
        return t.value(parts[0])
    return t.emit("Concat", *(t.cast(part, t.dtype) for part in parts), axis=axis)


@implements("aten.stack.default")
def stack(t: Translation, parts: Sequence[Any], axis: int = 0) -> Value:
    at = t.graph.ints([axis % len(t.shape)])
    shape = tuple(1 if i == axis % len(t.shape) else dim for i, dim in enumerate(t.shape))
    return t.emit("Concat", *(t.emit("Unsqueeze", t.cast(part, t.dtype), at, shape=shape) for part in parts), axis=axis)


@implements("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(t: Translation, first: Any, second: Any = None, step: Any = 1) -> Value:
    """The numbers from start to end; one bound is the end, two are start and end."""
    start, end = (0, first) if second is None else (first, second)
    return t.emit("Range", *(t.cast(value, t.dtype) for value in (start, end, step)))


@implements("aten.full.default")
def full(t: Translation, sizes: Sequence[Any], value: Any) -> Value:
    return _full(t, sizes, value)


def _full(t: Translation, sizes: Sequence[Any], value: Any) -> Value:
    return t.emit("Expand", t.value(value), t.sizes(sizes))


@implements("aten.full_like.default")
def full_like(t: Translation, x: Any, value: Any) -> Value:
    """`x` gives the shape, and the type if none is named."""
    return t.emit("Expand", t.value(value), t.emit("Shape", x, dtype="int64", shape=(len(t.shape),)))


@implements("aten.zeros.default", "aten.ones.default")
def filled(t: Translation, sizes: Sequence[Any]) -> Value:
    return _full(t, sizes, 1 if "ones" in str(t.node.target) else 0)


@implements("aten.embedding.default")
def embedding(t: Translation, table: Any, ids: Any) -> Value:
    return t.emit("Gather", table, ids, axis=0)


@implements("aten.index.Tensor")
def index(t: Translation, x: Any, indices: Sequence[Any]) -> Value:
    """Rows by one index tensor, or elements by index tensors for the first axes, all of one shape."""
    if any(entry is None for entry in indices):
        raise UnsupportedError("indexing that skips an axis has no ONNX form here")
    found = [t.value(entry) for entry in indices]
    if any(entry.dtype not in ("int64", "int32") for entry in found):
        raise UnsupportedError("indexing by a mask has no ONNX form here: the result's size would depend on values")
    if len(indices) == 1:
        return t.emit("Gather", x, found[0], axis=0)
    found = [t.cast(entry, "int64") for entry in found]
    if len({value.shape for value in found}) != 1:
        raise UnsupportedError("indexing by tensors of unequal shapes has no ONNX form here")
    last = t.graph.ints([-1])
    rows = [t.emit("Unsqueeze", value, last, dtype="int64", shape=(*value.shape, 1)) for value in found]
    joined = t.emit("Concat", *rows, dtype="int64", shape=(*found[0].shape, len(rows)), axis=-1)
    return t.emit("GatherND", x, joined)


@implements("aten.constant_pad_nd.default")
def constant_pad(t: Translation, x: Any, amounts: Sequence[Any], value: float = 0) -> Value:
    return _pad(t, x, amounts, "constant", t.value(value))


@implements("aten.pad.default")
def pad(t: Translation, x: Any, amounts: Sequence[Any], mode: str = "constant", value: float | None = None) -> Value:
    if mode == "constant":
        return _pad(t, x, amounts, mode, t.value(value or 0))
    if mode == "circular" and t.opset < _WRAP_OPSET:
        raise UnsupportedError(f"circular padding has no form in opset {t.opset}; take {_WRAP_OPSET} or more")
    return _pad(t, x, amounts, {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode])


def _pad(t: Translation, x: Any, amounts: Sequence[Any], mode: str, *fill: Value) -> Value:
    """torch counts pairs from the last axis; ONNX takes all beginnings, then all ends."""
    rank = len(t.shape)
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(amounts) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    return t.emit("Pad", x, t.sizes([*begins, *ends]), *fill, mode=mode)
