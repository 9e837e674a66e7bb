"""Faults of graph nodes: the ONNX file of a proved part is edited, and the file stays legal.

Edits are drawn on the fp32 graph, where they are tried on real values (`taps`), and are found again by node name in the
graphs of other precisions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.studies.mutation.mutant import GRAPH, Mutant
from diffship.benchmarks.studies.mutation.taps import Arrays, Taps
from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import onnx
    from onnx import helper, numpy_helper
else:
    onnx, helper, numpy_helper = lazy("onnx"), lazy("onnx.helper"), lazy("onnx.numpy_helper")

REMOVED, ATTRIBUTE, INPUTS, WIRE, CONSTANT = (
    "operator removed",
    "attribute changed",
    "inputs exchanged",
    "another input",
    "constant off",
)
LAYERS = ("Attention", "Conv", "Gemm", "MatMul", "GroupNormalization", "LayerNormalization")  # what has weights
_LEAST = 1e-3  # a node must give something else by this much
_ADDED = "spoilt_constant"
_CONSTANTS_OF = ("Add", "Sub", "Mul", "Div", "Pow", "Gather", "Range", "Resize", "Slice", "GatherND", "Clip", "Equal")
_WIRED = ("Add", "Mul", "Concat", "Conv", "MatMul", "GroupNormalization", "LayerNormalization", "Attention")
_ORDERED = ("MatMul", "Sub", "Div", "Concat", "Attention", "LayerNormalization", "GroupNormalization")


def graph_mutants(source: str, part: str, taps: Taps) -> Iterator[Mutant]:
    """Every edit of nodes that could be one; `works` tells which are."""
    for node in taps.model.graph.node:
        for kind, places in _VARIANTS.items():
            for variant in places(node, taps):
                yield Mutant(GRAPH, source, part, kind, node.name, variant)


def works(mutant: Mutant, taps: Taps) -> bool:
    """Whether the edited node runs, keeps its output's shape and gives something else."""
    node = onnx.NodeProto()
    node.CopyFrom(_find(taps.model, mutant.place))
    own = numpy_values(taps.model)
    more = change_node(node, mutant, own)
    return taps.effect(node, more) > _LEAST


def edit(model: onnx.ModelProto, mutant: Mutant) -> None:
    """Make the mutant's edit in `model`, of any precision.

    Raises:
        UnsupportedError: this graph has no such node or tensor.
    """
    node = _find(model, mutant.place)
    more = change_node(node, mutant, numpy_values(model))
    known = {name for other in model.graph.node for name in other.output} | set(more)
    known |= {port.name for port in (*model.graph.input, *model.graph.initializer)}
    absent = [name for name in node.input if name and name not in known]
    if absent:
        raise UnsupportedError(f"this graph has no tensor {absent[0]!r}")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in more.items())


def change_node(node: onnx.NodeProto, mutant: Mutant, constants: Arrays) -> Arrays:
    """Edit `node` alone; tensors that it reads and the graph does not have. constants: those inside the graph."""
    if mutant.kind == CONSTANT:
        index = int(mutant.variant)
        if node.input[index] not in constants:
            raise UnsupportedError(f"{node.name} reads no constant there")
        changed = _off(constants[node.input[index]])
        node.input[index] = _ADDED
        return {_ADDED: changed}
    _CHANGES[mutant.kind](node, mutant.variant)
    return {}


def loses_layer(mutant: Mutant, model: onnx.ModelProto) -> bool:
    """Whether an operator with weights, or an attention, no longer acts."""
    return mutant.kind == REMOVED and _find(model, mutant.place).op_type in LAYERS


