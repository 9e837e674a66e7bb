"""An exported program's operations once more, at other sizes: only the numbers in them are asked for.

torch.export also gives a program its signature, its module paths and its checks. One trace has these; for the others
make_fx takes a third of the time. The two traces are matched along their data: an operation is the twin of another if
it has the same name and reads the twins of what that one reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch._subclasses import fake_tensor
    from torch.export import graph_signature
    from torch.fx.experimental import proxy_tensor
else:
    torch, proxy_tensor = lazy("torch"), lazy("torch.fx.experimental.proxy_tensor")
    graph_signature, fake_tensor = lazy("torch.export.graph_signature"), lazy("torch._subclasses.fake_tensor")

Feed: TypeAlias = "tuple[torch.Tensor, ...]"
Twins: TypeAlias = "dict[torch.fx.Node, torch.fx.Node]"
# arguments, as ATen names them, that change no value, or whose meaning lies in the result's type
PLACEMENT = ("device", "pin_memory", "layout", "non_blocking", "memory_format", "copy")
IDLE = {*PLACEMENT, "dtype", "half_to_float", "implicit"}
IDLE |= {"cudnn_enable", "cudnn_enabled", "padding_idx", "scale_grad_by_freq", "sparse"}
NO_EFFECT = ("aten._assert", "aten.sym_constrain", "aten._guard")  # nodes that no graph needs


def by_name(program: torch.export.ExportedProgram, other: torch.export.ExportedProgram) -> Twins:
    """Node of `program` -> node of `other`, a program of the same module at other sizes.

    Raises:
        UnsupportedError: they do not have the same operations and constants.
    """
    nodes, others = list(program.graph.nodes), list(other.graph.nodes)
    if [(node.name, str(node.target)) for node in nodes] != [(node.name, str(node.target)) for node in others]:
        raise UnsupportedError("the part does other operations at other sizes, so it has no graph for all sizes")
    for name, tensor in program.constants.items():
        _require_same(tensor, other.constants[name])
    return dict(zip(nodes, others, strict=True))


def retraced(program: torch.export.ExportedProgram, module: torch.nn.Module, feed: Feed) -> Twins | None:
    """Node of `program` -> node of a trace of the same `module` with `feed`; None if they are not the same operations.

    Nodes that no graph needs are left out, and so are parameters and buffers, which have one size. Called inside the
    FakeTensorMode that `feed` and the module's parameters belong to.

    Raises:
        UnsupportedError: a constant has other values at other sizes.
    """
    try:
        trace = proxy_tensor.make_fx(module, pre_dispatch=True, _allow_fake_constant=True)(*feed)
    except Exception:  # whatever torch cannot trace; the caller's way has words for it
        return None
    inputs, others = _inputs(program), _placeholders(trace.graph)
    if len(inputs) != len(others):
        return None
    twins = dict(zip(inputs, others, strict=True))
    nodes, others = _operations(program.graph), _operations(trace.graph)
    same = len(nodes) == len(others) and all(_pair(*pair, twins) for pair in zip(nodes, others, strict=True))
    if not same:
        return None
    for node, tensor in _constants(program):
        if node in twins:
            _require_same(tensor, getattr(trace, str(twins[node].target)))
    return twins


def _constants(program: torch.export.ExportedProgram) -> Iterator[tuple[torch.fx.Node, torch.Tensor]]:
    for node, target in _given(program, graph_signature.InputKind.CONSTANT_TENSOR):
        yield node, program.constants[target]


def _require_same(one: torch.Tensor, other: torch.Tensor) -> None:
    values = [getattr(tensor, "constant", tensor) for tensor in (one, other)]  # of fake ones, if they have any
    with fake_tensor.unset_fake_temporarily():
        if any(value is None for value in values) or not torch.equal(*values):
            told = ", then ".join(str(None if value is None else value.tolist())[:40] for value in values)
            raise UnsupportedError(f"a tensor made from a number depends on the input's size: {told}")


def _inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node, _ in _given(program, graph_signature.InputKind.USER_INPUT)]


def _given(program: torch.export.ExportedProgram, kind: Any) -> Iterator[tuple[torch.fx.Node, str]]:
    """What the program is given of a kind (of InputKind): its nodes, and what each is in the module."""
    nodes = {node.name: node for node in _placeholders(program.graph)}
    for entry in program.graph_signature.input_specs:
        if entry.kind == kind:
            yield nodes[entry.arg.name], str(entry.target)


def _placeholders(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _operations(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Calls that a graph needs, and last what it gives."""
    meant = ("call_function", "output")
    return [node for node in graph.nodes if node.op in meant and not str(node.target).startswith(NO_EFFECT)]


def _pair(node: torch.fx.Node, other: torch.fx.Node, twins: Twins) -> bool:
    """Note that `other` is the twin of `node`, unless they do not do the same with the same."""
    if str(node.target) != str(other.target) or node.kwargs.keys() != other.kwargs.keys():
        return False
    other.args = _filled(node, other.args)
    twins[node] = other
    given = zip_longest(_leaves(node.args, node.kwargs), _leaves(other.args, other.kwargs))
    return all(_same(one, another, twins) for one, another in given)


def _filled(node: torch.fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """`given` with the arguments at its end that make_fx leaves out, for they have their default or mean nothing."""
    missing = range(len(given), len(node.args))
    if not missing or not isinstance(node.target, torch._ops.OpOverload):
        return given
    schema = node.target._schema.arguments
    idle = all(schema[i].name in IDLE or schema[i].default_value == node.args[i] for i in missing)
    return (*given, *node.args[len(given) :]) if idle else given


def _same(one: Any, other: Any, twins: Twins) -> bool:
    if not isinstance(one, torch.fx.Node) or not isinstance(other, torch.fx.Node):
        return type(one) is type(other)
    if one.op == "placeholder" and other.op == "get_attr":  # a parameter; what reads it first says which one
        return twins.setdefault(one, other) is other
    return twins.get(one) is other


def _leaves(*values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(*value)
        elif isinstance(value, dict):
            yield from _leaves(*value.values())
        else:
            yield value
