"""Published reductions of Stable Diffusion's U-Nets, as data: which layers of a teacher a student keeps.

BK-SDM (arXiv 2305.15798, table 1), Hybrid SD (2408.06646), KOALA (2312.04005), SSD-1B and Vega (2401.02677). A layout
knows nothing of widths, head counts or text encoders: those are the teacher's,
so a fine-tune with other ones can be the teacher as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffship.core.errors import ConfigError
from diffship.core.strict import unknown
from diffship.models.reduced.widths import Widths

Config = Mapping[str, Any]
Depths = tuple[tuple[int, ...], ...]
_PER_LEVEL = ("attention_head_dim", "num_attention_heads", "only_cross_attention", "cross_attention_dim")
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.*)\Z")


@dataclass(frozen=True)
class Layout:
    """What is kept of a teacher with `levels` down and up blocks.

    down: for each kept down block (from the first), the teacher's layers that stay. up: likewise for each kept up
    block, which are the teacher's last ones. mid: whole, none, or its first residual block alone. depth_*: transformer
    blocks of each attention, the teacher's first ones; None keeps all of them. shares: of inner widths and heads.
    """

    levels: int
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: Literal["whole", "none", "resnet"] = "whole"
    depth_down: Depths | None = None
    depth_mid: int | None = None
    depth_up: Depths | None = None
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True)
class Share:
    """How much of the interior of a residual block and its attention stays; `layer` is `down_blocks.0.1` or the like.

    inner: width between the two convolutions over the block's own. *_heads: of the attention heads.
    """

    layer: str
    inner: float
    self_heads: float = 1.0
    cross_heads: float = 1.0


def _hybrid_shares() -> tuple[Share, ...]:
    # config of hybrid-sd-v1-4-lcm-224m: block_mid_channels over the block widths, block_selfattn_heads over 8
    places = ["down_blocks.0.0", "down_blocks.1.0", "down_blocks.2.0"]
    places += [f"up_blocks.{block}.{layer}" for block in range(3) for layer in range(2)]
    outer = (320, 640, 1280, 1280, 1280, 640, 640, 320, 320)
    inner = (256, 480, 960, 320, 320, 160, 160, 96, 256)
    heads = (8, 4, 6, 6, 8, 8, 4, 8, 8)
    return tuple(Share(p, i / o, h / 8) for p, i, o, h in zip(places, inner, outer, heads, strict=True))


_FIRST, _ENDS = (0,), (0, 2)
_BK = {"levels": 4, "down": (_FIRST,) * 4, "up": (_ENDS,) * 4}
_BK_TINY: dict[str, Any] = {"levels": 4, "down": (_FIRST,) * 3, "up": (_ENDS,) * 3, "mid": "none"}
_KOALA: dict[str, Any] = {"levels": 3, "down": (_FIRST,) * 3, "up": (_ENDS,) * 3}
_SEGMIND: dict[str, Any] = {"levels": 3, "down": ((0, 1),) * 3, "up": ((0, 1, 2),) * 3, "mid": "resnet"}

LAYOUTS: Mapping[str, Layout] = {
    "bk-base": Layout(**_BK),  # type: ignore[arg-type]
    "bk-small": Layout(**_BK, mid="none"),  # type: ignore[arg-type]
    "bk-tiny": Layout(**_BK_TINY),
    "hybrid-224m": Layout(**_BK_TINY, shares=_hybrid_shares()),
    "koala-1b": Layout(**_KOALA, depth_down=((0,), (2,), (6,)), depth_mid=6, depth_up=((6, 6), (2, 2), (0, 0))),
    "koala-700m": Layout(**_KOALA, mid="none", depth_down=((0,), (2,), (5,)), depth_up=((5, 5), (2, 2), (0, 0))),
    "ssd-1b": Layout(**_SEGMIND, depth_down=((0, 0), (2, 2), (4, 4)), depth_up=((4, 4, 10), (2, 1, 1), (0, 0, 0))),
    "vega": Layout(**_SEGMIND, depth_down=((0, 0), (1, 1), (2, 2)), depth_up=((2, 2, 2), (1, 1, 1), (0, 0, 0))),
}


def find_layout(name: str) -> Layout:
    """Raises ConfigError, with the nearest name."""
    if name not in LAYOUTS:
        raise ConfigError(unknown("layout", name, LAYOUTS))
    return LAYOUTS[name]


@dataclass(frozen=True)
class Shape:
    """Transformer blocks per layer of the down, mid and up blocks; 0 for a layer without attention."""

    down: Depths
    mid: int
    up: Depths


def shape_of(config: Config) -> Shape:
    """How diffusers builds the U-Net of `config`.

    Raises:
        ConfigError: layers per block differ between blocks: no published layout is defined on such a teacher.
    """
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        raise ConfigError(
            f"layers_per_block is {layers}; layouts are defined on U-Nets with the same number everywhere"
        )
    levels = len(config["block_out_channels"])
    down = _listed(config.get("transformer_layers_per_block", 1), levels)
    up = config.get("reverse_transformer_layers_per_block") or list(reversed(down))
    mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    return Shape(
        _depths(down, config["down_block_types"], layers),
        _listed(down[-1], 1)[0] if mid else 0,
        _depths(up, config["up_block_types"], layers + 1),
    )


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _depths(values: Sequence[Any], kinds: Sequence[str], layers: int) -> Depths:
    return tuple(
        tuple(_listed(value, layers)) if "CrossAttn" in kind else (0,) * layers
        for value, kind in zip(values, kinds, strict=True)
    )


def student_config(layout: Layout, teacher: Config) -> dict[str, Any]:
    """The diffusers config of `layout` on a teacher; inner widths and heads are not in it (`models.reduced.widths`).

    Raises:
        ConfigError: the teacher has other levels or layers, or is shallower than the layout.
    """
    wanted = _wanted(layout, _fitting(layout, teacher))
    count = len(layout.down)
    config = {key: value for key, value in teacher.items() if key != "reverse_transformer_layers_per_block"}
    for key in _PER_LEVEL:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = list(config[key])[:count]
    config.update(
        block_out_channels=list(teacher["block_out_channels"])[:count],
        down_block_types=list(teacher["down_block_types"])[:count],
        up_block_types=list(teacher["up_block_types"])[-len(layout.up) :],
        layers_per_block=len(layout.down[0]),
        mid_block_type={"none": None, "resnet": "UNetMidBlock2D"}.get(
            layout.mid, teacher.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        ),
    )
    made = {**config, **_depth_keys(wanted)}
    if shape_of(made) != wanted:
        raise ConfigError(f"no config of diffusers has the depths {wanted}")
    return made


def layout_widths(layout: Layout, config: Config) -> Widths:
    """Inner widths and heads of `layout` on a student's `config`: its shares of that student's widths.

    Widths are rounded up to a multiple of the norm groups, head counts to the nearest; a whole layer is not named.
    """
    inner, heads = {}, {}
    for share in layout.shares:
        block, layer = share.layer.rsplit(".", 1)
        outer, count = outer_sizes(config, block)
        width = _ceil(outer * share.inner, int(config.get("norm_num_groups") or 32))
        if width < outer:
            inner[f"{block}.resnets.{layer}"] = width
        for name, part in (("attn1", share.self_heads), ("attn2", share.cross_heads)):
            kept = max(1, round(count * part))
            if kept < count:
                heads[f"{block}.attentions.{layer}.transformer_blocks.0.{name}"] = kept
    return Widths(inner, heads)


def outer_sizes(config: Config, block: str) -> tuple[int, int]:
    """Channels and attention heads of `down_blocks.N` or `up_blocks.N`."""
    side, _, index = block.partition(".")
    widths = list(config["block_out_channels"])
    heads = _listed(config.get("num_attention_heads") or config.get("attention_head_dim", 8), len(widths))
    place = int(index) if side == "down_blocks" else -1 - int(index)
    return int(widths[place]), int(heads[place])


def _ceil(value: float, step: int) -> int:
    return math.ceil(round(value / step, 6)) * step


def weight_map(layout: Layout, teacher: Config, names: Sequence[str]) -> dict[str, str]:
    """{student's tensor: teacher's tensor} for the tensors `names` of the student."""
    shift = len(teacher["up_block_types"]) - len(layout.up)
    return {name: teacher_name(layout, name, shift) for name in names}


def teacher_name(layout: Layout, name: str, shift: int) -> str:
    """Where a student's tensor comes from; `shift` is how many of the teacher's first up blocks are gone."""
    match = _LAYER.match(name)
    if match is None:
        return name
    side, block, kind, layer, rest = match.groups()
    kept = (layout.down if side == "down" else layout.up)[int(block)]
    place = f"{side}_blocks.{int(block) + (shift if side == 'up' else 0)}"
    return f"{place}.{rest}" if kind is None else f"{place}.{kind}.{kept[int(layer)]}.{rest}"


def _fitting(layout: Layout, teacher: Config) -> Shape:
    shape = shape_of(teacher)
    levels, layers = len(shape.down), len(shape.down[0])
    if levels != layout.levels:
        raise ConfigError(f"the teacher has {levels} down blocks; this layout is made of one with {layout.levels}")
    if layers != 2:
        raise ConfigError(f"the teacher has {layers} layers a block; this layout is made of one with 2")
    if layout.mid != "none" and teacher.get("mid_block_type", "") is None:
        raise ConfigError("the teacher has no mid block; this layout keeps it. Choose bk-small, bk-tiny or koala-700m")
    return shape


def _wanted(layout: Layout, shape: Shape) -> Shape:
    """Depths of the student; refuses a layout that is deeper than its teacher."""
    shift = len(shape.up) - len(layout.up)
    given = Shape(_kept(shape.down, layout.down), shape.mid, _kept(shape.up[shift:], layout.up))
    mid = {"whole": shape.mid if layout.depth_mid is None else layout.depth_mid}.get(layout.mid, 0)
    wanted = Shape(layout.depth_down or given.down, mid, layout.depth_up or given.up)
    for side in ("down", "up"):
        for block, pair in enumerate(zip(getattr(wanted, side), getattr(given, side), strict=True)):
            if any(bool(w) != bool(g) or w > g for w, g in zip(*pair, strict=True)):
                raise ConfigError(
                    f"{side} block {block} of this layout has {pair[0]} transformer layers, the teacher {pair[1]}"
                )
    if wanted.mid > given.mid:
        raise ConfigError(f"the mid block of this layout has {wanted.mid} transformer layers, the teacher {given.mid}")
    return wanted


def _kept(depths: Depths, kept: tuple[tuple[int, ...], ...]) -> Depths:
    return tuple(tuple(block[layer] for layer in layers) for block, layers in zip(depths, kept, strict=False))


def _depth_keys(shape: Shape) -> dict[str, Any]:
    down = [_shortest(block) for block in shape.down]
    up = [_shortest(block) for block in shape.up]
    if shape.mid and not any(shape.down[-1]):
        down[-1] = shape.mid  # diffusers reads the mid block's depth there
    keys: dict[str, Any] = {"transformer_layers_per_block": down}
    if any(isinstance(value, list) for value in (*down, *up)) or up != down[::-1]:
        keys["reverse_transformer_layers_per_block"] = up
    return keys


def _shortest(block: Sequence[int]) -> Any:
    """How many transformer blocks the layers of a block have, as configs spell it: one number if all are equal (3, 3 ->
    3). A layer without attention counts 1, which diffusers never reads."""
    values = [value or 1 for value in block]
    return values[0] if len(set(values)) == 1 else values