def numpy_values(model: onnx.ModelProto) -> Arrays:
    """The constants that lie inside the graph."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    }


def _find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    node: onnx.NodeProto
    for node in model.graph.node:
        if node.name == name:
            return node
    raise UnsupportedError(f"this graph has no node {name!r}")


def _off(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """10 % more, or 1 more of integers; 0.1 in place of 0."""
    if array.dtype.kind in "iu":
        return np.asarray(array + 1, array.dtype)
    wide = array.astype(np.float32)
    return np.asarray(np.where(wide == 0, 0.1, wide * 1.1), np.float32).astype(array.dtype)


# places: variants of a node, by kind


def _removals(node: onnx.NodeProto, taps: Taps) -> Iterator[str]:
    """Inputs that could take the place of the output: made by the graph, of equal shape and type."""
    if len(node.output) != 1 or node.op_type in ("Identity", "Cast"):
        return
    out = taps.values[node.output[0]]
    stored = {tensor.name for tensor in taps.model.graph.initializer}
    for index, name in enumerate(node.input):
        given = taps.values.get(name)
        if name not in stored and given is not None and (given.shape, given.dtype) == (out.shape, out.dtype):
            yield str(index)


def _attributes(node: onnx.NodeProto, taps: Taps) -> Iterator[str]:
    """JSON tables of attributes with their new values."""
    own = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    changes = _OF[node.op_type](own, node, taps) if node.op_type in _OF else ()
    yield from map(json.dumps, changes)


def _conv(own: Mapping[str, Any], node: onnx.NodeProto, taps: Taps) -> Iterator[dict[str, Any]]:
    if list(own.get("kernel_shape", ())) == [3, 3] and list(own["pads"]) == [1, 1, 1, 1]:
        yield {"pads": [0, 0, 2, 2]}
        if list(own["strides"]) == [1, 1]:
            yield {"pads": [2, 2, 2, 2], "dilations": [2, 2]}


def _group_norm(own: Mapping[str, Any], node: onnx.NodeProto, taps: Taps) -> Iterator[dict[str, Any]]:
    channels = taps.values[node.input[0]].shape[1]
    yield {"epsilon": 0.01}
    yield from ({"num_groups": n} for n in (own["num_groups"] // 2, own["num_groups"] * 2) if n and channels % n == 0)


def _attention(own: Mapping[str, Any], node: onnx.NodeProto, taps: Taps) -> Iterator[dict[str, Any]]:
    width = taps.values[node.input[0]].shape[-1]
    yield {"is_causal": 1 - own.get("is_causal", 0)}
    yield {"scale": float(own.get("scale", width**-0.5)) * width**-0.5}


def _transpose(own: Mapping[str, Any], node: onnx.NodeProto, taps: Taps) -> Iterator[dict[str, Any]]:
    perm = list(own["perm"])
    for i in range(len(perm)):
        for j in range(i + 1, len(perm)):
            yield {"perm": [perm[j] if k == i else perm[i] if k == j else axis for k, axis in enumerate(perm)]}


Attributes = Callable[[Mapping[str, Any], Any, Taps], Iterable[dict[str, Any]]]  # (its own, node, taps) -> changes
_OF: Mapping[str, Attributes] = {
    "Conv": _conv,
    "GroupNormalization": _group_norm,
    "LayerNormalization": lambda *_: ({"epsilon": 0.01},),
    "Attention": _attention,
    "Transpose": _transpose,
    "Gelu": lambda own, *_: ({"approximate": "none" if own.get("approximate") == b"tanh" else "tanh"},),
    "Resize": lambda *_: ({"mode": "linear"}, {"nearest_mode": "ceil"}),
    "ArgMax": lambda *_: ({"select_last_index": 1},),
    "Gemm": lambda own, *_: ({"alpha": 1.1}, {"transB": 1 - own.get("transB", 0)}),
    "Softmax": lambda own, *_: ({"axis": -2},),
}


def _exchanges(node: onnx.NodeProto, taps: Taps) -> Iterator[str]:
    if node.op_type in _ORDERED and taps.values[node.output[0]].dtype.kind == "f":  # exchanged sizes do not run
        count = len(node.input)
        pairs = ((i, j) for i in range(count) for j in range(i + 1, count))
        yield from (f"{i},{j}" for i, j in pairs if node.input[i] != node.input[j])


def _wires(node: onnx.NodeProto, taps: Taps) -> Iterator[str]:
    """Other tensors of the graph, made before, with the shape of an input."""
    if node.op_type not in _WIRED:
        return
    earlier: list[str] = []
    for other in taps.model.graph.node:
        if other.name == node.name:
            break
        earlier += other.output
    stored = {tensor.name for tensor in taps.model.graph.initializer}
    for index, name in enumerate(node.input):
        own = taps.values.get(name)
        if own is None or name in stored or own.dtype.kind != "f":
            continue
        alike = [
            n for n in earlier if n != name and taps.values[n].shape == own.shape and taps.values[n].dtype.kind == "f"
        ]
        yield from (f"{index}={other}" for other in alike[-2:])


def _constants(node: onnx.NodeProto, taps: Taps) -> Iterator[str]:
    if node.op_type in _CONSTANTS_OF:
        inside = numpy_values(taps.model)
        yield from (str(i) for i, name in enumerate(node.input) if name in inside and inside[name].size)


_VARIANTS: Mapping[str, Callable[[Any, Taps], Iterator[str]]] = {
    REMOVED: _removals,
    ATTRIBUTE: _attributes,
    INPUTS: _exchanges,
    WIRE: _wires,
    CONSTANT: _constants,
}


# changes


def _remove(node: onnx.NodeProto, variant: str) -> None:
    kept = node.input[int(variant)]
    del node.input[:], node.attribute[:]
    node.input.append(kept)
    node.op_type = "Identity"


def _set(node: onnx.NodeProto, variant: str) -> None:
    for name, value in json.loads(variant).items():
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _exchange(node: onnx.NodeProto, variant: str) -> None:
    first, second = (int(index) for index in variant.split(","))
    node.input[first], node.input[second] = node.input[second], node.input[first]


def _rewire(node: onnx.NodeProto, variant: str) -> None:
    index, _, name = variant.partition("=")
    node.input[int(index)] = name


_CHANGES: Mapping[str, Callable[[Any, str], None]] = {
    REMOVED: _remove,
    ATTRIBUTE: _set,
    INPUTS: _exchange,
    WIRE: _rewire,
}
