"""The program of an .mlmodel file, read field by field without coremltools.

Field numbers are those of Model.proto and MIL.proto (github.com/apple/coremltools, mlmodel/format). A model without a
program, with several functions or with nested blocks (control flow) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import BundleError, UnsupportedError
from diffship.core.limits import LIMITS
from diffship.core.protobuf import FIXED32, FIXED64, fields, message, numbers, signed, string

_PROGRAM = 502  # of Model, the one kind of model that is read
DTYPES: Mapping[int, str] = {
    1: "bool", 2: "string", 10: "float16", 11: "float32", 12: "float64", 21: "int8", 22: "int16", 23: "int32",
    24: "int64", 25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2",
    37: "uint1", 38: "uint6", 39: "uint3",
}  # fmt: skip
# TensorValue: field -> type of what is packed there; 7 holds raw bytes of the tensor's own type
_PACKED = {1: "<f4", 6: "<f8"}
_DEPTH = 8  # of values inside values
BITS: Mapping[str, int] = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}


@dataclass(frozen=True)
class TensorType:
    """Element type ("float16") and shape of a tensor. Raises BundleError if it is larger than any that is legal."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.count > LIMITS.tensor_elements:
            raise BundleError(f"a tensor of shape {self.shape} has more than {LIMITS.tensor_elements} elements")

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Blob:
    """A tensor that lies in the weight file, at `offset`."""

    type: TensorType
    offset: int


Value: TypeAlias = "NDArray[Any] | str | list[Any] | dict[Any, Any] | Blob"
Argument: TypeAlias = "tuple[str | Value, ...]"  # names of tensors, and values; several if the argument is a list


@dataclass(frozen=True)
class Named:
    """The name and type of an input or a result; the type is None if it is no tensor."""

    name: str
    type: TensorType | None


@dataclass(frozen=True)
class Reference:
    """An argument that is the tensor of this name."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One operation. arguments: by name, each a tuple of references and values; listed: whether it takes a tuple."""

    kind: str
    arguments: Mapping[str, tuple[Any, ...]]
    outputs: tuple[Named, ...]
    attributes: Mapping[str, Value]

    @property
    def name(self) -> str:
        """That of its first result."""
        return self.outputs[0].name if self.outputs else self.kind


