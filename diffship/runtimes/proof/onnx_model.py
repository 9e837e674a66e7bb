"""An ONNX model as nodes, tensors and ports that can be taken apart and written again, without the onnx package.

Field numbers are those of onnx.proto3 (github.com/onnx/onnx). Weights stay where they are: only their places are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffship.core.errors import BundleError, RunnerError
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
    string,
)
from diffship.runtimes.engines.onnx_edit import Node, read_node

GRAPH, NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO = 7, 1, 5, 11, 12, 13
_INLINE = 1 << 10  # smaller initializers count for nothing
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # by TensorProto.DataType
FORCED = "forced."  # prefix of the graph inputs that `forced` adds


@dataclass(frozen=True)
class Tensor:
    """An initializer: `raw` is its message; `external` says where its bytes lie, if not inside (location, ...)."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    raw: memoryview = field(repr=False)
    external: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of values; 0 for what is too small to matter."""
        if "length" in self.external:
            return int(self.external["length"])
        size = math.prod(self.dims) * _ITEM_BYTES.get(self.dtype, 4)
        return size if size > _INLINE else 0


@dataclass(frozen=True)
class OnnxModel:
    """`infos` has the ValueInfoProto of every tensor that the file describes, ports included."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    infos: Mapping[str, memoryview] = field(repr=False)
    header: tuple[Field, ...] = field(repr=False)  # everything of the model but its graph

    def info(self, name: str) -> memoryview:
        """Raises RunnerError if the file does not describe the tensor."""
        if name not in self.infos:
            raise RunnerError(
                f"the model does not say of which type the tensor {name[:120]} is, so it cannot be cut there"
            )
        return self.infos[name]

    def encode(
        self,
        nodes: Sequence[Node],
        inputs: Iterable[str],
        outputs: Iterable[str],
        tensors: Iterable[bytes | memoryview],
    ) -> bytes:
        """A model with this one's header and these contents, as bytes."""
        graph = [encode_block(NODE, node.encode()) for node in nodes] + [encode_text(2, "main")]
        graph += [encode_block(INITIALIZER, tensor) for tensor in tensors]
        graph += [encode_block(INPUT, self.info(name)) for name in inputs]
        graph += [encode_block(OUTPUT, self.info(name)) for name in outputs]
        head = [encode_field(*entry) for entry in self.header]
        return b"".join([*head, encode_block(GRAPH, b"".join(graph))])


def read_model(data: bytes) -> OnnxModel:
    """Raises BundleError if `data` is not a model of one graph."""
    try:
        entries = list(fields(memoryview(data)))
        graphs = [message(value) for number, _, value in entries if number == GRAPH]
        if len(graphs) != 1:
            raise BundleError("it has no graph, or several")
        inside = [(number, message(value)) for number, wire, value in fields(graphs[0]) if wire == 2]
        nodes = tuple(read_node(value) for number, value in inside if number == NODE)
        tensors = {made.name: made for number, value in inside if number == INITIALIZER for made in [_tensor(value)]}
        ports = {kind: [(first_text(v, 1), v) for n, v in inside if n == kind] for kind in (INPUT, OUTPUT, VALUE_INFO)}
    except (BundleError, UnicodeDecodeError, struct.error, ValueError) as fault:
        raise BundleError(f"not an ONNX model: {fault}") from None
    infos = {name: value for kind in (VALUE_INFO, INPUT, OUTPUT) for name, value in ports[kind]}
    inputs = tuple(name for name, _ in ports[INPUT] if name not in tensors)
    outputs = tuple(name for name, _ in ports[OUTPUT])
    header = tuple(entry for entry in entries if entry[0] != GRAPH)
    return OnnxModel(nodes, tensors, inputs, outputs, infos, header)


def forced(model: OnnxModel, cut: Iterable[str], watched: Iterable[str]) -> OnnxModel:
    """The model with every reader of a tensor in `cut` reading a new graph input, `forced.NAME`, in its place.

    What lies between two cuts then computes on values that the caller gives, whatever came before it. Tensors in
    `watched` become outputs, beside those that there are.

    Raises:
        RunnerError: no node makes such a tensor, or the file does not say of which type it is.
    """
    made = {name for node in model.nodes for name in node.outputs}
    cut, watched = list(cut), list(watched)
    absent = next((name for name in (*cut, *watched) if name not in made), None)
    if absent is not None:
        raise RunnerError(f"the graph has no tensor {absent[:120]!r}")
    others = {name: FORCED + name for name in cut}
    nodes = tuple(
        replace(node, inputs=tuple(others.get(name, name) for name in node.inputs))
        if any(name in others for name in node.inputs)
        else node
        for node in model.nodes
    )
    infos = {**model.infos, **{other: _named(model.info(name), other) for name, other in others.items()}}
    return replace(
        model,
        nodes=nodes,
        inputs=(*model.inputs, *others.values()),
        outputs=tuple(dict.fromkeys((*model.outputs, *watched))),
        infos=infos,
    )


def reads(node: Node) -> Iterator[str]:
    """Names that a node reads, those captured by its inner graphs included."""
    yield from (name for name in node.inputs if name)
    for attribute in node.attributes:
        for number, wire, value in fields(memoryview(attribute.raw)):
            if wire == 2 and number in (6, 11):
                yield from _captured(message(value))


def _captured(graph: memoryview) -> Iterator[str]:
    entries = [(number, message(value)) for number, wire, value in fields(graph) if wire == 2]
    nodes = [read_node(value) for number, value in entries if number == NODE]
    own = {name for node in nodes for name in node.outputs}
    own |= {first_text(value, 1) for number, value in entries if number == INPUT}
    own |= {first_text(value, 8) for number, value in entries if number == INITIALIZER}
    yield from (name for node in nodes for name in reads(node) if name not in own)


def _tensor(data: memoryview) -> Tensor:
    name, dtype, dims, external = "", 0, list[int](), dict[str, str]()
    for number, _, value in fields(data):
        if number == 1:
            dims += numbers(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8:
            name = string(value)
        elif number == 13:
            entry = message(value)
            external[first_text(entry, 1)] = first_text(entry, 2)
    if not all(external.get(key, "0").isdigit() for key in ("offset", "length")):
        raise BundleError(f"tensor {name[:80]!a} does not say where its bytes lie")
    return Tensor(name, dtype, tuple(dims), data, external)


def moved(tensor: Tensor, location: str, offset: int, length: int, dtype: int) -> bytes:
    """The message of `tensor` with its bytes at another place, and as another type."""
    kept = [encode_field(*entry) for entry in fields(tensor.raw) if entry[0] not in (2, 13, 14)]
    claims = {"location": location, "offset": str(offset), "length": str(length)}
    entries = [encode_block(13, encode_text(1, key) + encode_text(2, value)) for key, value in claims.items()]
    return b"".join([*kept, encode_number(2, dtype), *entries, encode_number(14, 1)])


def _named(info: memoryview, name: str) -> memoryview:
    rest = [encode_field(*entry) for entry in fields(info) if entry[0] != 1]
    return memoryview(encode_text(1, name) + b"".join(rest))
