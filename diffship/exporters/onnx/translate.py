"""An exported program becomes an ONNX model: one walk over its nodes, constants folded on the way, no weight touched.

torch.onnx.export decomposes the program once more and leaves shape arithmetic for each reshape; this walk takes a
second instead of half a minute (SD1.5's U-Net), and leaves nothing to clean up.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.precision import Affine, Packing
from diffship.core.spec import TensorSpec
from diffship.exporters.onnx.capture import LIFTED, Capture
from diffship.exporters.onnx.graph import TYPES, Dim, Graph, Size, Value, Weight, port
from diffship.exporters.onnx.points import module_outputs
from diffship.exporters.onnx.retrace import IDLE, NO_EFFECT, PLACEMENT
from diffship.exporters.onnx.sizes import Rule, rule_for

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from onnx import shape_inference
    from torch.export import graph_signature
else:
    np = lazy("numpy")
    shape_inference, torch = lazy("onnx.shape_inference"), lazy("torch")
    graph_signature = lazy("torch.export.graph_signature")

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}
_PREFIX = "part."


def implements(*names: str) -> Callable[[Operator], Operator]:
    """Register a function `(translation, *arguments) -> Value` for ATen operators such as `aten.linear.default`."""

    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Translation:
    """The state of one walk: what each node of the program has become, and the node in hand."""

    def __init__(
        self,
        capture: Capture,
        opset: int,
        weight_name: Callable[[str], str],
        constants: Mapping[str, torch.Tensor] = MappingProxyType({}),
        packed: Mapping[str, Packing] = MappingProxyType({}),
        ranges: Mapping[str, Affine] = MappingProxyType({}),
    ) -> None:
        """`constants` are the values of buffers, by their names in the module, that become part of the graph itself.

        `packed` says which weights, by their names in the graph, are stored as integers, and `ranges` which layers, by
        their paths, round their inputs to codes.
        """
        self.graph = Graph(opset)
        self.opset = opset
        self._program = capture.program
        self._twins = capture.twins
        self._weight_name = weight_name
        self._constants = constants
        self._packed = packed
        self._ranges = ranges
        self._known: dict[torch.fx.Node, Any] = {}
        self._lengths: dict[tuple[int, ...], str] = {}
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
            return self.graph.constant(_array(_real(value)))
        if isinstance(value, Size):
            return self.emit("Squeeze", self.sizes([value]), self.graph.ints([0]), dtype="int64", shape=())
        return self.graph.constant(np.array(value, dtype or self.dtype))

    def cast(self, value: Any, dtype: str) -> Value:
        """`value` in `dtype`; a node only if it is another one."""
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
        return _legal(self.graph.model(ports, named, producer))

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
        if not spec.per_sample:
            ports.append(port(spec.name, made.dtype, spec.shape))
            self._measure(made)
            return made
        # one value for all samples or one per sample: an axis of its own here, and an `Expand` in the model
        ports.append(port(spec.name, made.dtype, (f"{spec.name}s",)))
        return self.graph.emit("Reshape", [spec.name, self.graph.ints([-1])], made.dtype, made.shape)

    def _stored(self, entry: Any, node: torch.fx.Node) -> Any:
        if entry.kind == graph_signature.InputKind.CONSTANT_TENSOR:
            return self._program.constants[entry.target]
        value, name = node.meta["val"], entry.target.removeprefix(_PREFIX)
        if name in self._constants:
            return self._constants[name]
        source = self._weight_name(name)
        packing, codes = self._packed.get(source), self._ranges.get(source.removesuffix(".weight"))
        return Weight(source, dtype_name(value.dtype), tuple(value.shape), packing, codes)

    def _call(self, node: torch.fx.Node) -> Any:
        target = str(node.target)
        if target.startswith(NO_EFFECT):
            return None
        twins = self._twins[node]
        arguments = self._resolved(*(twin.args for twin in twins))
        keywords = {
            key: self._resolved(*(twin.kwargs[key] for twin in twins)) for key in node.kwargs if key not in IDLE
        }
        if target in LIFTED:
            return arguments[0]
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        if _foldable(arguments) and _foldable(keywords):
            given = {key: value for key, value in node.kwargs.items() if key not in PLACEMENT}
            return node.target(*_off_device(arguments), **{**given, **keywords})  # type: ignore[operator]
        if target not in OPERATORS:
            raise UnsupportedError(f"no ONNX form for {target} in {self.graph.scope or 'the part itself'}")
        return _checked_call(OPERATORS[target], self, _meaningful(node.target, arguments), keywords)

    def _resolved(self, *values: Any) -> Any:
        """One argument as it is in each trace: nodes are replaced by what they became, numbers that differ by Sizes."""
        first = values[0]
        if isinstance(first, torch.fx.Node):
            return self._known[first]
        if isinstance(first, (tuple, list)):
            return [self._resolved(*entries) for entries in zip(*values, strict=True)]
        if all(type(value) is type(first) and value == first for value in values):
            return first
        if all(type(value) is int for value in values):
            return Size(values)
        told = ", then ".join(map(repr, values))
        raise UnsupportedError(f"{self.node.target} depends on the input's size by {told}")

    def _measure(self, value: Any) -> None:
        """Take each free size where it first appears; sizes that nobody asks for are dropped with their nodes."""
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Value):
                for axis, dim in enumerate(tensor.shape):
                    if isinstance(dim, tuple) and dim not in self._lengths:
                        cut = {"start": axis, "end": axis + 1}
                        self._lengths[dim] = self.graph.emit("Shape", [tensor.name], "int64", (1,), **cut).name

    def _length(self, size: Size) -> str:
        """The name of an int64 vector of one element that holds `size`: taken from the shape of an earlier tensor, or
        computed."""
        if size.values not in self._lengths:
            rule = rule_for(size.values, self._lengths)
            if rule is None:
                told = ", then ".join(map(str, size.values))
                raise UnsupportedError(
                    f"{self.node.target} needs the number {told} at growing sizes, which no tensor before it is long, "
                    "and which follows from none of them"
                )
            self._lengths[size.values] = self._computed(rule)
        return self._lengths[size.values]

    def _computed(self, rule: Rule) -> str:
        name, *others = (self._lengths[values] for values in rule.of)
        factor = [] if rule.factor == 1 else [self.graph.ints([rule.factor])]
        for other in (*others, *factor):
            name = self.graph.emit("Mul", [name, other], "int64", (1,)).name
        if rule.offset:
            name = self.graph.emit("Add", [name, self.graph.ints([rule.offset])], "int64", (1,)).name
        if rule.divisor != 1:
            name = self.graph.emit("Div", [name, self.graph.ints([rule.divisor])], "int64", (1,)).name
        return name

    def _shapes(self, node: torch.fx.Node) -> list[tuple[Dim, ...]]:
        traces = zip(*(_results(twin) for twin in self._twins[node]), strict=True)
        return [tuple(map(_dim, zip(*(map(int, one.shape) for one in same), strict=True))) for same in traces]

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
        """Rename the tensor itself; an Identity only if it has a name of its own: inputs, outputs, modules."""
        if value.name == name:
            return  # the output of a stage is that of its last module
        made = any(value.name in node.output for node in self.graph.nodes)
        if made and value.name not in names and value.name not in self._points.values():
            self.graph.rename({value.name: name})
            names[value.name] = name
        else:
            now = names.get(value.name, value.name)
            self.graph.rename({self.graph.emit("Identity", [now], value.dtype, value.shape).name: name})


def _meaningful(target: Any, arguments: Sequence[Any]) -> list[Any]:
    """`arguments` without those at their end that say nothing to a graph."""
    names = [argument.name for argument in target._schema.arguments[: len(arguments)]]
    kept = len(names)
    while kept and names[kept - 1] in IDLE:
        kept -= 1
    return list(arguments[:kept])


def _checked_call(function: Operator, t: Translation, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """The operator's function, unless it does not know an argument: leaving one out would be a wrong graph."""
    try:
        inspect.signature(function).bind(t, *arguments, **keywords)
    except TypeError as fault:
        raise UnsupportedError(f"{t.node.target} has no ONNX form with these arguments: {fault}") from None
    return function(t, *arguments, **keywords)


def _legal(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, unless a type or shape in it is not what the ONNX standard gives for its operators.

    Raises:
        UnsupportedError: naming the first node that is not legal.
    """
    try:
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (shape_inference.InferenceError, TypeError) as fault:
        raise UnsupportedError(f"the part has no legal ONNX graph: {' '.join(str(fault).split())[:300]}") from None
    return model


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a constant: torch.export keeps those of fake tensors beside them."""
    found = getattr(tensor, "constant", tensor)
    if found is None:
        raise UnsupportedError(f"a constant of shape {tuple(tensor.shape)} has no values while a part is traced")
    return found.detach()


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    # torch hands no bfloat16 to numpy, which has it from the onnx package
    return tensor.contiguous().view(torch.int16).numpy().view("bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scope_of(node: torch.fx.Node) -> str:
    """The module path that the node came from, without the wrappers' own names."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).split(".") if stack else []
    return ".".join(path[sum(name == wrapper for name, wrapper in zip(path, ("part", "inner"), strict=False)) :])


def _dim(sizes: tuple[int, ...]) -> Dim:
    return sizes[0] if len(set(sizes)) == 1 else sizes


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
