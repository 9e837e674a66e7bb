"""The ONNX graph that a translation fills: nodes named after modules, constants once, weights by reference only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.core.precision import Affine, Packing
from diffship.core.spec import is_product
from diffship.exporters.onnx.layout import DATA_FILE
from diffship.exporters.onnx.stored import CODES, PLAIN, SCALES, ZEROS, Form, Stored, packed_form

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper
else:
    np = lazy("numpy")
    onnx, helper, numpy_helper = lazy("onnx"), lazy("onnx.helper"), lazy("onnx.numpy_helper")

IR_VERSION = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
# the numbers of onnx.TensorProto.DataType: part of the format, so they need no package
TYPES: dict[str, int] = {
    "float32": 1,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
    "int64": 7,
    "int32": 6,
    "uint8": 2,
    "uint16": 4,
    "int8": 3,
    "bool": 9,
    "uint4": 21,
}
NAMES: dict[int, str] = {code: name for name, code in TYPES.items()}
_ALIGN_SMALL, _ALIGN_LARGE = 64, 4096  # engines map large tensors from the file, page by page

Dim = int | tuple[int, ...]  # a free size is what it was in each trace
FREE: Dim = (-1, -2, -3)  # a size that nothing asks for


@dataclass(frozen=True)
class Value:
    """A tensor in the graph; `dtype` as in a TensorSpec, `shape` in ints and free sizes."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter that no node uses yet; `source` is its name in the component's weights.

    packing: how it is stored as integers, if it is. inputs: codes that what it is multiplied with is rounded to.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]
    packing: Packing | None = None
    inputs: Affine | None = None


@dataclass(frozen=True)
class Size:
    """A number that depends on the input's size, as it was in each trace."""

    values: tuple[int, ...]


