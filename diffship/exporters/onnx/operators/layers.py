"""The layers that hold the weights and the time: products, convolutions, norms, attention, resizing.

From opset 20, 21 and 23 on, ONNX has Gelu, GroupNormalization (per channel) and Attention; ONNX Runtime runs a U-Net
of them 1.4 to 1.6 times as fast as the same in plain operators, which is what lower opsets get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.exporters.onnx.graph import FREE, Dim, Size, Value, Weight
from diffship.exporters.onnx.stored import TRANSPOSED
from diffship.exporters.onnx.translate import Translation, implements

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np = lazy("numpy")
    torch = lazy("torch")


@implements("aten.linear.default")
def linear(t: Translation, x: Any, weight: Any, bias: Any = None) -> Value:
    """MatMul with the weight stored transposed: engines pack it once, and fuse the bias."""
    kernel = _stored(t, weight) if isinstance(weight, Weight) else _transposed(t, weight)
    product = t.emit("MatMul", _input(t, x, weight), kernel)
    return product if bias is None else t.emit("Add", product, bias)


def _input(t: Translation, x: Any, weight: Any) -> Value:
    """What a layer reads: `x`, or `x` rounded to the codes that come with its weight."""
    codes = weight.inputs if isinstance(weight, Weight) else None
    return t.value(x) if codes is None else t.graph.coded(t.value(x), codes)


def _stored(t: Translation, weight: Weight) -> Value:
    """The weight of a product, with the output channels last."""
    if weight.packing is None:
        return t.graph.weight(weight, TRANSPOSED)
    return t.graph.packed(weight, weight.packing, True, weight.shape[::-1])


def _transposed(t: Translation, x: Any) -> Value:
    """The last two axes swapped."""
    found = t.value(x)
    if len(found.shape) < 2:
        raise UnsupportedError("a product with a weight of one axis has no ONNX form here")
    rank = len(found.shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    return t.emit("Transpose", found, perm=order, dtype=found.dtype, shape=tuple(found.shape[i] for i in order))


@implements("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def matmul(t: Translation, a: Any, b: Any) -> Value:
    return t.emit("MatMul", a, b)


@implements("aten.einsum.default")
def einsum(t: Translation, equation: str, operands: Sequence[Any]) -> Value:
    """A Transpose where letters of one tensor are only put in another order, as networks that fold patches do."""
    before, _, after = equation.replace(" ", "").partition("->")
    if len(operands) == 1 and sorted(before) == sorted(set(after)) and len(before) == len(after):
        return t.emit("Transpose", operands[0], perm=[before.index(letter) for letter in after])
    return t.emit("Einsum", *operands, equation=equation)


@implements("aten.conv2d.default")
def conv2d(
    t: Translation,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Value:
    kernel = _kernel(t, weight)
    stride, padding, dilation = (_pair(value) for value in (stride, padding, dilation))
    return t.emit(
        "Conv",
        _input(t, x, weight),
        kernel,
        *([] if bias is None else [bias]),
        kernel_shape=list(kernel.shape[2:]),
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=groups,
    )


def _kernel(t: Translation, weight: Any) -> Value:
    """The weight of a convolution. Blocks of four bits run over whole rows, so those are stored with two axes."""
    packing = weight.packing if isinstance(weight, Weight) else None
    if packing is None:
        return t.value(weight)
    if not packing.block:
        return t.graph.packed(weight, packing, False, weight.shape)
    rows = t.graph.packed(weight, packing, False, (weight.shape[0], math.prod(weight.shape[1:])))
    return t.emit("Reshape", rows, t.graph.ints(weight.shape), shape=weight.shape)


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * (3 - len(values)) if len(values) == 1 else list(values)


@implements("aten.layer_norm.default")
def layer_norm(
    t: Translation, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    scale = _ones(t, shape) if weight is None else weight
    return t.emit("LayerNormalization", x, scale, *([] if bias is None else [bias]), axis=-len(shape), epsilon=eps)


@implements("aten.rms_norm.default")
def rms_norm(t: Translation, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Value:
    """Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4; in float32 whatever the part computes in, as in torch."""
    wide = t.cast(x, "float32")
    rank = len(shape)
    narrow = (*wide.shape[: len(wide.shape) - rank], *[1] * rank)

    def emit(op: str, *inputs: Any, of: tuple[Dim, ...] = narrow, **attributes: Any) -> Value:
        return t.emit(op, *inputs, dtype="float32", shape=of, **attributes)

    square = emit("ReduceMean", emit("Mul", wide, wide, of=wide.shape), t.graph.ints(range(-rank, 0)), keepdims=1)
    least = float(np.finfo(np.float32).eps) if eps is None else eps
    root = emit("Reciprocal", emit("Sqrt", emit("Add", square, t.value(least, "float32"))))
    scaled = emit("Mul", wide, root, of=wide.shape)
    if weight is not None:
        scaled = emit("Mul", scaled, t.cast(weight, "float32"), of=wide.shape)
    return t.cast(scaled, t.dtype)


def _ones(t: Translation, shape: Sequence[int], value: float = 1.0) -> Value:
    return t.graph.constant(np.full(tuple(shape), value, t.dtype))


@implements("aten.group_norm.default")
def group_norm(t: Translation, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Value:
    found = t.value(x)
    channels = [_fixed(found.shape[1], "channels")]
    scale = _ones(t, channels) if weight is None else t.value(weight)
    shift = _ones(t, channels, 0.0) if bias is None else t.value(bias)
    if t.opset >= 21:
        return t.emit("GroupNormalization", found, scale, shift, num_groups=groups, epsilon=eps)
    return _plain_group_norm(t, found, groups, scale, shift, eps)


def _plain_group_norm(t: Translation, x: Value, groups: int, scale: Value, shift: Value, eps: float) -> Value:
    """Each group as one instance (Wu and He 2018, "Group Normalization", figure 2)."""
    split = t.emit("Reshape", x, t.graph.ints([0, groups, -1]), shape=(x.shape[0], groups, FREE))
    ones, zeros = _ones(t, [groups]), _ones(t, [groups], 0.0)
    even = t.emit("InstanceNormalization", split, ones, zeros, epsilon=eps, shape=split.shape)
    back = t.emit("Reshape", even, t.emit("Shape", x, dtype="int64", shape=(len(x.shape),)))
    per_channel = t.graph.ints(list(range(1, len(x.shape) - 1)))
    wide = [
        t.emit("Unsqueeze", value, per_channel, shape=(*value.shape, *[1] * (len(x.shape) - 2)))
        for value in (scale, shift)
    ]
    return t.emit("Add", t.emit("Mul", back, wide[0]), wide[1])


@implements("aten.scaled_dot_product_attention.default")
def attention(
    t: Translation,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(scale Q K^T + mask) V over (batch, heads, length, width); scale is 1/sqrt(width) by default."""
    if dropout_p or enable_gqa:
        raise UnsupportedError("attention with dropout or grouped heads has no ONNX form here")
    if t.opset < 23 or len(t.shape) != 4:  # of three axes, ONNX's own operator takes the last for heads and widths
        return _plain_attention(t, t.value(query), t.value(key), value, attn_mask, is_causal, scale)
    options: dict[str, Any] = {"is_causal": 1} if is_causal else {}
    if scale is not None and not math.isclose(
        scale, _fixed(t.value(query).shape[-1], "head widths") ** -0.5, rel_tol=1e-6
    ):
        options["scale"] = float(scale)
    return t.emit("Attention", query, key, value, *([] if attn_mask is None else [attn_mask]), **options)


