"""Reading and rewriting the nodes of an ONNX graph without the onnx package, which an edge device does not have.

Field numbers are those of onnx.proto3 (github.com/onnx/onnx). What is not understood is carried over byte for byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from diffship.core.errors import BundleError
from diffship.core.protobuf import (
    Field,
    encode_block,
    encode_field,
    encode_number,
    encode_text,
    fields,
    first_text,
    message,
    numbers,
    signed,
    string,
)

FLOAT, INT64, FLOAT16 = 1, 7, 10
_SHORT = 8  # values of a constant that are read: shapes have fewer


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
        pieces = [encode_text(1, name) for name in self.inputs] + [encode_text(2, name) for name in self.outputs]
        pieces += [encode_text(3, self.name)] if self.name else []
        pieces += [encode_text(4, self.op), *(encode_block(5, attribute.raw) for attribute in self.attributes)]
        return b"".join(pieces + ([encode_text(7, self.domain)] if self.domain else []))


@dataclass(frozen=True)
class Constant:
    """An initializer: its type number, its shape and, if it is short and lies in the graph, its integers."""

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
            dims = b"".join(encode_number(1, size) for size in array.shape)
            self._added.append(dims + encode_number(2, dtype) + encode_text(8, name) + encode_block(9, array.tobytes()))
            self.constants[name] = Constant(dtype, array.shape)
        return name

    def use_domain(self, domain: str) -> None:
        """Declare version 1 of an operator domain."""
        if domain not in self._domains:
            self._domains.append(domain)

    def encode(self) -> bytes:
        """The whole model as bytes."""
        graph = [encode_block(1, node.encode()) for node in self.nodes]
        graph += [encode_field(*entry) for entry in self._rest] + [encode_block(5, tensor) for tensor in self._added]
        model = [encode_field(*entry) for entry in self._model]
        model += [encode_block(8, encode_text(1, domain) + encode_number(2, 1)) for domain in self._domains]
        return b"".join([*model, encode_block(7, b"".join(graph))])


def read_graph(data: bytes) -> Graph:
    """Raises BundleError if `data` is not a model of one graph."""
    try:
        model = list(fields(memoryview(data)))
        graphs = [value for number, _, value in model if number == 7 and isinstance(value, memoryview)]
        if len(graphs) != 1:
            raise BundleError("it has no graph, or several")
        entries = list(fields(graphs[0]))
        nodes = [read_node(message(value)) for number, _, value in entries if number == 1]
        constants = dict(_constant(message(value)) for number, _, value in entries if number == 5)
        outputs = frozenset(first_text(message(value), 1) for number, _, value in entries if number == 12)
        versions = [_opset(message(value)) for number, _, value in model if number == 8]
    except (BundleError, UnicodeDecodeError, struct.error) as fault:
        raise BundleError(f"not a sound ONNX model: {fault}") from None
    opset = max((version for domain, version in versions if domain == ""), default=0)
    kept = [entry for entry in model if entry[0] != 7]
    return Graph(nodes, constants, outputs, opset, kept, [entry for entry in entries if entry[0] != 1])


def integer(name: str, value: int) -> Attribute:
    """An INT attribute."""
    return Attribute(name, encode_text(1, name) + encode_number(3, value) + encode_number(20, 2), integer=value)


def real(name: str, value: float) -> Attribute:
    """A FLOAT attribute."""
    return Attribute(name, encode_text(1, name) + b"\x15" + struct.pack("<f", value) + encode_number(20, 1), real=value)


def read_node(data: memoryview) -> Node:
    inputs, outputs, attributes, texts = list[str](), list[str](), list[Attribute](), {3: "", 4: "", 7: ""}
    for number, _, value in fields(data):
        if number == 1:
            inputs.append(string(value))
        elif number == 2:
            outputs.append(string(value))
        elif number == 5:
            attributes.append(_attribute(message(value)))
        elif number in texts:
            texts[number] = string(value)
        elif number not in (6, 9):  # comments and metadata; anything else would be lost
            raise BundleError(f"a node has the field {number}, which is unknown here")
    return Node(texts[4], tuple(inputs), tuple(outputs), tuple(attributes), texts[7], texts[3])


def _attribute(data: memoryview) -> Attribute:
    name, whole, decimal, many = "", 0, 0.0, list[int]()
    for number, _, value in fields(data):
        if number == 1:
            name = string(value)
        elif number == 2 and isinstance(value, memoryview):
            decimal = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            whole = signed(value)
        elif number == 8:
            many += [signed(entry) for entry in numbers(value)]
    return Attribute(name, bytes(data), whole, decimal, tuple(many))


def _constant(data: memoryview) -> tuple[str, Constant]:
    name, dtype, shape, raw, listed = "", 0, list[int](), b"", list[int]()
    for number, _, value in fields(data):
        if number == 1:
            shape += numbers(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 7 and len(listed) <= _SHORT:
            listed += [signed(entry) for entry in numbers(value)]
        elif number == 8:
            name = string(value)
        elif number == 9 and isinstance(value, memoryview):
            raw = bytes(value[: 8 * _SHORT + 1])
    if dtype == INT64 and len(shape) == 1 and shape[0] <= _SHORT and len(raw) == 8 * shape[0] > 0:
        listed = [int(entry) for entry in np.frombuffer(raw, "<i8")]
    known = dtype == INT64 and shape == [len(listed)]
    return name, Constant(dtype, tuple(shape), tuple(listed) if known else None)


def _opset(data: memoryview) -> tuple[str, int]:
    domain, version = "", 0
    for number, _, value in fields(data):
        if number == 1:
            domain = string(value)
        elif number == 2 and isinstance(value, int):
            version = value
    return domain, version
