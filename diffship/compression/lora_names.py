"""Whose tensor a key of a LoRA file belongs to: kohya's, diffusers' and peft's ways of writing it.

A LoRA changes the weight `W` of one layer by `scale * (alpha / rank) * up @ down` (Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffship.compression.lora_scale import PEFT, TEXT_LEVEL

# kohya's prefix -> part; `lora_te1` and `lora_te2` where a pipeline has two text encoders
_KOHYA = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
_PARTS = ("unet", "text_encoder_2", "text_encoder")
# What ComfyUI and OneTrainer write before the dotted names, of diffusers or of the original checkpoints.
_DOTTED = {
    **{f"{prefix}.": part for prefix, part in _KOHYA.items()},
    **dict.fromkeys(("model.diffusion_model.", "diffusion_model."), "unet"),
    **dict.fromkeys(("text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l."), "text_encoder"),
    **dict.fromkeys(("text_encoders.clip_g.transformer.", "clip_g.transformer.", "clip_g."), "text_encoder_2"),
}
_ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
_OLD_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight\Z")
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.weight\Z")  # peft keeps the adapter's name: lora_A.default.weight


@dataclass(frozen=True)
class Place:
    """A layer (`part`, name of its weight's module) and what the tensor is to it: `down`, `up` or `alpha`."""

    part: str
    layer: str
    role: str


class Names:
    """Finds places among the tensors of a pipeline: `weights` maps a part to the names of its tensors."""

    def __init__(self, weights: Mapping[str, Iterable[str]], unet_config: Mapping[str, Any]) -> None:
        self._layers = {part: set(_layers(names)) for part, names in weights.items()}
        self._kohya = {
            part: {layer.replace(".", "_"): layer for layer in layers} for part, layers in self._layers.items()
        }
        for part, layers in self._layers.items():  # transformers 5 leaves this level out, and diffusers writes so
            self._kohya[part] |= {
                layer.removeprefix(TEXT_LEVEL).replace(".", "_"): layer
                for layer in layers
                if layer.startswith(TEXT_LEVEL)
            }
        if "unet" in self._kohya:
            self._kohya["unet"] |= original_names(self._layers["unet"], unet_config)

    def find(self, key: str) -> Place | None:
        """The place of `key`, or None if no layer of this pipeline has that name, or several parts have it."""
        return self._of_kohya(key) or self._of_dotted(key) or self._of_original(key)

    def parts_of(self, key: str) -> dict[str, Place]:
        """The place of `key` in each part that has such a layer, for a key that names no part."""
        whole = _split(key.removeprefix(PEFT))
        if whole is None:
            return {}
        layer, role = whole
        return {part: Place(part, name, role) for part, name in self._owners(layer)}

    def of_a_layer(self, key: str) -> bool:
        """Whether `key` begins with the name of a layer, whatever it is to it."""
        words = key.removeprefix(PEFT).split(".")
        starts = (".".join(words[:end]) for end in range(1, len(words)))
        return self._kohya_layer(key.partition(".")[0]) is not None or any(self._known(start, "") for start in starts)

    def _of_kohya(self, key: str) -> Place | None:
        stem, _, suffix = key.partition(".")
        role, found = _ROLES.get(suffix), self._kohya_layer(stem)
        return Place(*found, role) if role and found else None

    def _kohya_layer(self, stem: str) -> tuple[str, str] | None:
        """(part, layer) of kohya's name of a layer."""
        for prefix, part in _KOHYA.items():
            layer = self._kohya.get(part, {}).get(stem.removeprefix(f"{prefix}_"))
            if stem.startswith(f"{prefix}_") and layer is not None:
                return part, layer
        return None

    def _of_dotted(self, key: str) -> Place | None:
        key = _ADAPTER.sub(r".\1.weight", key.removeprefix(PEFT))
        old = _OLD_PROCESSOR.match(key)
        if old:
            layer = f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}"
            return self._known(layer, old[3])
        whole = _split(key)
        return None if whole is None else self._known(*whole)

    def _of_original(self, key: str) -> Place | None:
        whole = _split(key)
        prefix = next((prefix for prefix in _DOTTED if key.startswith(prefix)), None)
        if whole is None or prefix is None:
            return None
        part = _DOTTED[prefix]
        layer = self._kohya.get(part, {}).get(whole[0].removeprefix(prefix).replace(".", "_"))
        return None if layer is None else Place(part, layer, whole[1])

    def _known(self, layer: str, role: str) -> Place | None:
        for part in _PARTS:
            if layer.startswith(f"{part}.") and part in self._layers:
                name = layer[len(part) + 1 :].removeprefix(PEFT)
                for candidate in (name, f"{TEXT_LEVEL}{name}"):
                    if candidate in self._layers[part]:
                        return Place(part, candidate, role)
                return None
        # files of one part alone have no prefix; two text encoders share names, so there it cannot be told
        found = list(self._owners(layer))
        return Place(*found[0], role) if len(found) == 1 else None

    def _owners(self, layer: str) -> Iterator[tuple[str, str]]:
        """(part, its name of the layer) of every part that has it."""
        for part, layers in self._layers.items():
            yield from ((part, name) for name in (layer, f"{TEXT_LEVEL}{layer}") if name in layers)