def _plain_attention(
    t: Translation, query: Value, key: Value, value: Any, mask: Any, is_causal: bool, scale: float | None
) -> Value:
    factor = _fixed(query.shape[-1], "head widths") ** -0.5 if scale is None else scale
    scores_shape = (*query.shape[:-1], key.shape[-2])
    # scaled before the product, so that fp16 does not overflow in it
    scaled = t.emit("Mul", query, t.value(factor, query.dtype), shape=query.shape)
    scores = t.emit("MatMul", scaled, _transposed(t, key), shape=scores_shape)
    if is_causal:
        scores = t.emit("Add", scores, _causal(t, query, key), shape=scores_shape)
    if mask is not None:
        scores = t.emit("Add", scores, _additive(t, t.value(mask)), shape=scores_shape)
    return t.emit("MatMul", t.emit("Softmax", scores, axis=-1, shape=scores_shape), value)


def _fixed(dim: Dim, what: str) -> int:
    if not isinstance(dim, int):
        raise UnsupportedError(f"{what} that depend on the input's size have no ONNX form")
    return dim


def _causal(t: Translation, query: Value, key: Value) -> Value:
    """0 up to the diagonal, the lowest number above it; (length, length)."""
    length = (query.shape[-2], key.shape[-2])
    sizes = t.sizes([_dim(size) for size in length])
    low = t.emit("Expand", t.value(_lowest(t)), sizes, shape=length)
    return t.emit("Trilu", low, t.graph.constant(np.array(1, np.int64)), upper=1, shape=length)


def _dim(dim: Dim) -> int | Size:
    return dim if isinstance(dim, int) else Size(dim)


def _additive(t: Translation, mask: Value) -> Value:
    if mask.dtype != "bool":
        return mask
    return t.emit("Where", mask, t.value(0.0), t.value(_lowest(t)), shape=mask.shape)


def _lowest(t: Translation) -> float:
    return float(torch.finfo(getattr(torch, t.dtype)).min)


@implements("aten.upsample_nearest2d.vec")
def upsample_nearest(t: Translation, x: Any, sizes: Sequence[Any] | None, scales: Sequence[float] | None) -> Value:
    options: dict[str, Any] = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    if scales is not None:
        factors = t.graph.constant(np.array([1, 1, *scales], np.float32))
        return t.emit("Resize", x, None, factors, **options)
    found = t.value(x)
    head = [_dim(dim) for dim in found.shape[:2]]
    return t.emit("Resize", found, None, None, t.sizes([*head, *(sizes or ())]), **options)