@dataclass(frozen=True)
class Program:
    """The one function of a model: its inputs, operations in order, and the names of its results."""

    inputs: tuple[Named, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


def read_program(path: Path) -> Program:
    """The program in the .mlmodel file `path`.

    Raises:
        BundleError: the file is damaged, or larger than any that is legal.
        UnsupportedError: it holds another kind of model, or control flow.
    """
    size = path.stat().st_size
    if size > LIMITS.mil_bytes:
        raise BundleError(f"{path.name} has {size} bytes; the limit is {LIMITS.mil_bytes}")
    try:
        return _model(memoryview(path.read_bytes()))
    except (UnicodeDecodeError, ValueError, OverflowError) as fault:
        raise BundleError(f"{path.name} is damaged: {str(fault)[:120]}") from None


def _model(data: memoryview) -> Program:
    for number, _, value in fields(data):
        if number == _PROGRAM:
            return _program(message(value))
    raise UnsupportedError("the model holds no MIL program (an older neural network, say), which is not read here")


def _program(data: memoryview) -> Program:
    functions = dict(_entry(message(value)) for number, _, value in fields(data) if number == 2)
    if len(functions) != 1:
        raise UnsupportedError(f"the model has {len(functions)} functions; one is legal")
    (function,) = functions.values()
    inputs = tuple(_named(message(value)) for number, _, value in fields(function) if number == 1)
    blocks = dict(_entry(message(value)) for number, _, value in fields(function) if number == 3)
    if len(blocks) != 1:
        raise UnsupportedError(f"the function has {len(blocks)} specializations; one is legal")
    (block,) = blocks.values()
    outputs = tuple(string(value) for number, _, value in fields(block) if number == 2)
    operations = []
    for number, _, value in fields(block):
        if number == 3:
            operations.append(_operation(message(value)))
        if len(operations) > LIMITS.mil_operations:
            raise BundleError(f"the program has more than {LIMITS.mil_operations} operations")
    return Program(inputs, outputs, tuple(operations))


def _operation(data: memoryview) -> Operation:
    kind, arguments, outputs, attributes = "", dict[str, tuple[Any, ...]](), list[Named](), dict[str, Value]()
    for number, _, value in fields(data):
        if number == 1:
            kind = string(value)
        elif number == 2:
            name, held = _entry(message(value))
            arguments[name] = tuple(_bound(message(v)) for n, _, v in fields(held) if n == 1)
        elif number == 3:
            outputs.append(_named(message(value)))
        elif number == 4:
            raise UnsupportedError(f"the operation {kind[:80]} holds a block (control flow), which is not run here")
        elif number == 5:
            name, held = _entry(message(value))
            attributes[name] = _value(held)
    return Operation(kind, arguments, tuple(outputs), attributes)


def _bound(data: memoryview) -> Any:
    for number, _, value in fields(data):
        return Reference(string(value)) if number == 1 else _value(message(value))
    raise BundleError("an argument of an operation is empty")


def _entry(data: memoryview) -> tuple[str, memoryview]:
    """Key and value of a map's entry."""
    key, held = "", memoryview(b"")
    for number, _, value in fields(data):
        if number == 1:
            key = string(value)
        elif number == 2:
            held = message(value)
    return key, held


def _named(data: memoryview) -> Named:
    name, kind = "", None
    for number, _, value in fields(data):
        if number == 1:
            name = string(value)
        elif number == 2:
            kind = _tensor_type(message(value))
    return Named(name, kind)


def _tensor_type(data: memoryview) -> TensorType | None:
    """A ValueType; None if it is a list, a tuple, a dictionary or a state."""
    for number, _, value in fields(data):
        if number != 1:
            continue
        code, shape = 0, list[int]()
        for inner, _, held in fields(message(value)):
            if inner == 1 and isinstance(held, int):
                code = held
            elif inner == 3:
                shape.append(_dimension(message(held)))
        if code not in DTYPES:
            raise UnsupportedError(f"a tensor has the element type {code}; legal: {', '.join(DTYPES.values())}")
        return TensorType(DTYPES[code], tuple(shape))
    return None


def _dimension(data: memoryview) -> int:
    for number, _, value in fields(data):
        if number == 1:
            return next((n for _, _, n in fields(message(value)) if isinstance(n, int)), 0)
    raise UnsupportedError("a tensor has a free size; packages of fixed sizes are run here")


def _value(data: memoryview, depth: int = 0) -> Value:
    if depth > _DEPTH:
        raise BundleError(f"values lie more than {_DEPTH} deep in values")
    kind, held, where = None, memoryview(b""), 0
    for number, _, value in fields(data):
        if number == 2:
            kind = _tensor_type(message(value))
        elif number in (3, 5):
            held, where = message(value), number
    if where != 5:
        return _immediate(held, kind, depth)
    if kind is None:
        raise BundleError("a value in the weight file has no type")
    offset = next((n for number, _, n in fields(held) if number == 2 and isinstance(n, int)), 0)
    return Blob(kind, offset)


def _immediate(data: memoryview, kind: TensorType | None, depth: int) -> Value:
    for number, _, value in fields(data):
        held = message(value)
        if number == 1:
            if kind is None:
                raise BundleError("a tensor has no type")
            return _tensor(held, kind)
        if number in (2, 3):
            return [_value(message(v), depth + 1) for n, _, v in fields(held) if n == 1]
        return dict(_pair(message(v), depth + 1) for n, _, v in fields(held) if n == 1)
    raise BundleError("a value is empty")


def _pair(data: memoryview, depth: int) -> tuple[Any, Any]:
    found = {number: _value(message(value), depth) for number, _, value in fields(data)}
    return str(found.get(1)), found.get(2)


def _tensor(data: memoryview, kind: TensorType) -> Value:
    for number, _, value in fields(data):
        held = message(value)
        if number == 4:
            texts = [string(v) for n, _, v in fields(held) if n == 1]
            return texts[0] if kind.shape == () and texts else list(texts)
        return _shaped(_elements(number, held, kind), kind)
    return _shaped(np.zeros(0), kind)


def _elements(number: int, data: memoryview, kind: TensorType) -> NDArray[Any]:
    """The elements of a repeated field, packed or one by one."""
    if number == 7:
        raw = b"".join(bytes(message(value)) for n, _, value in fields(data) if n == 1)
        return from_bytes(raw, kind)
    if number in _PACKED:
        return np.concatenate([*_floats(data, np.dtype(_PACKED[number])), np.zeros(0, np.float32)])
    return np.array([signed(n) for f, _, value in fields(data) if f == 1 for n in numbers(value)], np.int64)


def _floats(data: memoryview, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    for number, wire, value in fields(data):
        if number == 1 and wire not in (FIXED32, FIXED64) and isinstance(value, int):
            raise BundleError("a float is stored as an integer")
        if number == 1:
            yield np.frombuffer(message(value), dtype)


def _shaped(array: NDArray[Any], kind: TensorType) -> NDArray[Any]:
    if array.size != kind.count:
        raise BundleError(f"a value has {array.size} elements, and its shape {kind.shape} asks for {kind.count}")
    return array.astype(storage(kind.dtype)).reshape(kind.shape)


def storage(dtype: str) -> np.dtype[Any]:
    """The little-endian numpy type of an element: uint8, or int8, for those of less than a byte."""
    return np.dtype("i1" if dtype == "int4" else "u1" if dtype in BITS else dtype).newbyteorder("<")


def from_bytes(raw: bytes, kind: TensorType) -> NDArray[Any]:
    """The elements in `raw`, flat; those of less than a byte are packed from the lowest bit of the first byte on.

    Raises:
        BundleError: there are fewer than the type asks for.
    """
    bits = BITS.get(kind.dtype)
    if bits is None:
        return np.frombuffer(raw, storage(kind.dtype))
    return unpacked(np.frombuffer(raw, np.uint8), bits, kind.count, kind.dtype == "int4")


def unpacked(packed: NDArray[np.uint8], bits: int, count: int, is_signed: bool = False) -> NDArray[Any]:
    """`count` elements of `bits` each, packed from the lowest bit of the first byte on.

    Raises:
        BundleError: there are fewer.
    """
    if packed.size * 8 < bits * count:
        raise BundleError(f"{packed.size} bytes hold fewer than {count} elements of {bits} bits")
    single = np.unpackbits(packed, count=bits * count, bitorder="little").reshape(count, bits)
    found = (single << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    top = np.int8(1 << (bits - 1))
    elements: NDArray[Any] = (found.astype(np.int8) ^ top) - top if is_signed else found
    return elements
