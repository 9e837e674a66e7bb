"""Reading a model from one file of tensors: safetensors or GGUF, with names of LDM or of diffusers. A kind knows which
tensors are its own (`core.kind.Kind.of_checkpoint`); configs, tokenizers and schedulers of published models are built
in, so that nothing is asked of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.core.errors import SourceError
from diffship.core.gguf_file import GgufWeights, is_gguf
from diffship.core.load_options import LoadOptions
from diffship.core.pieces import Pieced
from diffship.core.registry import kinds
from diffship.core.weights import SafetensorsWeights
from diffship.models.parts.component import SHOWN
from diffship.models.pipeline import Material, Module
from diffship.models.sources.foreign_files import refuse_foreign
from diffship.models.sources.ldm.checkpoint import EMA, Checkpoint
from diffship.models.sources.ldm.reading import UNET_PREFIX, VAE_PREFIXES, find_vae
from diffship.models.sources.licences import terms

SUFFIXES = (".safetensors", ".gguf")
_TEXTS = ("cond_stage_model.", "conditioner.", "text_encoders.")
# what the training of diffusion keeps in its checkpoints, and no network reads
_BUFFERS = frozenset(
    (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "lvlb_weights", "global_step", "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr"),
    )
)


def is_single_file(path: Path) -> bool:
    """Whether `path` is a file whose name says that it holds tensors."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def file_material(path: Path, loading: LoadOptions) -> Material:
    """What a checkpoint in one file holds: a whole model, a denoiser without text encoders, or a VAE alone.

    Raises:
        SourceError: it is damaged, or no checkpoint: a LoRA, say; or it has no averaged weights and they are asked for.
        UnsupportedError: its weights are quantised in a form that is not read, or its networks are not run here.
    """
    _refuse_part(path)
    checkpoint = read_checkpoint(path, loading)
    refuse_foreign(path, checkpoint.weights.names())
    for kind in kinds().values():
        material = kind.of_checkpoint(checkpoint)
        if material is not None:
            return _described(material, checkpoint, _left(checkpoint, material, tuple(kind.file_texts.values())))
    return _described(Material({}, modules=_vae_alone(checkpoint)), checkpoint, [])


def read_checkpoint(path: Path, loading: LoadOptions) -> Checkpoint:
    """The tensors of one file, none read yet.

    Raises:
        SourceError: it is damaged, cut short, or in no form that is read.
        UnsupportedError: a GGUF file with blocks that are not read.
    """
    if is_gguf(path):
        return Checkpoint(path, GgufWeights(path), {}, loading)
    weights = SafetensorsWeights(path)
    return Checkpoint(path, weights, weights.metadata, loading)


def _refuse_part(path: Path) -> None:
    """Raises SourceError for the weights of a component folder, whose config says more than shapes do."""
    if path.stem.split(".")[0] in ("diffusion_pytorch_model", "model") and (path.parent / "config.json").is_file():
        raise SourceError(
            f"{path}: is the weights file of one part, and {path.parent / 'config.json'} says how that is built; pass "
            f"the folder: {path.parent}"
        )


def _vae_alone(checkpoint: Checkpoint) -> Mapping[str, Module]:
    """The VAE of a file without a denoiser. Its scaling factor is that of the model that it will be put into."""
    for kind in kinds().values():
        vae = find_vae(checkpoint, {})
        if vae is not None:
            return {kind.slot_of(kind.decoder).folder: vae}
    shown = ", ".join(checkpoint.weights.names()[:SHOWN])
    raise SourceError(
        f"{checkpoint.path}: its tensors are those of no model that is read here ({shown}, ...). Single "
        "files of Stable Diffusion 1 and 2, SDXL, its refiner, and their inpainting and LCM variants are; of others, "
        "diffusers folders"
    )


def _described(material: Material, checkpoint: Checkpoint, left: list[str]) -> Material:
    notes = [*material.source.get("notes", ())]
    if left:
        first = ", ".join(left[:SHOWN])
        notes.append(f"{len(left)} tensors of {checkpoint.path.name} belong to no part and are not read: {first}")
    if not checkpoint.loading.ema and any(
        name.startswith(f"{EMA}diffusion_model") for name in checkpoint.weights.names()
    ):
        notes.append(f"{checkpoint.path.name} also holds averaged (EMA) weights, which are not read; --ema takes them")
    source: dict[str, Any] = {"id": checkpoint.path.stem, "revision": None, "kind": "file"}
    return replace(
        material, source={**source, **({"notes": notes} if notes else {})}, licence=terms(checkpoint.metadata)
    )


def _left(checkpoint: Checkpoint, material: Material, texts: tuple[str, ...]) -> list[str]:
    """Tensors that no part has. texts: how the names of the kind's text encoders begin.

    Raises:
        SourceError: they are a text encoder of another family.
    """
    weights = [module.weights for module in material.modules.values()]
    read = {piece.name for one in weights if isinstance(one, Pieced) for piece in one.pieces.values()}
    known = (UNET_PREFIX, *VAE_PREFIXES, *texts, EMA)
    names = [name for name in checkpoint.weights.names() if name not in read and name not in _BUFFERS]
    left = [name for name in names if not name.startswith(known) and not name.endswith("logit_scale")]
    foreign = [name for name in left if name.startswith(_TEXTS)]
    if foreign:
        raise SourceError(
            f"{checkpoint.path}: its U-Net is of one family and its text encoder of another: {len(foreign)} tensors "
            f"such as {foreign[0]!r} belong to no part of it"
        )
    return left
