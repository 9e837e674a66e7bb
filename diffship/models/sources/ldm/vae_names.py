"""Tensor names of the auto-encoder in LDM checkpoints, and what diffusers calls the same tensors.

LDM counts the decoder's levels from the picture's side, diffusers from the latents' side. LDM's attention in the middle
has 1x1 convolutions where diffusers has linear layers. Source: CompVis/latent-diffusion, `model.py` (Encoder, Decoder).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffship.core.pieces import Piece

_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|(downsample|upsample))\.(.+)\Z")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d+)\.(.+)\Z")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PLAIN = re.compile(r"((en|de)coder\.conv_(in|out)|(post_)?quant_conv)\.(weight|bias)\Z")
_NORM = re.compile(r"((?:en|de)coder)\.norm_out\.(weight|bias)\Z")


def is_ldm_vae(names: Iterable[str]) -> bool:
    """Whether these are the names of LDM's auto-encoder, without its prefix."""
    return "decoder.up.0.block.0.conv1.weight" in names


def diffusers_vae_pieces(names: Iterable[str]) -> dict[str, Piece]:
    """{name in diffusers: piece of the tensor in LDM}; names that LDM does not have are left out.

    `names` are without the prefix of the network (`first_stage_model.`).
    """
    known = list(names)
    levels = [int(found[2]) for name in known if (found := _LEVEL.match(name)) and found[1] == "decoder.up"]
    last = max(levels, default=0)
    pairs = ((_new_name(name, last), name) for name in known)
    return {new: Piece(old, matrix=_is_linear(new)) for new, old in pairs if new is not None}


def _new_name(name: str, last: int) -> str | None:
    if _PLAIN.match(name):
        return name
    if found := _NORM.match(name):
        return f"{found[1]}.conv_norm_out.{found[2]}"
    if found := _MIDDLE.match(name):
        return _middle(found)
    found = _LEVEL.match(name)
    if found is None:
        return None
    side, number, resnet, sampler, rest = found.groups()
    path = f"encoder.down_blocks.{number}" if side == "encoder.down" else f"decoder.up_blocks.{last - int(number)}"
    if sampler is not None:
        return f"{path}.{sampler}rs.0.{rest}"
    return f"{path}.resnets.{resnet}.{rest.replace('nin_shortcut', 'conv_shortcut')}"


def _middle(found: re.Match[str]) -> str | None:
    side, kind, number, rest = found.groups()
    if kind == "block":
        return f"{side}.mid_block.resnets.{int(number) - 1}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
    layer, _, leaf = rest.rpartition(".")
    return f"{side}.mid_block.attentions.{int(number) - 1}.{_ATTENTION[layer]}.{leaf}" if layer in _ATTENTION else None


def _is_linear(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight") and "norm" not in name
