"""Which output of a student's U-Net is to equal which output of its teacher's.

`blocks`: BK-SDM (arXiv 2305.15798, its released feature points) and Hybrid SD (arXiv 2408.06646) compare what down and
up blocks give. `self-attention`: KOALA (arXiv 2312.04005) compares what self-attention layers give, each with the
teacher's layer that it was copied from. Interiors are narrowed, never these outputs, so no projector is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.models.parts.component import Component
from diffship.models.reduced.layouts import LAYOUTS, Layout, shape_of, student_config, teacher_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy("torch")

KINDS = ("blocks", "self-attention", "none")
T = TypeVar("T")
_STRUCTURE = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block")


@dataclass(frozen=True)
class Pair:
    """Names of two submodules of the U-Nets, and the shape of what both give for one sample of the smallest size."""

    student: str
    teacher: str
    shape: tuple[int, ...]


class Taps:
    """The outputs of named submodules during one call; of tuples the first tensor."""

    def __init__(self, root: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._found: dict[str, Tensor] | None = None
        for name in self.names:
            root.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def gather(self, call: Callable[[], T]) -> tuple[T, list[Tensor]]:
        """What `call` returns, and the outputs in the order of the names.

        Between calls nothing is kept: gradient checkpointing runs the layers once more on the way back.
        """
        found: dict[str, Tensor] = {}
        self._found = found
        try:
            result = call()
        finally:
            self._found = None
        return result, [found[name] for name in self.names]

    def _keep(self, name: str, module: nn.Module, given: object, output: Any) -> None:
        if self._found is not None:
            self._found[name] = output[0] if isinstance(output, tuple) else output


def feature_pairs(kind: str, student: Component, teacher: Component) -> tuple[Pair, ...]:
    """The pairs of `kind` (one of KINDS), proved on the meta device to have equal shapes; reads no weights.

    Raises:
        ConfigError: a layer has no counterpart, or one of another shape; the first one is named.
    """
    if kind == "none":
        return ()
    networks = student.meta, teacher.meta
    inner = [network.get_submodule("inner") for network in networks]
    named = block_names(*inner) if kind == "blocks" else attention_names(student, teacher, *inner)
    for own, other in named.items():
        if other not in dict(inner[1].named_modules()):
            raise ConfigError(f"features {kind!r}: the teacher has no {other} for the student's {own}; {_LEGAL}")
    side = {axis: max(student.smallest[axis], teacher.smallest[axis]) for axis in ("height", "width")}
    shapes = (
        _shapes(student, networks[0], list(named), side),
        _shapes(teacher, networks[1], list(named.values()), side),
    )
    for (own, other), mine, theirs in zip(named.items(), *shapes, strict=True):
        if mine != theirs:
            raise ConfigError(
                f"features {kind!r}: {own} of the student gives {mine}, {other} of the teacher {theirs}; {_LEGAL}"
            )
    return tuple(Pair(own, other, shape) for (own, other), shape in zip(named.items(), shapes[0], strict=True))


_LEGAL = "name the model that the student was made of as teacher, or set features=none"


def _shapes(
    component: Component, network: nn.Module, names: Sequence[str], side: Mapping[str, int]
) -> list[tuple[int, ...]]:
    sizes = {**component.smallest, **side}
    with torch.no_grad(), torch.device("meta"):
        feeds = [torch.empty(spec.resolve(sizes), dtype=getattr(torch, spec.dtype)) for spec in component.inputs]
        _, found = Taps(network.get_submodule("inner"), names).gather(lambda: network(*feeds))
    return [tuple(tensor.shape) for tensor in found]


def block_names(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """{student's module: teacher's} for down and up blocks; up blocks are counted from the last one.

    If a student's last down block has lost its downsampler, the two differ in size behind it: then the last layers
    before it are compared (Hybrid SD's `down_blocks.2.attentions.0.proj_out`).
    """
    own: Any = student
    other: Any = teacher
    named = {}
    for index, block in enumerate(own.down_blocks):
        name = f"down_blocks.{index}"
        whole = index >= len(other.down_blocks) or (block.downsamplers is None) == (
            other.down_blocks[index].downsamplers is None
        )
        named[_last_layer(name, block, whole)] = name if whole else _last_layer(name, other.down_blocks[index], whole)
    shift = len(other.up_blocks) - len(own.up_blocks)
    return {**named, **{f"up_blocks.{index}": f"up_blocks.{index + shift}" for index in range(len(own.up_blocks))}}


def _last_layer(name: str, block: Any, whole: bool) -> str:
    if whole:
        return name
    attentions = getattr(block, "attentions", ())
    return (
        f"{name}.attentions.{len(attentions) - 1}.proj_out"
        if attentions
        else f"{name}.resnets.{len(block.resnets) - 1}"
    )


def attention_names(
    student: Component, teacher: Component, inner: nn.Module, teacher_inner: nn.Module
) -> dict[str, str]:
    """{student's self-attention: the teacher's layer that it was copied from}.

    Raises:
        ConfigError: the student is neither a layout of this teacher nor has its topology.
    """
    own = [name for name, _ in inner.named_modules() if name.endswith(".attn1")]
    layout = layout_between(student.config, teacher.config)
    if layout is not None:
        shift = len(teacher.config["up_block_types"]) - len(layout.up)
        return {name: teacher_name(layout, name, shift) for name in own}
    if own == [name for name, _ in teacher_inner.named_modules() if name.endswith(".attn1")]:
        return {name: name for name in own}
    raise ConfigError(
        "features 'self-attention': the student has neither the teacher's layers nor those of a layout of it; " + _LEGAL
    )


def layout_between(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Layout | None:
    """The layout that keeps of `teacher` the layers that `student` has, whatever its inner widths, or None."""
    for layout in LAYOUTS.values():
        try:
            made = student_config(layout, teacher)
            if all(_plain(made.get(key)) == _plain(student.get(key)) for key in _STRUCTURE) and _deep(made) == _deep(
                student
            ):
                return layout
        except ConfigError:
            continue
    return None


def _deep(config: Mapping[str, Any]) -> tuple[Any, Any]:
    return shape_of(config), config.get("mid_block_type", "UNetMidBlock2DCrossAttn")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
