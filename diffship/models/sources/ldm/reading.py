"""The parts of a checkpoint in one file, as modules of diffusers: names by `*_names`, configs by `shapes`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffship.core.errors import SourceError
from diffship.core.pieces import Piece, Pieced
from diffship.models.parts.autoencoder import KL
from diffship.models.parts.clip import PLAIN, PROJECTED
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.pipeline import Module
from diffship.models.sources.ldm import shapes
from diffship.models.sources.ldm.checkpoint import Checkpoint
from diffship.models.sources.ldm.text_names import (
    PROJECTION,
    clip_pieces,
    is_open_clip,
    open_clip_layers,
    open_clip_pieces,
)
from diffship.models.sources.ldm.unet_names import diffusers_unet_names, is_ldm_unet
from diffship.models.sources.ldm.vae_names import diffusers_vae_pieces, is_ldm_vae
from diffship.models.sources.tokenizer_files import clip_files
from diffship.sampling.tokenizer import END

UNET_PREFIX, VAE_PREFIXES = "model.diffusion_model.", ("first_stage_model.", "vae.")
_LDM_TOPS = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.")
_VAE_TOPS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_LAYER = "text_model.encoder.layers."
_TRAINING = ("loss.", "model_ema.")  # of the auto-encoder, beside its two halves
_LEAST_WORDS = 514  # bytes twice, and the two marks


def find_unet(checkpoint: Checkpoint) -> Pieced | None:
    """The U-Net's tensors by diffusers' names; None if the file has no U-Net of LDM's or diffusers' names.

    Raises:
        SourceError: averaged weights are asked for, and the file has none.
        UnsupportedError: it has tensors that no U-Net of that kind has.
    """
    for prefix in (UNET_PREFIX, ""):  # tools that keep the U-Net alone leave the prefix out
        local = checkpoint.under(prefix)
        if is_ldm_unet(local):
            local = local if prefix else _beginning(local, _LDM_TOPS)
            local = checkpoint.averaged(local, "diffusion_model") if checkpoint.loading.ema else local
            return checkpoint.pieced(local, _ldm_unet, "U-Net")
        if {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= set(local):
            return checkpoint.pieced(local, _as_named, "U-Net")
    return None


def unet_module(weights: Pieced, prediction: str) -> Module:
    """The U-Net with the config that its shapes tell.

    Raises:
        SourceError, UnsupportedError: they tell none.
    """
    return Module(UNET, {**shapes.unet_config(weights, prediction), "_class_name": UNET}, weights)


def find_vae(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Module | None:
    """The KL auto-encoder; None if the file has none. facts: what no tensor tells of it (`Kind.vae_facts`).

    Raises:
        SourceError, UnsupportedError: it has tensors that no KL auto-encoder has, or lacks some that all have.
    """
    for prefix in (*VAE_PREFIXES, ""):
        local = {name: stored for name, stored in checkpoint.under(prefix).items() if not name.startswith(_TRAINING)}
        local = local if prefix else _beginning(local, _VAE_TOPS)
        if is_ldm_vae(local):
            weights = checkpoint.pieced(local, diffusers_vae_pieces, "VAE")
        elif {"decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"} <= set(local):
            weights = checkpoint.pieced(local, _as_named, "VAE")
        else:
            continue
        return Module(KL, {**shapes.vae_config(weights, facts), "_class_name": KL}, weights)
    return None


def find_text(checkpoint: Checkpoint, prefix: str, projected: bool, penultimate: bool) -> Module | None:
    """The CLIP text encoder below `prefix`, in transformers' or OpenCLIP's names; None if there is none.

    projected: with its projection of the pooled text. penultimate: OpenCLIP's last layer is left out, because the model
    reads the states before it (SD 2).

    Raises:
        SourceError, UnsupportedError: it has tensors that no CLIP text encoder has, or lacks some that all have.
    """
    local, open_clip = checkpoint.under(f"{prefix}model."), True
    if not is_open_clip(local):
        local, open_clip = checkpoint.under(f"{prefix}transformer."), False
    if not any(name.endswith("token_embedding.weight") for name in local):
        return None
    weights = checkpoint.pieced(local, open_clip_pieces if open_clip else clip_pieces, "text encoder")
    kept = _kept(weights, open_clip_layers(local) if open_clip and penultimate else None, projected)
    if projected and PROJECTION not in kept:
        raise SourceError(f"{checkpoint.path}: its text encoder {prefix!r} has no projection of the pooled text")
    weights = Pieced(checkpoint.weights, kept)
    config = shapes.clip_config(weights, "gelu" if open_clip else "quick_gelu")
    class_name = PROJECTED if projected else PLAIN
    return Module(class_name, {**config, "architectures": [class_name]}, weights)


def tokenizer_of(module: Module, where: str) -> dict[str, bytes]:
    """The files of the tokenizer that every published model with this text encoder has: CLIP's, padded with its end
    token by OpenAI's encoder and with "!" by OpenCLIP's.

    Raises:
        SourceError: the encoder has a vocabulary of its own.
    """
    size = int(module.config["vocab_size"])
    if size < _LEAST_WORDS:
        raise SourceError(f"{where}: a text encoder has {size} tokens, which is not CLIP's vocabulary")
    return clip_files(size, END if module.config["hidden_act"] == "quick_gelu" else "!")


def _beginning(local: Mapping[str, str], tops: tuple[str, ...]) -> dict[str, str]:
    return {name: stored for name, stored in local.items() if name.startswith(tops)}


def _ldm_unet(names: Iterable[str]) -> dict[str, Piece]:
    return {new: Piece(old) for new, old in diffusers_unet_names(names).items()}


def _as_named(names: Iterable[str]) -> dict[str, Piece]:
    return {name: Piece(name) for name in names}


def _kept(weights: Pieced, fused_layers: int | None, projected: bool) -> dict[str, Piece]:
    """The pieces of an encoder that are run. `fused_layers`: how many there are, if the last one is never run."""
    width = weights.meta("text_model.embeddings.token_embedding.weight").shape[1]
    layers = None if fused_layers is None else min(fused_layers, shapes.published_layers(width) or fused_layers - 1)
    return {
        name: piece
        for name, piece in weights.pieces.items()
        if (name != PROJECTION or projected) and not _beyond(name, layers)
    }


def _beyond(name: str, layers: int | None) -> bool:
    return layers is not None and name.startswith(_LAYER) and int(name.removeprefix(_LAYER).split(".")[0]) >= layers
