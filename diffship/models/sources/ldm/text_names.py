"""Tensor names of text encoders in checkpoints of one file, and what transformers calls the same tensors.

CLIP as transformers has it lies there under a prefix. OpenCLIP has names of its own, one matrix for the projections of
query, key and value, and a projection of the pooled text that is multiplied from the other side.
Source: mlfoundations/open_clip, `transformer.py` (ResidualAttentionBlock, TextTransformer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from diffship.core.pieces import Piece
from diffship.models.parts.clip_names import classic_map

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\Z")
_OUTSIDE = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_FUSED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}
PROJECTION = "text_projection.weight"


def is_open_clip(names: Iterable[str]) -> bool:
    """Whether these are the names of OpenCLIP's text encoder, without its prefix."""
    return "transformer.resblocks.0.attn.in_proj_weight" in names


def clip_pieces(names: Iterable[str]) -> dict[str, Piece]:
    """{classic name: piece} of an encoder that goes by transformers' names, with or without `text_model.`."""
    plain = ("text_model.", "text_projection.", "embeddings.", "encoder.", "final_layer_norm.")
    return {new: Piece(old) for new, old in classic_map(n for n in names if n.startswith(plain)).items()}


def open_clip_pieces(names: Iterable[str]) -> dict[str, Piece]:
    """{classic name: piece of the tensor in OpenCLIP}; names that it does not have are left out."""
    made: dict[str, Piece] = {}
    for name in names:
        made.update(_pieces(name))
    return made


def open_clip_layers(names: Iterable[str]) -> int:
    """How many layers OpenCLIP's encoder has."""
    return max((int(found[1]) + 1 for name in names if (found := _BLOCK.match(name))), default=0)


def _pieces(name: str) -> Iterator[tuple[str, Piece]]:
    if name in _OUTSIDE:
        yield _OUTSIDE[name], Piece(name)
    elif name == "text_projection":
        yield PROJECTION, Piece(name, turned=True)
    elif name == PROJECTION:  # some tools store the linear layer
        yield PROJECTION, Piece(name)
    elif found := _BLOCK.match(name):
        layer, rest = f"text_model.encoder.layers.{found[1]}", found[2]
        stem, _, leaf = rest.rpartition(".")
        if rest in _FUSED:
            for share, letter in enumerate("qkv"):
                yield f"{layer}.self_attn.{letter}_proj.{_FUSED[rest]}", Piece(name, share, 3)
        elif stem in _INSIDE:
            yield f"{layer}.{_INSIDE[stem]}.{leaf}", Piece(name)