def _split(key: str) -> tuple[str, str] | None:
    """(layer, role) of a dotted key."""
    key = _ADAPTER.sub(r".\1.weight", key)
    for suffix, role in _ROLES.items():
        if key.endswith(f".{suffix}"):
            return key[: -len(suffix) - 1], role
    return None


def naming(keys: Iterable[str]) -> str:
    """What keys that belong to no layer tell of where they come from; empty if they tell nothing."""
    told = (what for key in keys for start, what in _FOREIGN.items() if key.startswith(start))
    return next(told, "")


_FOREIGN = {
    "bundle_emb.": "bundle_emb are textual inversions that OneTrainer packs beside a LoRA: take them out of the file, "
    "or put them into the model first with diffusers (load_textual_inversion, save_pretrained)",
    "transformer.": "it is made for a transformer (SD3, FLUX), not for a U-Net",
    "lora_transformer_": "it is made for a transformer (SD3, FLUX), not for a U-Net",
    "lora_te3": "it is made for a model with three text encoders (SD3)",
    "lora_prior_": "it is made for Stable Cascade",
}


def _layers(names: Iterable[str]) -> Iterator[str]:
    return (name.removesuffix(".weight") for name in names if name.endswith(".weight"))


_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)\Z")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)\Z")


def original_names(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """{name in the original checkpoints, dots as underscores: layer}: kohya's files for SDXL are written with them."""
    count = config.get("layers_per_block", 2)
    if not isinstance(count, int):
        return {}
    found = {}
    for layer in layers:
        original = _original(layer, count, config)
        if original is not None:
            found[original] = layer
    return found


def _original(layer: str, count: int, config: Mapping[str, Any]) -> str | None:
    if layer in _OUTER:
        return _OUTER[layer]
    middle = _MID.match(layer)
    if middle:
        kind, index, rest = middle.groups()
        place = 2 * int(index) if kind == "resnets" else 1
        return f"middle_block_{place}_{_inside(kind, rest)}"
    match = _BLOCK.match(layer)
    if match is None:
        return None
    side, block, kind, index, rest = match.groups()
    return _in_block(side, int(block), kind, int(index), rest, count, config)


def _in_block(side: str, block: int, kind: str, index: int, rest: str, count: int, config: Mapping[str, Any]) -> str:
    if kind == "downsamplers":
        return f"input_blocks_{1 + block * (count + 1) + count}_0_op"
    attends = "CrossAttn" in config["up_block_types"][block] if side == "up" else False
    if kind == "upsamplers":
        return f"output_blocks_{block * (count + 1) + count}_{2 if attends else 1}_conv"
    first = f"input_blocks_{1 + block * (count + 1) + index}" if side == "down" else ""
    first = first or f"output_blocks_{block * (count + 1) + index}"
    return f"{first}_{0 if kind == 'resnets' else 1}_{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest).replace(".", "_") if kind == "resnets" else rest.replace(".", "_")
