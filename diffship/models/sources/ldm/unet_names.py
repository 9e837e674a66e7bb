"""Tensor names of the U-Net in LDM checkpoints, and what diffusers calls the same tensors.

LDM counts `input_blocks` and `output_blocks` through all levels, and the second number is a place in a list of layers.
What a layer is, its own tensors say; a level ends with its down- or upsampler. So the map needs no config.
Source: CompVis/latent-diffusion, `ldm/modules/diffusionmodules/openaimodel.py` (class UNetModel).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",  # of LCM: guidance as an input
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LAYER = re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(\d+)\.(.+)\Z")
RESNETS, ATTENTIONS = "resnets", "attentions"
_DOWN, _UP = "downsamplers.0", "upsamplers.0"
# the first tensor that only such a layer has -> what it is
_SIGNS = {"in_layers.0.weight": RESNETS, "proj_in.weight": ATTENTIONS, "op.weight": _DOWN, "conv.weight": _UP}


@dataclass
class _Level:
    """Where the next layer of one of diffusers' blocks goes."""

    path: str
    resnets: int = 0
    attentions: int = 0
    ended: bool = False


def diffusers_unet_names(names: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: name in LDM} of the tensors of a U-Net; names that LDM does not have are left out.

    `names` are without the prefix of the network (`model.diffusion_model.`).
    """
    known = list(names)
    places = _places(known)
    pairs = ((_new_name(name, places), name) for name in known)
    return {new: old for new, old in pairs if new is not None}


def is_ldm_unet(names: Iterable[str]) -> bool:
    """Whether these are the names of LDM's U-Net, without its prefix."""
    return "input_blocks.0.0.weight" in names


def _new_name(name: str, places: dict[str, str]) -> str | None:
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{leaf}"
    found = _LAYER.match(name)
    place = places.get(f"{found[1]}.{found[2]}") if found else None
    if found is None or place is None:
        return None
    inner = found[3]
    if f".{RESNETS}." in place:
        layer, _, leaf = inner.rpartition(".")
        return f"{place}.{_RESNET[layer]}.{leaf}" if layer in _RESNET else None
    return f"{place}.{'conv.' + leaf if place.endswith((_DOWN, _UP)) else inner}"


def _places(names: list[str]) -> dict[str, str]:
    """{layer of LDM, as `input_blocks.4.1`: path of the same layer in diffusers}."""
    kinds: dict[tuple[str, int, int], str] = {}
    for name in names:
        found = _LAYER.match(name)
        sign = _SIGNS.get(found[3]) if found else None
        if found and sign:
            block, _, number = found[1].partition(".")
            kinds[block, int(number or 0), int(found[2])] = sign
    side = {"input_blocks": "down_blocks", "output_blocks": "up_blocks", "middle_block": "mid_block"}
    made: dict[str, str] = {}
    for block, theirs in side.items():
        ordered = sorted((number, place) for one, number, place in kinds if one == block)
        paths = _paths(theirs, (kinds[block, *key] for key in ordered))
        for (number, place), path in zip(ordered, paths, strict=True):
            made[f"{block}.{place}" if block == "middle_block" else f"{block}.{number}.{place}"] = path
    return made


def _paths(block: str, kinds: Iterable[str]) -> Iterator[str]:
    """The paths of layers in diffusers, in the order in which LDM counts them."""
    whole = block == "mid_block"
    count, level = 0, _Level(block if whole else f"{block}.0")
    for kind in kinds:
        if level.ended:
            count, level = count + 1, _Level(f"{block}.{count + 1}")
        if kind == RESNETS:
            level.resnets += 1
            yield f"{level.path}.{RESNETS}.{level.resnets - 1}"
        elif kind == ATTENTIONS:
            # beside its resnet; in the middle it lies between two of them
            level.attentions = level.attentions + 1 if whole else level.resnets
            yield f"{level.path}.{ATTENTIONS}.{level.attentions - 1}"
        else:
            level.ended = True
            yield f"{level.path}.{kind}"
