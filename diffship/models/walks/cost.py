"""Cost: parameters, multiply-accumulates and bytes of a part, counted on the meta device without running it.

One MAC is one multiplication and one addition. The literature's figure is the convolution and linear column (fused
attention is invisible to its counters); the two matrix products of attention, QK^T and PV, are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import TensorMeta
from diffship.models.parts.component import Component
from diffship.models.parts.program import Layer, Tree

if TYPE_CHECKING:
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    TorchFunctionMode = lazy_base("torch.overrides", "TorchFunctionMode")


@dataclass(frozen=True)
class Cost:
    """Of one call with the sizes that were asked for, batch included; `bytes` are the stored weights."""

    params: int
    conv_linear_macs: int
    attention_macs: int
    bytes: int

    @property
    def macs(self) -> int:
        return self.conv_linear_macs + self.attention_macs


def cost(component: Component, sizes: Mapping[str, int] | None = None) -> Cost:
    """Counts one call; axes that `sizes` leaves out have batch 1, 77 tokens and the smallest side.

    `image_height` and `image_width` stand for a VAE's sample axes, `height` and `width` also for its latent axes.
    """
    known = {**component.smallest_sizes(), **_translated(sizes or {})}
    module = component.meta
    counter = _Counter()
    with torch.no_grad(), torch.device("meta"), counter:
        module(*(_blank(spec, known) for spec in component.inputs))
    params = sum(parameter.numel() for parameter in module.parameters())
    return Cost(params, counter.conv_linear, counter.attention, component.weights.nbytes)


def layer_costs(component: Component, sizes: Mapping[str, int] | None = None) -> dict[str, Cost]:
    """The cost of each layer, by its name in `blocks.layers`. Weights that no layer owns are in none of them."""
    known = {**component.smallest_sizes(), **_translated(sizes or {})}
    whole = component.meta.get_submodule("inner")
    tree, found = Tree(whole), {}
    values = {spec.name: _blank(spec, known) for spec in component.inputs}
    for layer in component.program(whole).layers:
        counter = _Counter()
        with torch.no_grad(), torch.device("meta"), counter:
            written = layer.apply(tree, *(values[name] for name in layer.reads))
        values.update(zip(layer.writes, written, strict=True))
        params = sum(value.numel() for path in layer.modules for value in whole.get_submodule(path).parameters())
        size = sum(meta.nbytes for meta in held_by(component, layer))
        found[layer.name] = Cost(params, counter.conv_linear, counter.attention, size)
    return found


def held_by(component: Component, layer: Layer) -> list[TensorMeta]:
    """The stored tensors that one layer owns."""
    paths = tuple(f"{path}." for path in layer.modules)
    return [component.weights.meta(name) for name in component.weights.names() if name.startswith(paths)]


def _translated(sizes: Mapping[str, int]) -> dict[str, int]:
    known = dict(sizes)
    for axis in ("height", "width"):
        if f"image_{axis}" in sizes:
            known.setdefault(f"sample_{axis}", sizes[f"image_{axis}"])
        if axis in sizes:
            known.setdefault(f"latent_{axis}", sizes[axis])
    return known


def _blank(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    return torch.empty(spec.resolve(sizes), dtype=getattr(torch, spec.dtype), device="meta")


class _Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.conv_linear = 0
        self.attention = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.conv_linear += result.numel() * args[0].shape[-1]
        elif func in (F.conv2d, torch.conv2d):
            self.conv_linear += result.numel() * math.prod(_argument(args, kwargs, 1, "weight").shape[1:])
        elif func is F.scaled_dot_product_attention:
            query, key, value = (_argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
            scores = query.shape[:-1].numel() * key.shape[-2]
            self.attention += scores * (query.shape[-1] + value.shape[-1])
        elif func in (torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul):
            self.attention += result.numel() * args[-2 if func is torch.baddbmm else 0].shape[-1]
        return result


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, index: int, name: str) -> Any:
    return args[index] if len(args) > index else (kwargs or {})[name]
