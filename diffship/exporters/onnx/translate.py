"""An exported program becomes an ONNX model: one walk over its nodes, constants folded on the way, no weight touched.

torch.onnx.export decomposes the program once more and leaves shape arithmetic for each reshape; this walk takes a
second where that takes half a minute (SD1.5's U-Net), and leaves nothing to clean up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.spec import TensorSpec
from diffship.exporters.onnx.capture import Programs
from diffship.exporters.onnx.graph import TYPES, Dim, Graph, Size, Value, Weight, port
from diffship.exporters.onnx.points import module_outputs

if TYPE_CHECKING:
    import onnx
    import torch
    from torch.export import graph_signature
else:
    torch, graph_signature = lazy("torch"), lazy("torch.export.graph_signature")

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}
_PREFIX = "part."
_NO_EFFECT = ("aten._assert", "aten.sym_constrain", "aten._guard", "aten.lift_fresh")


def implements(*names: str) -> Callable[[Operator], Operator]:
    """Register a function `(translation, *arguments) -> Value` for ATen operators such as `aten.linear.default`."""

    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Translation:
    """The state of one walk: what each node of the program has become, and the node in hand."""

    def __init__(self, programs: Programs, opset: int, weight_name: Callable[[str], str]) -> None:
        self.graph = Graph(opset)
        self.opset = opset
        self._program = programs[0]
        self._twins = _paired(*programs)
        self._weight_name = weight_name
        self._known: dict[torch.fx.Node, Any] = {}
        self._lengths: dict[tuple[int, int], str] = {}
        self._points: dict[str, str] = {}
        self.node: torch.fx.Node

    # what operators use

    @property
    def dtype(self) -> str:
        """Element type of the current node's (first) result."""
        return dtype_name(_results(self.node)[0].dtype)

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape of the current node's (first) result."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[Dim, ...]]:
        """Shapes of all results of the current node."""
        return self._shapes(self.node)

    def emit(
        self, op: str, *inputs: Any, dtype: str | None = None, shape: tuple[Dim, ...] | None = None, **attributes: Any
    ) -> Value:
        """A node whose output is like the current result unless `dtype` or `shape` say otherwise."""
        names = [self.name(value) for value in inputs]
        return self.graph.emit(op, names, dtype or self.dtype, self.shape if shape is None else shape, **attributes)

    def name(self, value: Any) -> str:
        """The ONNX name of any argument; Python numbers become constants of the result's type."""
        if value is None:
            return ""
        return value if isinstance(value, str) else self.value(value).name

    def value(self, value: Any, dtype: str | None = None) -> Value:
        """Any argument as a Value of its own dtype; numbers take `dtype` (the result's by default)."""
        if isinstance(value, Value):
            return value
        if isinstance(value, Weight):
            return self.graph.weight(value)
        if isinstance(value, torch.Tensor):
            return self.graph.constant(value.detach().numpy())
        if isinstance(value, Size):
            return self.emit("Squeeze", self.sizes([value]), self.graph.ints([0]), dtype="int64", shape=())
        return self.graph.constant(np.array(value, dtype or self.dtype))

    def cast(self, value: Any, dtype: str) -> Value:
        """`value` in `dtype`; a node only where it is another one."""
        if isinstance(value, (int, float, bool)):
            return self.value(value, dtype)
        found = self.value(value)
        if found.dtype == dtype:
            return found
        return self.emit("Cast", found, to=TYPES[dtype], dtype=dtype, shape=found.shape)

    def sizes(self, values: Sequence[Any]) -> str:
        """An int64 vector of ints and Sizes."""
        if not any(isinstance(value, Size) for value in values):
            return self.graph.ints(values)
        names = [self._length(value) if isinstance(value, Size) else self.graph.ints([value]) for value in values]
        if len(names) == 1:
            return names[0]
        return self.emit("Concat", *names, dtype="int64", shape=(len(names),), axis=0).name

    # the walk

    def run(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        producer: str,
        modules: Collection[str] = (),
    ) -> onnx.ModelProto:
        """The model with the names, dtypes and axis names of the specs.

        What a module in `modules` (paths) gives is called `<path>.out`, so that others can find it in the graph.
        """
        ports = self._take_inputs(inputs)
        results: Sequence[Any] = ()
        for node in self._program.graph.nodes:
            self.node = node
            if node.op == "call_function":
                self.graph.scope = scope_of(node)
                self._known[node] = self._call(node)
                self._measure(self._known[node])
            elif node.op == "output":
                results = node.args[0]
        self._points = self._name_modules(modules)
        named = self._name_outputs(outputs, results)
        return self.graph.model(ports, named, producer)

    def _name_modules(self, modules: Collection[str]) -> dict[str, str]:
        """Old name -> new name of the tensors that modules give; the innermost module names a tensor of several."""
        names: dict[str, str] = {}
        made = {name for node in self.graph.nodes for name in node.output}
        for path, node in module_outputs(self._program).items() if modules else ():
            value = self._known.get(node)
            if path in modules and isinstance(value, Value) and value.name in made and value.name not in names:
                names[value.name] = f"{path}.out"
        self.graph.rename(names)
        return names

    def _take_inputs(self, specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        ports: list[onnx.ValueInfoProto] = []
        nodes = {node.name: node for node in self._program.graph.nodes if node.op == "placeholder"}
        waiting = iter(specs)
        for entry in self._program.graph_signature.input_specs:
            if isinstance(entry.arg, graph_signature.ConstantArgument):
                continue
            node = nodes[entry.arg.name]
            if entry.kind == graph_signature.InputKind.USER_INPUT:
                self._known[node] = self._input(node, next(waiting), ports)
            else:
                self._known[node] = self._stored(entry, node)
        return ports

    def _input(self, node: torch.fx.Node, spec: TensorSpec, ports: list[onnx.ValueInfoProto]) -> Value:
        made = Value(spec.name, dtype_name(node.meta["val"].dtype), self._shapes(node)[0])
        if spec.name != "timestep":
            ports.append(port(spec.name, made.dtype, spec.shape))
            self._measure(made)
            return made
        # one value for all samples or one per sample: an axis of its own here, and an `Expand` in the model
        ports.append(port(spec.name, made.dtype, ("timesteps",)))
        return self.graph.emit("Reshape", [spec.name, self.graph.ints([-1])], made.dtype, made.shape)

    def _stored(self, entry: Any, node: torch.fx.Node) -> Any:
        if entry.kind == graph_signature.InputKind.CONSTANT_TENSOR:
            return self._program.constants[entry.target]
        value = node.meta["val"]
        source = self._weight_name(entry.target.removeprefix(_PREFIX))
        return Weight(source, dtype_name(value.dtype), tuple(value.shape))

    def _call(self, node: torch.fx.Node) -> Any:
        target = str(node.target)
        if target.startswith(_NO_EFFECT):
            return None
        twin = self._twins[node]
        arguments = self._resolved(node.args, twin.args)
        keywords = {
            key: self._resolved(value, twin.kwargs[key]) for key, value in node.kwargs.items() if key not in _PLACEMENT
        }
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        if _foldable(arguments) and _foldable(keywords):
            return node.target(*_off_device(arguments), **keywords)  # type: ignore[operator]
        if target not in OPERATORS:
            raise UnsupportedError(f"no ONNX form for {target} in {self.graph.scope or 'the part itself'}")
        return OPERATORS[target](self, *arguments, **keywords)

    def _resolved(self, first: Any, second: Any) -> Any:
        """An argument with nodes replaced by what they became, and numbers that differ by Sizes."""
        if isinstance(first, torch.fx.Node):
            return self._known[first]
        if isinstance(first, (tuple, list)):
            return [self._resolved(a, b) for a, b in zip(first, second, strict=True)]
        if type(first) is int and first != second:
            return Size((first, second))
        if first != second:
            raise UnsupportedError(f"{self.node.target} depends on the input's size by {first!r}, then {second!r}")
        return first

    def _measure(self, value: Any) -> None:
        """Take each free size where it first appears; sizes that nobody asks for are dropped with their nodes."""
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Value):
                for axis, dim in enumerate(tensor.shape):
                    if isinstance(dim, tuple) and dim not in self._lengths:
                        cut = {"start": axis, "end": axis + 1}
                        self._lengths[dim] = self.graph.emit("Shape", [tensor.name], "int64", (1,), **cut).name

    def _length(self, size: Size) -> str:
        if size.pair not in self._lengths:
            raise UnsupportedError(f"{self.node.target} needs the size {size.pair}, which no tensor before it has")
        return self._lengths[size.pair]

    def _shapes(self, node: torch.fx.Node) -> list[tuple[Dim, ...]]:
        pairs = zip(_results(node), _results(self._twins[node]), strict=True)
        return [
            tuple(a if a == b else (a, b) for a, b in zip(map(int, one.shape), map(int, two.shape), strict=True))
            for one, two in pairs
        ]

    def _name_outputs(self, specs: Sequence[TensorSpec], results: Sequence[Any]) -> list[onnx.ValueInfoProto]:
        entries = self._program.graph_signature.output_specs
        wanted = [
            node
            for entry, node in zip(entries, results, strict=True)
            if entry.kind == graph_signature.OutputKind.USER_OUTPUT
        ]
        if len(wanted) != len(specs):
            raise UnsupportedError(f"the module gives {len(wanted)} outputs; its specs name {len(specs)}")
        self.graph.scope = ""
        ports, names = [], dict[str, str]()
        for spec, node in zip(specs, wanted, strict=True):
            value = self.value(self._known[node])
            value = replace(value, name=self._points.get(value.name, value.name))
            self._name_output(value, spec.name, names)
            ports.append(port(spec.name, value.dtype, spec.shape))
        return ports

    def _name_output(self, value: Value, name: str, names: dict[str, str]) -> None:
        """Rename the tensor itself; an Identity only where it has a name of its own: inputs, outputs, modules."""
        made = any(value.name in node.output for node in self.graph.nodes)
        if made and value.name not in names and value.name not in self._points.values():
            self.graph.rename({value.name: name})
            names[value.name] = name
        else:
            now = names.get(value.name, value.name)
            self.graph.rename({self.graph.emit("Identity", [now], value.dtype, value.shape).name: name})


_PLACEMENT = ("device", "pin_memory", "layout", "non_blocking", "memory_format", "copy")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scope_of(node: torch.fx.Node) -> str:
    """The module path that the node came from, without the wrappers' own names."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).split(".") if stack else []
    return ".".join(path[sum(name == wrapper for name, wrapper in zip(path, ("part", "inner"), strict=False)) :])


def _paired(first: torch.export.ExportedProgram, second: torch.export.ExportedProgram) -> dict[Any, torch.fx.Node]:
    """Node of the first program -> node of the second."""
    nodes = [list(program.graph.nodes) for program in (first, second)]
    same = len(nodes[0]) == len(nodes[1]) and all(
        (a.name, str(a.target)) == (b.name, str(b.target)) for a, b in zip(*nodes, strict=True)
    )
    if not same:
        raise UnsupportedError("the part does other operations at other sizes, so it has no graph for all sizes")
    return dict(zip(*nodes, strict=True))


def _results(node: torch.fx.Node) -> list[Any]:
    value = node.meta["val"]
    return list(value) if isinstance(value, (tuple, list)) else [value]


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
