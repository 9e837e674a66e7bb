"""An exported program becomes an ONNX model: one walk over its nodes, constants folded on the way, no weight touched.

torch.onnx.export decomposes the program a second time and leaves shape arithmetic for each reshape; for the SD1.5
U-Net this walk takes a second where that takes half a minute, and leaves nothing for a clean-up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from diffship.core.errors import UnsupportedError
from diffship.core.spec import TensorSpec
from diffship.exporters.onnx.graph import Dim, Graph, Size, Value, Weight, port

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}
_PREFIX = "part."
_NO_EFFECT = ("aten._assert", "aten.sym_constrain", "aten._guard", "aten.lift_fresh")
_ARITHMETIC = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}


def implements(*names: str) -> Callable[[Operator], Operator]:
    """Register a function `(translation, *arguments) -> Value` for ATen operators such as `aten.linear.default`."""

    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Translation:
    """The state of one walk: what each node of the program has become, and the node in hand."""

    def __init__(self, program: torch.export.ExportedProgram, opset: int, weight_name: Callable[[str], str]) -> None:
        self.graph = Graph(opset)
        self.opset = opset
        self._program = program
        self._weight_name = weight_name
        self._known: dict[torch.fx.Node, Any] = {}
        self.node: torch.fx.Node

    # what operators use

    @property
    def dtype(self) -> str:
        """Element type of the current node's (first) result."""
        return dtype_name(_first(self.node.meta["val"]).dtype)

    @property
    def shape(self) -> tuple[Dim, ...]:
        return dims(_first(self.node.meta["val"]).shape)

    def emit(
        self, op: str, *inputs: Any, dtype: str | None = None, shape: tuple[Dim, ...] | None = None, **attributes: Any
    ) -> Value:
        """A node whose output is like the current result unless `dtype` or `shape` say otherwise."""
        names = [self.name(value) for value in inputs]
        return self.graph.emit(
            op, names, dtype or self.dtype, self.shape if shape is None else shape, **attributes
        )

    def name(self, value: Any, dtype: str | None = None) -> str:
        """The ONNX name of any argument; Python numbers become constants of `dtype` (the result's by default)."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, (Value, Size)):
            return value.name
        return self.value(value, dtype).name

    def value(self, value: Any, dtype: str | None = None) -> Value:
        """Any argument as a Value of its own dtype; numbers take `dtype` (the result's by default)."""
        if isinstance(value, Value):
            return value
        if isinstance(value, Weight):
            return self.graph.weight(value)
        if isinstance(value, torch.Tensor):
            return self.graph.constant(value.detach().numpy())
        if isinstance(value, Size):
            return self.emit("Squeeze", value, self.graph.ints([0]), dtype="int64", shape=())
        return self.graph.constant(np.array(value, dtype or self.dtype))

    def cast(self, value: Any, dtype: str) -> Value:
        """`value` in `dtype`; a node only where it is another one."""
        if isinstance(value, (int, float, bool)):
            return self.value(value, dtype)
        found = self.value(value)
        if found.dtype == dtype:
            return found
        return self.emit("Cast", found, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dtype=dtype, shape=found.shape)

    def sizes(self, values: Sequence[Any]) -> str:
        """An int64 vector of ints and Sizes."""
        if all(isinstance(value, int) for value in values):
            return self.graph.ints(values)
        names = [value.name if isinstance(value, Size) else self.graph.ints([value]) for value in values]
        if len(names) == 1:
            return names[0]
        return self.emit("Concat", *names, dtype="int64", shape=(len(names),), axis=0).name

    def size_of(self, value: Value, axis: int) -> int | Size:
        dim = value.shape[axis]
        if isinstance(dim, int):
            return dim
        return Size(
            self.emit("Shape", value, dtype="int64", shape=(1,), start=axis, end=axis + 1).name
        )

    # the walk

    def run(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], producer: str) -> onnx.ModelProto:
        """The model with the names, dtypes and axis names of the specs."""
        ports = self._take_inputs(inputs)
        results: Sequence[Any] = ()
        for node in self._program.graph.nodes:
            self.node = node
            if node.op == "call_function":
                self._known[node] = self._call(node)
            elif node.op == "output":
                results = node.args[0]
        named = self._name_outputs(outputs, results)
        return self.graph.model(ports, named, producer)

    def _take_inputs(self, specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        ports: list[onnx.ValueInfoProto] = []
        nodes = {node.name: node for node in self._program.graph.nodes if node.op == "placeholder"}
        waiting = iter(specs)
        for entry in self._program.graph_signature.input_specs:
            if isinstance(entry.arg, ConstantArgument):
                continue
            node = nodes[entry.arg.name]
            if entry.kind == InputKind.USER_INPUT:
                self._known[node] = self._input(node, next(waiting), ports)
            else:
                self._known[node] = self._stored(entry, node)
        return ports

    def _input(self, node: torch.fx.Node, spec: TensorSpec, ports: list[onnx.ValueInfoProto]) -> Value:
        value = node.meta["val"]
        made = Value(spec.name, dtype_name(value.dtype), dims(value.shape))
        if spec.name != "timestep":
            ports.append(port(spec.name, made.dtype, spec.shape))
            return made
        # one value for all samples or one per sample: an axis of its own here, and an `Expand` in the model
        ports.append(port(spec.name, made.dtype, ("timesteps",)))
        return self.graph.emit("Reshape", [spec.name, self.graph.ints([-1])], made.dtype, made.shape)

    def _stored(self, entry: Any, node: torch.fx.Node) -> Any:
        if entry.kind == InputKind.CONSTANT_TENSOR:
            return self._program.constants[entry.target]
        value = node.meta["val"]
        return Weight(
            self._weight_name(entry.target.removeprefix(_PREFIX)), dtype_name(value.dtype), tuple(value.shape)
        )

    def _call(self, node: torch.fx.Node) -> Any:
        target = str(node.target)
        if target.startswith(_NO_EFFECT):
            return None
        arguments = torch.fx.node.map_arg(node.args, self._known.__getitem__)
        keywords = torch.fx.node.map_arg(node.kwargs, self._known.__getitem__)
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        if node.target in _ARITHMETIC:
            return self._arithmetic(node.target, *arguments)
        if _foldable(arguments) and _foldable(keywords):
            return self._fold(node, arguments, keywords)
        if target not in OPERATORS:
            where = f" in {scope_of(node)}" if scope_of(node) else ""
            raise UnsupportedError(f"no ONNX form for {target}{where}; add it to diffship/exporters/onnx/operators")
        self.graph.scope = scope_of(node)
        keywords = {key: value for key, value in keywords.items() if key not in _PLACEMENT}
        return OPERATORS[target](self, *arguments, **keywords)

    def _fold(self, node: torch.fx.Node, arguments: Any, keywords: Any) -> Any:
        keywords = {key: value for key, value in keywords.items() if key not in _PLACEMENT}
        return node.target(*_off_device(arguments), **keywords)  # type: ignore[operator]

    def _arithmetic(self, function: Any, *arguments: Any) -> Any:
        if not any(isinstance(value, Size) for value in arguments):
            return function(*arguments)
        names = [value.name if isinstance(value, Size) else self.graph.ints([value]) for value in arguments]
        return Size(self.emit(_ARITHMETIC[function], *names, dtype="int64", shape=(1,)).name)

    def _name_outputs(self, specs: Sequence[TensorSpec], results: Sequence[Any]) -> list[onnx.ValueInfoProto]:
        entries = self._program.graph_signature.output_specs
        wanted = [node for entry, node in zip(entries, results, strict=True) if entry.kind == OutputKind.USER_OUTPUT]
        if len(wanted) != len(specs):
            raise UnsupportedError(f"the module gives {len(wanted)} outputs; its specs name {len(specs)}")
        self.graph.scope = ""
        ports, taken = [], set[str]()
        for spec, node in zip(specs, wanted, strict=True):
            value = self.value(self._known[node])
            self._name_output(value, spec.name, taken)
            ports.append(port(spec.name, value.dtype, spec.shape))
        return ports

    def _name_output(self, value: Value, name: str, taken: set[str]) -> None:
        made = {output for node in self.graph.nodes for output in node.output}
        if value.name in made and value.name not in taken:
            self.graph.rename(value.name, name)
            self._known = {
                node: Value(name, known.dtype, known.shape) if known == value else known
                for node, known in self._known.items()
            }
        else:
            identity = self.graph.emit("Identity", [value.name], value.dtype, value.shape)
            self.graph.rename(identity.name, name)
        taken.add(name)


_PLACEMENT = ("device", "pin_memory", "layout", "non_blocking", "memory_format", "copy")


def dims(shape: Sequence[Any]) -> tuple[Dim, ...]:
    """Ints, and sympy expressions where a size is free; equal expressions are equal sizes."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) and not _fixed(size) else int(size) for size in shape)


def _fixed(size: torch.SymInt) -> bool:
    return bool(size.node.expr.is_number)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scope_of(node: torch.fx.Node) -> str:
    """The module path that the node came from, without the wrappers' own names."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    for wrapper in ("part", "inner"):
        path = path.removeprefix(wrapper).removeprefix(".") if path.split(".")[0] == wrapper else path
    return path


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _foldable(value: Any) -> bool:
    return not any(isinstance(leaf, (Value, Weight, Size)) for leaf in _leaves(value))


def _off_device(arguments: Any) -> Any:
    return tuple("cpu" if isinstance(value, torch.device) else value for value in arguments)
