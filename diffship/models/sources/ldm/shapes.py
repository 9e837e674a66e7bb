"""Configs of networks from the names and shapes of their tensors, which go by diffusers' names here.

What shapes do not tell (how many heads a width is divided into, say) comes from the published architecture of equal
shapes, or, if there is none, from the rule that all published ones of that kind keep.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.weights import Weights
from diffship.models.sources import arch_configs as known

Config = dict[str, Any]
_HEAD = 64  # values a head has in SD 2, SDXL and CLIP; SD 1 has eight heads at every width
_SD1_HEADS = 8
_UNTOLD = ("scaling_factor", "shift_factor", "force_upcast")  # of an auto-encoder, by no shape


def unet_config(weights: Weights, prediction: str) -> Config:
    """The config of the U-Net that has these tensors. prediction: decides between two of equal shapes (SD 2).

    Raises:
        SourceError: tensors that every U-Net has are missing.
        UnsupportedError: it is built as no UNet2DConditionModel is that is run here.
    """
    found = _unet(weights)
    varied: Config = {key: found.pop(key) for key in ("in_channels", "time_cond_proj_dim") if key in found}
    names = [name for name, config in known.UNETS.items() if _fixed(config) == _fixed(found)]
    fitting = [name for name in names if known.SCHEDULERS.get(name, {}).get("prediction_type") == prediction]
    name = next(iter([*fitting, *names]), None)
    config = dict(known.UNETS[name]) if name else {**_unet_rules(found), **found}
    config.pop("time_cond_proj_dim", None)
    return {**config, **varied}


def vae_config(weights: Weights, facts: Mapping[str, Any]) -> Config:
    """The config of the KL auto-encoder that has these tensors. facts: what no tensor tells (`scaling_factor`), as the
    model has it that draws with it; if they are empty, the config does not say it either.

    Raises:
        SourceError: tensors that every auto-encoder has are missing.
    """
    names, levels = weights.names(), _count(weights.names(), "encoder.down_blocks")
    found = {
        "block_out_channels": [
            _shape(weights, f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)
        ],
        "layers_per_block": _count(names, "encoder.down_blocks.0.resnets"),
        "latent_channels": _shape(weights, "decoder.conv_in.weight")[1],
        "in_channels": _shape(weights, "encoder.conv_in.weight")[1],
        "out_channels": _shape(weights, "decoder.conv_out.weight")[0],
        **{f"use_{name}": f"{name}.weight" in names for name in ("quant_conv", "post_quant_conv")},
    }
    alike = [config for config in known.VAES.values() if {key: config.get(key, True) for key in found} == found]
    published = [config for config in alike if config.get("scaling_factor") == facts.get("scaling_factor")]
    if published:
        return dict(published[0])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    base = alike[0] if alike else {**known.VAES["sd15"], **blocks, **found}
    return {**{key: value for key, value in base.items() if key not in _UNTOLD}, **facts}


def clip_config(weights: Weights, act: str) -> Config:
    """The config of the CLIP text encoder that has these tensors. act: `quick_gelu` of OpenAI's or `gelu` of OpenCLIP,
    if no published encoder has these shapes.

    Raises:
        SourceError: tensors that every text encoder has are missing.
    """
    vocabulary, width = _shape(weights, "text_model.embeddings.token_embedding.weight")
    found = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": _count(weights.names(), "text_model.encoder.layers"),
        "intermediate_size": _shape(weights, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": _shape(weights, "text_model.embeddings.position_embedding.weight")[0],
    }
    clips = [config for texts in known.TEXTS.values() for _, config in texts.values()]
    alike = [config for config in clips if {key: config.get(key) for key in found} == found]
    rules = {"num_attention_heads": _heads(width), "hidden_act": act, "projection_dim": width} if not alike else {}
    return {**(alike or clips)[0], **rules, **found, **_projection(weights)}


def published_layers(width: int) -> int | None:
    """How many layers the published CLIP text encoder of this width runs; None if there is none."""
    clips = (config for texts in known.TEXTS.values() for _, config in texts.values() if "hidden_act" in config)
    return next((int(config["num_hidden_layers"]) for config in clips if config["hidden_size"] == width), None)


def _projection(weights: Weights) -> Config:
    name = "text_projection.weight"
    return {"projection_dim": _shape(weights, name)[0]} if name in weights.names() else {}


# ---- the U-Net


def _unet(weights: Weights) -> Config:
    """What names and shapes say, as keys of a config."""
    names = frozenset(weights.names())
    levels = _count(names, "down_blocks")
    widths = [_shape(weights, f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)]
    down = [_depths(names, f"down_blocks.{level}") for level in range(levels)]
    up = [_depths(names, f"up_blocks.{level}") for level in range(levels)]
    middle = _depths(names, "mid_block")
    layers = [_count(names, f"down_blocks.{level}.resnets") for level in range(levels)]
    upper = [_count(names, f"up_blocks.{level}.resnets") - 1 for level in range(levels)]
    if not levels or len({*layers, *upper}) != 1:
        raise UnsupportedError(f"the U-Net has levels of {layers} layers down and {upper} up; all must have as many")
    attention = next((name for name in sorted(names) if name.endswith("attn2.to_k.weight")), None)
    if attention is None:
        raise UnsupportedError("the U-Net has no attention to the text: it does not draw from a prompt")
    entry = next(name for name in sorted(names) if name.endswith(".proj_in.weight"))
    found: Config = {
        "block_out_channels": widths,
        "layers_per_block": layers[0],
        "cross_attention_dim": _context(weights, names),
        "use_linear_projection": len(_shape(weights, entry)) == 2,
        "in_channels": _shape(weights, "conv_in.weight")[1],
        "out_channels": _shape(weights, "conv_out.weight")[0],
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in down],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in up],
        "mid_block_type": _middle_type(names, middle),
        **_transformer_layers(down, up, middle),
        **_added(weights, names),
    }
    if "time_embedding.cond_proj.weight" in names:
        found["time_cond_proj_dim"] = _shape(weights, "time_embedding.cond_proj.weight")[1]
    return found


def _context(weights: Weights, names: Iterable[str]) -> int:
    """The width of the text that every layer takes. Raises SourceError if layers differ: two families in one file."""
    widths = {weights.meta(name).shape[-1] for name in names if name.endswith("attn2.to_k.weight")}
    if len(widths) != 1:
        raise SourceError(f"layers of the U-Net take text {sorted(widths)} wide: tensors of two families are mixed")
    return widths.pop()


def _depths(names: Iterable[str], block: str) -> list[int]:
    """How many transformer blocks each attention layer of a block has."""
    attentions = _numbers(names, f"{block}.attentions")
    return [_count(names, f"{block}.attentions.{number}.transformer_blocks") for number in sorted(attentions)]


def _middle_type(names: Iterable[str], middle: list[int]) -> str | None:
    if middle:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(name.startswith("mid_block.") for name in names) else None


def _transformer_layers(down: list[list[int]], up: list[list[int]], middle: list[int]) -> Config:
    """`transformer_layers_per_block`, and its reverse if the way up is not as deep as the way down."""
    last = middle[0] if middle else 1
    lower = [_depth(one) if one else (last if level == len(down) - 1 else 1) for level, one in enumerate(down)]
    upper = [_depth(one) if one else lower[-1 - level] for level, one in enumerate(up)]
    if upper == lower[::-1]:
        return {"transformer_layers_per_block": lower}
    return {"transformer_layers_per_block": lower, "reverse_transformer_layers_per_block": upper}


def _depth(depths: list[int]) -> int | list[int]:
    return depths[0] if len(set(depths)) == 1 else depths


def _added(weights: Weights, names: Iterable[str]) -> Config:
    """SDXL's pooled text and sizes. Raises UnsupportedError for other conditions (unCLIP, upscalers)."""
    if "add_embedding.linear_1.weight" not in names:
        return {}
    width = _shape(weights, "add_embedding.linear_1.weight")[1]
    for config in known.UNETS.values():
        if config.get("projection_class_embeddings_input_dim") == width:
            keys = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
            return {key: config[key] for key in keys}
    raise UnsupportedError(f"the U-Net takes {width} values beside the text, which neither SDXL nor its refiner does")


