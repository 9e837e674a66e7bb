"""Program: a part as layers in execution order, each with the tensors it reads and writes.

This is the one description of what is inside a part: block names, cuts, costs by layer and memory-bounded runs all
come from it. A tensor between two layers is called `<module path>.out`; of a module that gives several, the first is
called so and the others `<module path>.out.1` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from diffship.core.spec import Axis, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Tensors: TypeAlias = "tuple[torch.Tensor, ...]"
Apply: TypeAlias = "Callable[..., Tensors]"  # (modules by path relative to `inner`, *tensors read) -> tensors written


@dataclass(frozen=True)
class Layer:
    """The smallest thing that can be cut off a part: `apply` computes the tensors `writes` from the tensors `reads`.

    `modules` are the paths whose weights it owns. An `embedding` computes what later layers are conditioned on (the
    embedding of the timestep, say) from inputs of the part alone, so each stage may compute its own copy.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[str, ...]
    apply: Apply = field(repr=False, compare=False)
    embedding: bool = False


@dataclass(frozen=True)
class Program:
    """`specs` holds every tensor that crosses between layers, inputs and outputs of the part included."""

    layers: tuple[Layer, ...]
    specs: Mapping[str, TensorSpec]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Tree:
    """Modules by path below a root; raises AttributeError if there is none at a path."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __getitem__(self, path: str) -> Any:
        return self._root.get_submodule(path)


class Builder:
    """Collects layers; `tensor` is the spec of a tensor that the next layers write."""

    def __init__(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.layers: list[Layer] = []
        self.specs = {spec.name: spec for spec in (*self.inputs, *self.outputs)}

    def tensor(self, name: str, *shape: Axis) -> str:
        self.specs.setdefault(name, TensorSpec(name, "float32", shape))
        return name

    def add(
        self,
        name: str,
        reads: Sequence[str],
        writes: str | Sequence[str],
        modules: Iterable[str],
        apply: Apply,
        embedding: bool = False,
    ) -> None:
        written = (writes,) if isinstance(writes, str) else tuple(writes)
        self.layers.append(Layer(name, tuple(reads), written, tuple(modules), apply, embedding))

    def program(self) -> Program:
        names = tuple(spec.name for spec in self.inputs), tuple(spec.name for spec in self.outputs)
        return Program(tuple(self.layers), self.specs, *names)


class Sequence2d:
    """Adds image layers one after the other, keeping the name and place of the hidden state.

    `axes` names height and width; `scale` is the hidden state's size relative to them, as a power of two.
    """

    def __init__(self, builder: Builder, axes: tuple[str, str], hidden: str) -> None:
        self.builder = builder
        self.axes = axes
        self.hidden = hidden
        self.scale = 0

    def plane(self, channels: int) -> tuple[Axis, ...]:
        return ("batch_size", channels, *(scaled(axis, self.scale) for axis in self.axes))

    def pixels(self) -> str:
        """The axis of the hidden state's pixels as one row of tokens: `height * width / 4` for scale -1."""
        return scaled(" * ".join(self.axes), 2 * self.scale)

    def module(
        self,
        path: str,
        channels: int,
        more: Sequence[str] = (),
        apply: Apply | None = None,
        modules: Sequence[str] | None = None,
        out: str | None = None,
    ) -> str:
        """One layer that reads the hidden state and `more`, and writes the next hidden state."""
        written = out or self.builder.tensor(f"{path}.out", *self.plane(channels))
        call = apply or (lambda tree, *tensors: (tree[path](*tensors),))
        self.builder.add(path, (self.hidden, *more), written, modules or (path,), call)
        self.hidden = written
        return written


def scaled(axis: str, scale: int) -> str:
    """`height / 4` for scale -2, `height * 4` for 2, `height` for 0."""
    if scale == 0:
        return axis
    return f"{axis} {'*' if scale > 0 else '/'} {2 ** abs(scale)}"
