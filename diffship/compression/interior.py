"""The layers of a U-Net that significance pruning narrows: kinds, legal widths, and what each unit of width costs.

Only interiors change. So the parameters and MACs of a layer fall in proportion to what is kept of it, and what several
layers save adds up exactly: a sum over layers is the cost of the built model, to the unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.compression.narrow import (
    Kept,
    Scores,
    by_norm,
    feedforward_norms,
    filter_norms,
    head_norms,
)
from diffship.core.lazy import lazy
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.filling import INNER
from diffship.models.reduced.widths import PARTS, Widths, widths_now

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

RESIDUAL, SELF, CROSS, FEEDFORWARD = KINDS = ("residual", "self-attention", "cross-attention", "feed-forward")
_STEP = 32  # what GPUs and published models like; narrow models take their norm groups instead
_SIDE = {RESIDUAL: "inner", SELF: "heads", CROSS: "heads", FEEDFORWARD: "feedforward"}  # field of Widths


@dataclass(frozen=True)
class Layer:
    """A layer that can be narrowed, as it is now.

    size: channels between the convolutions of a residual block or the products of a feed-forward layer, or heads.
    step: legal sizes are its multiples. parameters: of one channel or head.
    """

    name: str
    kind: str
    size: int
    step: int
    parameters: int

    def kept(self, keep: float) -> int:
        """How much stays at the ratio `keep`: `int(size * keep)`, up to the next legal size, at least one step.

        It may be `size` itself: then the layer has nothing to give at this ratio.
        """
        steps = max(1, math.ceil(int(self.size * keep) / self.step))
        return min(self.size, steps * self.step)


def layers(component: Component, feedforward: bool = False) -> tuple[Layer, ...]:
    """Every layer of a U-Net that can become narrower, in the module's order; feed-forward layers only if asked for.

    Layers that are at their least size (one head, one channel a norm group) are left out.
    """
    inner = component.meta.get_submodule(INNER.rstrip("."))
    now = widths_now(inner)
    kinds = {name: RESIDUAL for name in now.inner}
    kinds |= {name: SELF if name.endswith("attn1") else CROSS for name in now.heads}
    kinds |= {name: FEEDFORWARD for name in now.feedforward if feedforward}
    counts = {**now.inner, **now.heads, **now.feedforward}
    listed = (_layer(name, kind, inner.get_submodule(name), counts[name]) for name, kind in kinds.items())
    return tuple(layer for layer in listed if layer.kept(0.5) < layer.size)


def _layer(name: str, kind: str, module: Any, size: int) -> Layer:
    rows, column = _parts(module, kind)
    parameters = sum(p.numel() for part in rows for p in part.parameters()) + column.weight.numel()
    return Layer(name, kind, size, _step(kind, module, size), parameters // size)


def _parts(module: Any, kind: str) -> tuple[list[Any], Any]:
    parts = PARTS[_SIDE[kind]]
    return [module.get_submodule(part) for part in parts.present(module)], module.get_submodule(parts.reader)


def _step(kind: str, module: Any, size: int) -> int:
    if kind in (SELF, CROSS):
        return 1
    groups = int(module.norm2.num_groups) if kind == RESIDUAL else 1
    wide = math.lcm(groups, _STEP)
    return wide if size >= 4 * wide else groups  # below that, quarters would fall together


def unit_macs(component: Component, listed: Sequence[Layer], sizes: Mapping[str, int]) -> dict[str, int]:
    """{layer: MACs of one of its channels or heads}, in one call at `sizes` (as of `walks.cost`), by shapes alone.

    Of attention these are the four products with weights, QK^T and PV.
    """
    outer = component.meta
    shapes: dict[Any, tuple[int, ...]] = {}
    products: dict[str, list[Any]] = {}
    for layer in listed:
        rows, column = _parts(outer.get_submodule(INNER + layer.name), layer.kind)
        products[layer.name] = [part for part in (*rows, column) if part.weight.dim() > 1]
        for part in products[layer.name]:
            part.register_forward_hook(partial(_note, shapes))
    known = {**component.smallest_sizes(), **sizes}
    with torch.no_grad(), torch.device("meta"):
        outer(*(_blank(spec.resolve(known), spec.dtype) for spec in component.inputs))
    return {layer.name: _macs(layer, products[layer.name], shapes) // layer.size for layer in listed}


def _macs(layer: Layer, products: Sequence[Any], shapes: Mapping[Any, tuple[int, ...]]) -> int:
    total: int = sum(math.prod(shapes[part]) * math.prod(part.weight.shape[1:]) for part in products)
    if layer.kind in (SELF, CROSS):
        (rows, queries, width), keys = shapes[products[0]], shapes[products[1]][1]
        total += 2 * rows * queries * keys * width
    return total


def _note(shapes: dict[Any, tuple[int, ...]], module: Any, given: Any, made: torch.Tensor) -> None:
    shapes[module] = tuple(made.shape)


def _blank(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def widths_for(listed: Iterable[Layer], counts: Mapping[str, int]) -> Widths:
    """The widths of the layers whose count is below their size."""
    sides: dict[str, dict[str, int]] = {side: {} for side in PARTS}
    for layer in listed:
        if counts.get(layer.name, layer.size) < layer.size:
            sides[_SIDE[layer.kind]][layer.name] = counts[layer.name]
    return Widths(**sides)


def largest_kept(weights: Weights, listed: Iterable[Layer], counts: Mapping[str, int]) -> Kept:
    """What stays of each layer: the channels and heads with the largest norm (`narrow.by_norm`)."""
    found = tuple(listed)
    return by_norm(weights, widths_for(found, counts), {layer.name: layer.size for layer in found})


def norms(weights: Weights, layer: Layer) -> Scores:
    """(size,) L2 norm of the weights of each channel or head: what `largest_kept` goes by."""
    if layer.kind == RESIDUAL:
        return filter_norms(weights, layer.name)
    if layer.kind == FEEDFORWARD:
        return feedforward_norms(weights, layer.name)
    return head_norms(weights, layer.name, layer.size)


def lost_norm(sizes: Scores, kept: int) -> float:
    """Share of the whole L2 norm, 0 to 1, that goes when only the `kept` largest of `sizes` (one a channel) stay."""
    squares = np.sort(np.square(sizes))
    total = float(squares.sum())
    return math.sqrt(float(squares[: len(squares) - kept].sum()) / total) if total else 0.0