def _unet_rules(found: Mapping[str, Any]) -> Config:
    """What no tensor says: all published U-Nets have it so."""
    base = known.UNETS["sdxl" if "addition_embed_type" in found else "sd21-base"]
    widths = found["block_out_channels"]
    linear = found["use_linear_projection"]
    heads = [_heads(width) for width in widths] if linear else _SD1_HEADS
    rest = {key: base[key] for key in base if key not in ("transformer_layers_per_block", "upcast_attention")}
    return {**rest, "attention_head_dim": heads}


def _heads(width: int) -> int:
    if width % _HEAD:
        raise UnsupportedError(f"no published network is {width} wide, and its heads of {_HEAD} values do not fill it")
    return width // _HEAD


def _fixed(config: Mapping[str, Any]) -> Config:
    """Those keys that shapes tell, in one form."""
    levels = len(config["block_out_channels"])
    depth = config.get("transformer_layers_per_block", 1)
    depths = list(depth) if isinstance(depth, (list, tuple)) else [depth] * levels
    cross = ["Cross" in name for name in config["down_block_types"]]
    return {
        **{key: config[key] for key in ("block_out_channels", "layers_per_block", "cross_attention_dim")},
        **{key: config[key] for key in ("out_channels", "down_block_types", "up_block_types")},
        "use_linear_projection": config.get("use_linear_projection", False),
        "mid_block_type": config.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
        "depths": [one if attends else None for one, attends in zip(depths, cross, strict=True)] + depths[-1:],
        "reverse": config.get("reverse_transformer_layers_per_block"),
        "added": config.get("projection_class_embeddings_input_dim"),
    }


# ---- names


def _count(names: Iterable[str], path: str) -> int:
    """How many entries the list at `path` has. Raises SourceError if one in between is missing."""
    numbers = _numbers(names, path)
    if numbers != set(range(len(numbers))):
        raise SourceError(f"{path} has the entries {sorted(numbers)}; some in between are missing")
    return len(numbers)


def _numbers(names: Iterable[str], path: str) -> set[int]:
    return set(_found(names, re.compile(rf"{re.escape(path)}\.(\d+)\.")))


def _found(names: Iterable[str], pattern: re.Pattern[str]) -> Iterator[int]:
    for name in names:
        if found := pattern.match(name):
            yield int(found[1])


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    return weights.meta(name).shape
