"""Reading and rewriting the nodes of an ONNX graph without the onnx package, which an edge device does not have.

Field numbers are those of onnx.proto3 (github.com/onnx/onnx). What is not understood is carried over byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffship.core.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
FLOAT, INT64, FLOAT16 = 1, 7, 10
_SHORT = 8  # values of a constant that are read: shapes have fewer

Field = tuple[int, int, "int | memoryview"]  # number, wire type, value


@dataclass(frozen=True)
class Attribute:
    """One attribute; `raw` is its message, from which the two kinds read here are taken."""

    name: str
    raw: bytes
    integer: int = 0
    real: float = 0.0
    integers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Attribute, ...] = ()
    domain: str = ""
    name: str = ""

    def get(self, name: str) -> Attribute | None:
        return next((attribute for attribute in self.attributes if attribute.name == name), None)

    def encode(self) -> bytes:
        pieces = [_text(1, name) for name in self.inputs] + [_text(2, name) for name in self.outputs]
        pieces += [_text(3, self.name)] if self.name else []
        pieces += [_text(4, self.op), *(_block(5, attribute.raw) for attribute in self.attributes)]
        return b"".join(pieces + ([_text(7, self.domain)] if self.domain else []))


@dataclass(frozen=True)
class Constant:
    """An initializer: its type number, its shape and, where it is short and lies in the graph, its integers."""

    dtype: int
    shape: tuple[int, ...]
    integers: tuple[int, ...] | None = None


@dataclass
class Graph:
    """The nodes of a model in order, its initializers, and everything else untouched in `_model` and `_rest`."""

    nodes: list[Node]
    constants: dict[str, Constant]
    outputs: frozenset[str]
    opset: int
    _model: list[Field] = field(repr=False)
    _rest: list[Field] = field(repr=False)
    _added: list[bytes] = field(default_factory=list, repr=False)
    _domains: list[str] = field(default_factory=list, repr=False)

    def add_constant(self, name: str, array: np.ndarray) -> str:
        """A new initializer (float32, float16 or int64); a name that is taken keeps its first value."""
        if name not in self.constants:
            dtype = {"float32": FLOAT, "float16": FLOAT16, "int64": INT64}[array.dtype.name]
            dims = b"".join(_number(1, size) for size in array.shape)
            self._added.append(dims + _number(2, dtype) + _text(8, name) + _block(9, array.tobytes()))
            self.constants[name] = Constant(dtype, array.shape)
        return name

    def use_domain(self, domain: str) -> None:
        """Declare version 1 of an operator domain."""
        if domain not in self._domains:
            self._domains.append(domain)

    def encode(self) -> bytes:
        """The whole model as bytes."""
        graph = [_block(1, node.encode()) for node in self.nodes]
        graph += [_field(*entry) for entry in self._rest] + [_block(5, tensor) for tensor in self._added]
        model = [_field(*entry) for entry in self._model]
        model += [_block(8, _text(1, domain) + _number(2, 1)) for domain in self._domains]
        return b"".join([*model, _block(7, b"".join(graph))])


def read_graph(data: bytes) -> Graph:
    """Raises BundleError where `data` is not a model of one graph."""
    try:
        model = list(_fields(memoryview(data)))
        graphs = [value for number, _, value in model if number == 7 and isinstance(value, memoryview)]
        if len(graphs) != 1:
            raise BundleError("it has no graph, or several")
        entries = list(_fields(graphs[0]))
        nodes = [_node(_view(value)) for number, _, value in entries if number == 1]
        constants = dict(_constant(_view(value)) for number, _, value in entries if number == 5)
        outputs = frozenset(_first_text(_view(value), 1) for number, _, value in entries if number == 12)
        versions = [_opset(_view(value)) for number, _, value in model if number == 8]
    except (BundleError, UnicodeDecodeError, struct.error) as fault:
        raise BundleError(f"not a sound ONNX model: {fault}") from None
    opset = max((version for domain, version in versions if domain == ""), default=0)
    kept = [entry for entry in model if entry[0] != 7]
    return Graph(nodes, constants, outputs, opset, kept, [entry for entry in entries if entry[0] != 1])


def integer(name: str, value: int) -> Attribute:
    """An INT attribute."""
    return Attribute(name, _text(1, name) + _number(3, value) + _number(20, 2), integer=value)


def real(name: str, value: float) -> Attribute:
    """A FLOAT attribute."""
    return Attribute(name, _text(1, name) + b"\x15" + struct.pack("<f", value) + _number(20, 1), real=value)


def _node(data: memoryview) -> Node:
    inputs, outputs, attributes, texts = list[str](), list[str](), list[Attribute](), {3: "", 4: "", 7: ""}
    for number, _, value in _fields(data):
        if number == 1:
            inputs.append(_string(value))
        elif number == 2:
            outputs.append(_string(value))
        elif number == 5:
            attributes.append(_attribute(_view(value)))
        elif number in texts:
            texts[number] = _string(value)
        elif number not in (6, 9):  # comments and metadata; anything else would be lost
            raise BundleError(f"a node has the field {number}, which is unknown here")
    return Node(texts[4], tuple(inputs), tuple(outputs), tuple(attributes), texts[7], texts[3])


def _attribute(data: memoryview) -> Attribute:
    name, whole, decimal, many = "", 0, 0.0, list[int]()
    for number, _, value in _fields(data):
        if number == 1:
            name = _string(value)
        elif number == 2 and isinstance(value, memoryview):
            decimal = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            whole = _signed(value)
        elif number == 8:
            many += [_signed(entry) for entry in _numbers(value)]
    return Attribute(name, bytes(data), whole, decimal, tuple(many))


def _constant(data: memoryview) -> tuple[str, Constant]:
    name, dtype, shape, raw, listed = "", 0, list[int](), b"", list[int]()
    for number, _, value in _fields(data):
        if number == 1:
            shape += _numbers(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 7 and len(listed) <= _SHORT:
            listed += [_signed(entry) for entry in _numbers(value)]
        elif number == 8:
            name = _string(value)
        elif number == 9 and isinstance(value, memoryview):
            raw = bytes(value[: 8 * _SHORT + 1])
    if dtype == INT64 and len(shape) == 1 and shape[0] <= _SHORT and len(raw) == 8 * shape[0] > 0:
        listed = [int(entry) for entry in np.frombuffer(raw, "<i8")]
    known = dtype == INT64 and shape == [len(listed)]
    return name, Constant(dtype, tuple(shape), tuple(listed) if known else None)


def _opset(data: memoryview) -> tuple[str, int]:
    domain, version = "", 0
    for number, _, value in _fields(data):
        if number == 1:
            domain = _string(value)
        elif number == 2 and isinstance(value, int):
            version = value
    return domain, version


def _first_text(data: memoryview, wanted: int) -> str:
    return next((_string(value) for number, _, value in _fields(data) if number == wanted), "")


def _fields(data: memoryview) -> Iterator[Field]:
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        length = _FIXED.get(wire, 0)
        if wire == _BYTES:
            length, position = _varint(data, position)
        if wire not in (_BYTES, *_FIXED) or length > end - position:
            raise BundleError("it is cut off, or no protobuf")
        yield number, wire, data[position : position + length]
        position += length


def _varint(data: Sequence[int], position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BundleError("it is cut off, or no protobuf")


def _numbers(value: int | memoryview) -> list[int]:
    """A repeated integer field, packed or not."""
    if isinstance(value, int):
        return [value]
    numbers, position = [], 0
    while position < len(value):
        entry, position = _varint(value, position)
        numbers.append(entry)
    return numbers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise BundleError("a message was expected, not a number")
    return value


def _string(value: int | memoryview) -> str:
    return str(_view(value), "utf-8")


def _field(number: int, wire: int, value: int | memoryview) -> bytes:
    if isinstance(value, int):
        return _number(number, value)
    if wire == _BYTES:
        return _block(number, value)
    return _encoded(number << 3 | wire) + bytes(value)


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3 | _VARINT) + _encoded(value & (1 << 64) - 1)


def _text(number: int, text: str) -> bytes:
    return _block(number, text.encode())


def _block(number: int, data: bytes | memoryview) -> bytes:
    return b"".join([_encoded(number << 3 | _BYTES), _encoded(len(data)), data])


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
