"""torch-pruning's dependency graph of a U-Net: which weights belong together inside each layer that can be narrowed.

The graph (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900) is traced on the meta device, so it costs no memory. A
group is asked for at the layer that *reads* the interior: asked for at the gated product of a feed-forward layer, it
would rank a channel's value and its gate as two channels, though neither stays without the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.compression.narrow import Indices, Kept, Scores
from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.weights import Weights
from diffship.models.parts.component import Component, read_tensor
from diffship.models.reduced.widths import PARTS, widths_now

if TYPE_CHECKING:
    import torch
    import torch_pruning as tp
    from torch import Tensor, nn
else:
    torch, nn, tp = lazy("torch"), lazy("torch.nn"), lazy("torch_pruning")

KINDS = tuple(PARTS)


@dataclass(frozen=True, eq=False)
class Interior:
    """The inside of one layer: `units` (unit, channel) are the pieces that go or stay whole.

    A unit is a head, a channel of a feed-forward layer, or one position in every norm group of a residual block: so
    the groups stay equally large, and every channel stays in its group. `layers` are those that the graph pairs.
    """

    kind: str
    name: str
    units: Indices
    group: Any = field(repr=False)
    layers: Mapping[str, nn.Module] = field(repr=False)

    @property
    def cost(self) -> int:
        """Parameters that one unit holds."""
        reader = f"{self.name}.{PARTS[self.kind].reader}"
        counts = (
            int(tensor.numel())
            for name, layer in self.layers.items()
            for leaf, tensor in layer.named_parameters()
            if name != reader or leaf == "weight"
        )
        return sum(counts) // len(self.units)

    def of_units(self, channels: Scores) -> Scores:
        """(units,) means of scores of channels, as torch-pruning takes them over norm groups and over heads."""
        return np.asarray(channels[self.units].mean(1))

    def kept(self, units: Indices) -> Indices:
        """What `Kept` calls these units, ascending: heads by their number, the others by their channels."""
        return np.sort(units if self.kind == "heads" else self.units[units].ravel())


def kept_of(interiors: Sequence[Interior], units: Mapping[str, Indices]) -> Kept:
    """`Kept` of the units that stay, by name of the layer; a layer that keeps all of them is not named."""
    sides: dict[str, dict[str, Indices]] = {kind: {} for kind in KINDS}
    for interior in interiors:
        if len(units[interior.name]) < len(interior.units):
            sides[interior.kind][interior.name] = interior.kept(units[interior.name])
    return Kept(**sides)


def traced(component: Component, kinds: Sequence[str] = KINDS) -> tuple[nn.Module, list[Interior]]:
    """A U-Net on the meta device and its interiors of these `kinds`, in the order of the module.

    Raises:
        MissingExtra: torch-pruning is not installed.
        UnsupportedError: the graph pairs other weights than those of one layer: this U-Net has something unknown.
    """
    module = component.meta.requires_grad_(True)
    feeds = [torch.from_numpy(feed).to("meta") for feed in component.example(0).values()]
    with torch.enable_grad():
        dependencies = tp.DependencyGraph().build_dependency(module, tuple(feeds), forward_fn=_call)
    inner = module.get_submodule("inner")
    graph, widths = _Graph(dependencies, inner), widths_now(inner)
    return module, [graph.interior(kind, name) for kind in KINDS if kind in kinds for name in getattr(widths, kind)]


def channel_scores(interior: Interior, importance: Callable[[Any], Tensor]) -> Scores:
    """(channels,) scores of a torch-pruning importance, in the order of the channels; its layers hold their weights."""
    return np.asarray(importance(interior.group).double().cpu().numpy())


@contextmanager
def filled(interior: Interior, weights: Weights) -> Iterator[None]:
    """While open, the layers of an interior hold their weights in float32; before and after, they are on meta."""
    empty = {name: dict(layer._parameters) for name, layer in interior.layers.items()}
    for name, parameters in empty.items():
        for leaf in (leaf for leaf, parameter in parameters.items() if parameter is not None):
            held = nn.Parameter(read_tensor(weights, f"{name}.{leaf}").float(), requires_grad=False)
            interior.layers[name]._parameters[leaf] = held
    try:
        yield
    finally:
        for name, parameters in empty.items():
            interior.layers[name]._parameters.update(parameters)


def _call(module: nn.Module, feeds: Sequence[Tensor]) -> Any:
    return module(*feeds)


class _Graph:
    """The dependencies of a traced U-Net, by the names of its layers."""

    def __init__(self, dependencies: Any, inner: nn.Module) -> None:
        self._dependencies, self._inner = dependencies, inner
        self._names = {layer: name for name, layer in inner.named_modules()}

    def interior(self, kind: str, name: str) -> Interior:
        layer: Any = self._inner.get_submodule(name)
        parts = PARTS[kind]
        reader: Any = layer.get_submodule(parts.reader)
        channels = int(reader.weight.shape[1])
        prune = tp.prune_conv_in_channels if kind == "inner" else tp.prune_linear_in_channels
        group = self._dependencies.get_pruning_group(reader, prune, list(range(channels)))
        writers = parts.present(layer)
        self._check(name, channels, {part: 0 for part in writers} | {parts.reader: 1}, group)
        layers = {f"{name}.{part}": layer.get_submodule(part) for part in (*writers, parts.reader)}
        return Interior(kind, name, _units(layer, kind, channels), group, layers)

    def _check(self, name: str, channels: int, parts: Mapping[str, int], group: Any) -> None:
        """Raises UnsupportedError unless the group is what `narrow` cuts (`parts`: layer, axis), index by index."""
        expected, pairs = {(f"{name}.{part}", axis) for part, axis in parts.items()}, self._pairs(group)
        if set(pairs) != expected:
            odd = ", ".join(sorted(f"{layer} (axis {axis})" for layer, axis in set(pairs) ^ expected))
            raise UnsupportedError(f"torch-pruning and diffship differ on what belongs to {name}: {odd[:300]}")
        for (layer, axis), (index, channel) in pairs.items():
            size = self._inner.get_submodule(layer).get_parameter("weight").shape[axis]
            if sorted(index) != list(range(size)) or not np.array_equal(channel, index % channels):
                raise UnsupportedError(f"torch-pruning pairs channels of {name} and {layer} otherwise than diffship")

    def _pairs(self, group: Any) -> dict[tuple[str, int], tuple[Indices, Indices]]:
        """{(layer, axis of its weight): (indices, channel of the interior that each belongs to)}."""
        return {
            (self._names[item.dep.target.module], 0 if self._writes(item.dep.handler) else 1): (
                np.array(item.idxs, np.intp),
                np.array(item.root_idxs, np.intp),
            )
            for item in group.items
            if item.dep.target.module in self._names
        }

    def _writes(self, handler: Any) -> bool:
        return bool(self._dependencies.is_out_channel_pruning_fn(handler))


def _units(layer: Any, kind: str, channels: int) -> Indices:
    every = np.arange(channels, dtype=np.intp)
    if kind == "inner":
        return every.reshape(int(layer.norm2.num_groups), -1).T
    if kind == "heads":
        if channels != layer.inner_dim or channels % layer.heads:
            raise UnsupportedError(f"{channels} channels are not {layer.heads} heads of {layer.inner_dim} in all")
        return every.reshape(int(layer.heads), -1)
    return every[:, None]
