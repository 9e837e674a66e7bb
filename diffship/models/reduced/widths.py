"""Inner widths that no diffusers config can say: narrowed residual blocks and attention with fewer heads.

They lie in the U-Net's config.json under the key `diffship`. Only interiors change, so no neighbour is touched: a
residual block keeps what it takes and gives, and attention keeps the width of a head (Hybrid SD, arXiv 2408.06646).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.strict import bounded, bounds, load, plain, unknown

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn import GroupNorm
else:
    torch, nn, GroupNorm = lazy("torch"), lazy("torch.nn"), lazy_base("torch.nn", "GroupNorm")

KEY = "diffship"


@dataclass(frozen=True)
class Parts:
    """The layers around an interior. `writers` make it: when it is narrowed, their rows (output channels) are cut.
    `reader` takes it: its columns (input channels) are cut, and its bias stays."""

    writers: tuple[str, ...]
    reader: str

    def present(self, layer: Any) -> list[str]:
        """The writers that `layer` has: a residual block may be without a time projection."""
        return [part for part in self.writers if getattr(layer, part.partition(".")[0], None) is not None]


# by the field of `Widths`
PARTS = {
    "inner": Parts(("conv1", "time_emb_proj", "norm2"), "conv2"),
    "heads": Parts(("to_q", "to_k", "to_v"), "to_out.0"),
    "feedforward": Parts(("net.0.proj",), "net.2"),
}


@dataclass(frozen=True)
@bounded
class Widths:
    """inner: channels between the two convolutions of a residual block, by its name. heads: of an attention layer
    (`....transformer_blocks.0.attn1`), by its name. feedforward: channels between the two products of a feed-forward
    layer (`....transformer_blocks.0.ff`), by its name. What is not named is as its config says."""

    inner: dict[str, int] = field(default_factory=dict, metadata=bounds(1, 65536))
    heads: dict[str, int] = field(default_factory=dict, metadata=bounds(1, 1024))
    feedforward: dict[str, int] = field(default_factory=dict, metadata=bounds(1, 65536))

    def __bool__(self) -> bool:
        return bool(self.inner or self.heads or self.feedforward)

    def over(self, wider: Widths) -> Widths:
        """These widths, and those of `wider` for the layers that these do not name."""
        return Widths(
            {**wider.inner, **self.inner}, {**wider.heads, **self.heads}, {**wider.feedforward, **self.feedforward}
        )


def widths_of(config: Mapping[str, Any]) -> Widths:
    """What a U-Net's config says under `diffship`; raises SourceError for anything that this version does not know."""
    found = config.get(KEY)
    return Widths() if found is None else load(Widths, found, f"unet config: {KEY}", SourceError)


def with_widths(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """`config` with `widths` in it, or without the key if nothing is narrowed."""
    rest = {key: value for key, value in config.items() if key != KEY}
    return {**rest, KEY: plain(widths)} if widths else rest


def narrow_module(module: Any, widths: Widths) -> None:
    """Give the layers of a UNet2DConditionModel (on any device, weights to be filled later) their inner widths.

    Raises:
        SourceError: no such layer, a wider one than its config says, or one that its norm groups do not divide.
    """
    layers = dict(module.named_modules())
    for name, inner in widths.inner.items():
        _narrow_resnet(_found(layers, name, "conv1", residual_blocks), name, inner)
    for name, heads in widths.heads.items():
        _narrow_attention(_found(layers, name, "to_q", attentions), name, heads)
    for name, inner in widths.feedforward.items():
        _narrow_feedforward(_found(layers, name, "net", feedforwards), name, inner)


def widths_now(module: Any) -> Widths:
    """Every layer of a UNet2DConditionModel that can be narrowed, with its present size, in the module's order."""
    layers = dict(module.named_modules())
    return Widths(
        {name: int(layers[name].conv1.out_channels) for name in residual_blocks(layers)},
        {name: int(layers[name].heads) for name in attentions(layers)},
        {name: int(layers[name].net[2].in_features) for name in feedforwards(layers)},
    )


def residual_blocks(layers: Mapping[str, Any]) -> list[str]:
    """Names of all residual blocks, in the order of the module."""
    return [name for name, layer in layers.items() if hasattr(layer, "conv1") and hasattr(layer, "conv2")]


def attentions(layers: Mapping[str, Any]) -> list[str]:
    """Names of all attention layers, self (`attn1`) and cross (`attn2`)."""
    return [name for name, layer in layers.items() if hasattr(layer, "to_q")]


def feedforwards(layers: Mapping[str, Any]) -> list[str]:
    """Names of all feed-forward layers of transformer blocks."""
    return [name for name, layer in layers.items() if name.endswith(".ff") and hasattr(layer, "net")]


def _found(layers: Mapping[str, Any], name: str, part: str, legal: Callable[[Any], Iterable[str]]) -> Any:
    if name not in layers or not hasattr(layers[name], part):
        raise SourceError(f"unet config: {unknown('layer', name, legal(layers))}")
    return layers[name]


def _narrow_resnet(block: Any, name: str, inner: int) -> None:
    outer, groups = block.conv1.out_channels, block.norm2.num_groups
    if inner > outer or inner % groups:
        raise SourceError(f"unet config: {name} is {inner} wide inside; legal: multiples of {groups} up to {outer}")
    block.conv1 = _conv(block.conv1, block.conv1.in_channels, inner)
    if block.time_emb_proj is not None:
        block.time_emb_proj = _linear(block.time_emb_proj, block.time_emb_proj.in_features, inner)
    block.norm2 = InnerNorm(groups, inner, eps=block.norm2.eps, affine=block.norm2.affine)
    block.conv2 = _conv(block.conv2, inner, block.conv2.out_channels)


class InnerNorm(GroupNorm):
    """GroupNorm that accepts groups of a single value, which it turns into the layer's shift (bias).

    Narrow blocks have such groups in the smallest pictures. torch's own layer refuses them, as it does for statistics
    that are learnt; every compiled engine computes them.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _narrow_attention(layer: Any, name: str, heads: int) -> None:
    if heads > layer.heads:
        raise SourceError(f"unet config: {name} has {heads} heads; its config gives it {layer.heads}")
    width = layer.inner_dim // layer.heads * heads
    layer.heads = layer.sliceable_head_dim = heads
    layer.inner_dim = layer.inner_kv_dim = width
    for part in ("to_q", "to_k", "to_v"):
        old = getattr(layer, part)
        setattr(layer, part, _linear(old, old.in_features, width))
    layer.to_out[0] = _linear(layer.to_out[0], width, layer.to_out[0].out_features)


def _narrow_feedforward(layer: Any, name: str, inner: int) -> None:
    gate, last = layer.net[0].proj, layer.net[2]  # GEGLU: values and gates side by side
    if inner > last.in_features:
        raise SourceError(f"unet config: {name} is {inner} wide inside; its config gives it {last.in_features}")
    layer.net[0].proj = _linear(gate, gate.in_features, 2 * inner)
    layer.net[2] = _linear(last, inner, last.out_features)


def _conv(old: Any, inside: int, outside: int) -> Any:
    return nn.Conv2d(inside, outside, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)


def _linear(old: Any, inside: int, outside: int) -> Any:
    return nn.Linear(inside, outside, bias=old.bias is not None)
