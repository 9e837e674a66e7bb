"""Widths as the released Hybrid-SD U-Nets state them (arXiv 2408.06646), read into our own.

Their code (bytedance/Hybrid-SD at dcac636, compression/prune_sd/models) extends UNet2DConditionModel by three lists in
config.json. `block_mid_channels` has the inner width of the residual blocks: one entry for each down block, then one
for each layer of each up block. `block_selfattn_heads` and `block_crossattn_heads` have the heads in the same order, of
the blocks with attention alone. No code of theirs is run: the lists become `models.reduced.widths.Widths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.strict import bounded, bounds, load
from diffship.models.reduced.layouts import outer_sizes, shape_of
from diffship.models.reduced.widths import KEY, Widths, with_widths

# how a pipeline that was saved with their class names it in model_index.json
LIBRARY = "compression.prune_sd.models.unet_2d_condition"


@dataclass(frozen=True)
@bounded
class _Lists:
    block_mid_channels: tuple[int, ...] | None = field(default=None, metadata=bounds(1, 65536))
    block_selfattn_heads: tuple[int, ...] | None = field(default=None, metadata=bounds(1, 1024))
    block_crossattn_heads: tuple[int, ...] | None = field(default=None, metadata=bounds(1, 1024))


KEYS = tuple(_Lists.__dataclass_fields__)


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's config with the released lists as widths under `diffship`; any other config as it is.

    Raises:
        SourceError: a list of another length, an entry that is no legal width, or both ways of stating widths.
        UnsupportedError: a U-Net with a mid block; none of these was released, and their code reads its entry nowhere.
    """
    rest = {key: value for key, value in config.items() if key not in KEYS}
    lists = load(_Lists, {key: config[key] for key in KEYS if key in config}, "unet config", SourceError)
    if lists == _Lists():
        return rest
    if KEY in config:
        raise SourceError(f"unet config: has widths under {KEY!r} and as {KEYS[0]}; legal is one of them")
    if config.get("mid_block_type", "") is not None:
        raise UnsupportedError(f"unet config: {KEYS[0]} and the like are read for U-Nets without a mid block only")
    return with_widths(rest, _widths(lists, rest))


def _widths(lists: _Lists, config: Mapping[str, Any]) -> Widths:
    entries = list(_entries(config))
    attending = [entry for entry in entries if entry.transformers]
    inner = _sized("block_mid_channels", lists.block_mid_channels, entries)
    own = _sized("block_selfattn_heads", lists.block_selfattn_heads, attending)
    cross = _sized("block_crossattn_heads", lists.block_crossattn_heads, attending)
    heads = {f"{name}.attn1": count for entry, count in own for name in entry.transformers if count != entry.heads}
    heads |= {f"{name}.attn2": count for entry, count in cross for name in entry.transformers if count != entry.heads}
    return Widths({name: size for entry, size in inner for name in entry.resnets if size != entry.width}, heads)


@dataclass(frozen=True)
class _Entry:
    """What one entry of a list speaks of: names of residual blocks and of the transformer blocks that follow them, with
    their outer width and attention heads."""

    resnets: tuple[str, ...]
    transformers: tuple[str, ...]
    width: int
    heads: int


def _entries(config: Mapping[str, Any]) -> Iterator[_Entry]:
    """In the order of the lists: a down block takes one entry for all its layers, an up block one for each."""
    shape = shape_of(config)
    for block, depths in enumerate(shape.down):
        yield _entry(config, f"down_blocks.{block}", dict(enumerate(depths)))
    for block, depths in enumerate(shape.up):
        for layer, depth in enumerate(depths):
            yield _entry(config, f"up_blocks.{block}", {layer: depth})


def _entry(config: Mapping[str, Any], block: str, depths: Mapping[int, int]) -> _Entry:
    transformers = [
        f"{block}.attentions.{layer}.transformer_blocks.{at}" for layer, depth in depths.items() for at in range(depth)
    ]
    resnets = [f"{block}.resnets.{layer}" for layer in depths]
    return _Entry(tuple(resnets), tuple(transformers), *outer_sizes(config, block))


def _sized(key: str, values: Sequence[int] | None, entries: Sequence[_Entry]) -> list[tuple[_Entry, int]]:
    if values is None:
        return []
    if len(values) != len(entries):
        raise SourceError(f"unet config: {key} has {len(values)} entries; this U-Net takes {len(entries)}")
    return list(zip(entries, values, strict=True))
