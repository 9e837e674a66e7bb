"""Nodes and tensors of a 16-bit graph as float32: the same computation without the rounding of intermediate results.

Every weight keeps the value that it was rounded to. So float32 arithmetic on the result can be compared tightly with
torch on the same rounded weights, on a machine that computes nothing in that format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from diffship.core.dtype import as_bytes, to_float32
from diffship.core.errors import BundleError
from diffship.core.protobuf import encode_block, encode_field, encode_number, encode_text, fields, first_text, message
from diffship.runtimes.engines.onnx_edit import Attribute, Node
from diffship.runtimes.proof.onnx_model import Tensor

FLOAT32 = 1
NARROW = {10: "float16", 16: "bfloat16"}  # by TensorProto.DataType
_INT = 2  # AttributeProto.type of an integer


def widened_node(node: Node) -> Node:
    """`node` with casts to 16 bits as casts to float32, and tensors among its attributes widened."""
    return replace(node, attributes=tuple(_attribute(node.op, entry) for entry in node.attributes))


def widened_info(info: memoryview) -> memoryview:
    """A ValueInfoProto whose element type is float32 if it was a 16-bit float."""
    return memoryview(b"".join(_within(info, 2, _type)))


def widened_inline(tensor: Tensor) -> bytes | memoryview:
    """The message of an initializer that keeps its values inside, as float32."""
    return _inline(tensor.raw)


def widened_bytes(data: bytes, dtype: int) -> tuple[memoryview, int]:
    """Values of a weight and their type; 16-bit floats become float32."""
    if dtype not in NARROW:
        return memoryview(data), dtype
    return as_bytes(to_float32(_array(data, dtype), NARROW[dtype])), FLOAT32


def _array(data: bytes | memoryview, dtype: int) -> np.ndarray:
    return np.frombuffer(data, "<f2" if NARROW[dtype] == "float16" else "<u2")


def _attribute(op: str, attribute: Attribute) -> Attribute:
    if op == "Cast" and attribute.name == "to" and attribute.integer in NARROW:
        raw = encode_text(1, "to") + encode_number(3, FLOAT32) + encode_number(20, _INT)
        return replace(attribute, raw=raw, integer=FLOAT32)
    raw = b"".join(_within(memoryview(attribute.raw), 5, _inline))
    return replace(attribute, raw=raw)


def _within(data: memoryview, number: int, change: Callable[[memoryview], bytes | memoryview]) -> Iterator[bytes]:
    """The fields of a message, with `change` applied to the messages under `number`."""
    for entry in fields(data):
        if entry[0] == number:
            yield encode_block(number, change(message(entry[2])))
        else:
            yield encode_field(*entry)


def _type(data: memoryview) -> bytes:
    return b"".join(_within(data, 1, _tensor_type))


def _tensor_type(data: memoryview) -> bytes:
    pieces = []
    for number, wire, value in fields(data):
        narrow = number == 1 and value in NARROW
        pieces.append(encode_number(1, FLOAT32) if narrow else encode_field(number, wire, value))
    return b"".join(pieces)


def _inline(data: memoryview) -> bytes | memoryview:
    dtype = next((value for number, _, value in fields(data) if number == 2), 0)
    if dtype not in NARROW or not isinstance(dtype, int):
        return data
    raw = next((message(value) for number, _, value in fields(data) if number == 9), None)
    if raw is None:
        raise BundleError(f"tensor {first_text(data, 8)[:80]!a} keeps its 16-bit values in a form that is unknown here")
    wide = as_bytes(to_float32(_array(raw, dtype), NARROW[dtype]))
    kept = [encode_field(*entry) for entry in fields(data) if entry[0] not in (2, 9)]
    return b"".join([*kept, encode_number(2, FLOAT32), encode_block(9, wide)])