@dataclass
class Graph:
    """Nodes in execution order; `scope` (a module path) names those that follow."""

    opset: int
    scope: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    _by_content: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)
    _coded: dict[tuple[str, Affine], Value] = field(default_factory=dict)

    def emit(self, op: str, inputs: Sequence[str], dtype: str, shape: tuple[Dim, ...], **attributes: Any) -> Value:
        """One node with one output."""
        return self.emit_many(op, inputs, [(dtype, shape)], **attributes)[0]

    def emit_many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[tuple[str, tuple[Dim, ...]]], **attributes: Any
    ) -> list[Value]:
        name = self._unique(f"{self.scope}/{op}" if self.scope else op)
        names = [name if i == 0 else f"{name}.{i}" for i in range(len(outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        made = [Value(own, dtype, shape) for own, (dtype, shape) in zip(names, outputs, strict=True)]
        self.values.update({value.name: value for value in made})
        return made

    def constant(self, array: np.ndarray) -> Value:
        """A small tensor kept inside the model file; equal ones are stored once."""
        array = np.asarray(array, order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._by_content:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = array
            self._by_content[key] = name
        return Value(self._by_content[key], array.dtype.name, array.shape)

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64)).name

    def weight(self, weight: Weight, form: Form = PLAIN) -> Value:
        """The initialiser of a parameter, stored in `form`."""
        name, shape = Stored(weight.source, form).name, form.shape(weight.shape)
        self.weights[name] = Weight(weight.source, weight.dtype, shape)
        return Value(name, weight.dtype, shape)

    def packed(self, weight: Weight, packing: Packing, reverse: bool, shape: tuple[int, ...]) -> Value:
        """A weight that is stored as integers, as a node gives it: `shape`, float32.

        `shape` has the axis of output channels last if `reverse`, else first. With blocks it has two axes.
        """
        rows = weight.shape[0]
        columns = math.prod(weight.shape[1:])
        blocks = (rows, columns // packing.block) if packing.block else (rows,)
        axis = (0 if reverse else 1) if packing.block else (len(shape) - 1 if reverse else 0)
        small = "uint4" if packing.block else "int8"
        kinds = [(CODES, small, shape), (SCALES, "float32", blocks[::-1] if reverse else blocks)]
        kinds += [(ZEROS, small, kinds[1][2])] if packing.block else []
        names = []
        for kind, dtype, dims in kinds:
            name = Stored(weight.source, packed_form(kind, reverse)).name
            self.weights[name] = Weight(weight.source, dtype, dims)
            names.append(name)
        options = {"axis": axis, "block_size": packing.block} if packing.block else {"axis": axis}
        return self.emit("DequantizeLinear", names, weight.dtype, shape, **options)

    def coded(self, x: Value, codes: Affine) -> Value:
        """`x` (float32) rounded to codes and back; once, however many layers read it with the same codes."""
        key = (x.name, codes)
        if key not in self._coded:
            small = "uint8" if codes.bits == 8 else "uint16"
            scale = self.constant(np.array(codes.scale, np.float32)).name
            zero = self.constant(np.array(codes.zero, small)).name
            made = self.emit("QuantizeLinear", [x.name, scale, zero], small, x.shape)
            self._coded[key] = self.emit("DequantizeLinear", [made.name, scale, zero], x.dtype, x.shape)
        return self._coded[key]

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], producer: str
    ) -> onnx.ModelProto:
        """The finished model; nodes, constants and weights that no output needs are left out."""
        self._drop_unused([output.name for output in outputs])
        used = {name for node in self.nodes for name in node.input}
        initialisers = [
            numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used
        ] + _external([(name, weight) for name, weight in self.weights.items() if name in used])
        ports = {port.name for port in (*inputs, *outputs)}
        known = [
            _value_info(self.values[name])
            for node in self.nodes
            for name in node.output
            if name in self.values and name not in ports
        ]
        graph = helper.make_graph(self.nodes, "main", list(inputs), list(outputs), initialisers, value_info=known)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], producer_name=producer)
        model.ir_version = IR_VERSION[self.opset]
        return model

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors that nodes make new names (old -> new)."""
        for node in self.nodes:
            for side in (node.input, node.output):
                for i, name in enumerate(side):
                    if name in names:
                        side[i] = names[name]
        for old, new in names.items():
            if old in self.values:
                self.values[new] = replace(self.values.pop(old), name=new)

    def _drop_unused(self, outputs: Sequence[str]) -> None:
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]

    def _unique(self, name: str) -> str:
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        return name if count == 0 else f"{name}_{count}"


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an initialiser; values of four bits lie two to a byte."""
    bits = 4 if dtype == "uint4" else 8 * helper.tensor_dtype_to_np_dtype(TYPES[dtype]).itemsize
    return -(-math.prod(shape) * bits // 8)


def port(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """A graph input or output."""
    return helper.make_tensor_value_info(name, TYPES[dtype], [_axis_name(axis) for axis in shape])


def _axis_name(axis: int | str) -> int | str:
    """A product of axes as one identifier, `height_times_width_over_4`; the manifest has the expression.

    What optimum's runtime evaluates (`latent_height * 8`) stays as it is.
    """
    return axis.replace(" * ", "_times_").replace(" / ", "_over_") if is_product(axis) else axis


def _value_info(value: Value) -> onnx.ValueInfoProto:
    shape = [dim if isinstance(dim, int) else None for dim in value.shape]
    return helper.make_tensor_value_info(value.name, TYPES[value.dtype], shape)


def _external(weights: Sequence[tuple[str, Weight]]) -> list[onnx.TensorProto]:
    offset, tensors = 0, []
    for name, weight in weights:
        length = stored_bytes(weight.dtype, weight.shape)
        align = _ALIGN_LARGE if length >= 1 << 20 else _ALIGN_SMALL
        offset += -offset % align
        tensor = onnx.TensorProto(name=name, data_type=TYPES[weight.dtype], dims=weight.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        _entries(tensor, {"location": DATA_FILE, "offset": offset, "length": length})
        tensors.append(tensor)
        offset += length
    return tensors


def _entries(tensor: onnx.TensorProto, table: Mapping[str, object]) -> None:
    for key, value in table.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
