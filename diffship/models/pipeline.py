"""Pipeline: the parts of one model with their tokenizers, scheduler and licence, whatever they were read from."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.atomic import sync_folder, sync_tree
from diffship.core.brief import brief
from diffship.core.errors import ConfigError, SourceError
from diffship.core.family import Family
from diffship.core.leftovers import claim_folder, refuse_fixed, remove_leftovers, usual_mode
from diffship.core.weights import Weights, cast
from diffship.models import stock
from diffship.models.families import OWN, family_of, own_facts
from diffship.models.folder import write_folder
from diffship.models.parts.autoencoder import autoencoder, vae_factor
from diffship.models.parts.clip import text_encoder
from diffship.models.parts.component import Component, reading
from diffship.models.parts.unet import check_config, unet
from diffship.models.sources.defaults import completed

if TYPE_CHECKING:
    from diffship.models.model import PipelineModel

TEXT_PARTS = ("text_encoder", "text_encoder_2")
_OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}
SMALLEST_PX = 64  # core.limits: no request is smaller


@brief
@dataclass(frozen=True)
class Module:
    """One entry of a model_index as it was found: class, config and weights."""

    class_name: str
    config: Mapping[str, Any]
    weights: Weights = field(repr=False)


@brief
@dataclass(frozen=True)
class Material:
    """What a source yields before it is a pipeline; parts may still be missing.

    `modules` has the folder names of a diffusers pipeline (`unet`, `vae`, `text_encoder`, `text_encoder_2`),
    `tokenizers` maps `tokenizer` and `tokenizer_2` to {file name: content}.
    """

    source: Mapping[str, Any]
    modules: Mapping[str, Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict, repr=False)
    scheduler: Mapping[str, Any] | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    licence: Mapping[str, Any] = field(default_factory=dict)


@brief
@dataclass(frozen=True)
class Pipeline:
    """A whole model. `components` has canonical part names; nothing in it holds tensors until a part is loaded."""

    family: Family
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, Mapping[str, bytes]] = field(repr=False)
    model_index: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    licence: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Any, ...] = ()

    def save(
        self,
        folder: str | Path,
        dtype: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Path:
        """Write a diffusers folder that stock `from_pretrained` loads; the tensors stream through, one at a time.

        The folder appears whole or not at all. `dtype` (`float16`, `bfloat16`, `float32`) converts float tensors.

        Raises:
            ConfigError: `folder` exists and holds something, or a value does not fit `dtype`.
        """
        target = Path(os.path.realpath(folder))  # a link to an empty folder is that folder
        require_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        with claim_folder(target) as draft:
            write_folder(self, draft, dtype, progress)
            draft.chmod(usual_mode(draft))
            sync_tree(draft)
            _move(draft, target)
        return target

    def model(self, device: str = "cpu", dtype: str | None = None) -> PipelineModel:
        """The pipeline opened on torch, as `sampling.Model`; parts are loaded when they are first used."""
        from diffship.models.model import PipelineModel

        return PipelineModel(self, device, dtype)


def _move(draft: Path, target: Path) -> None:
    try:
        if target.exists():
            target.rmdir()
        draft.rename(target)
        sync_folder(target.parent)
    except OSError as fault:
        if fault.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise ConfigError(f"{target} was written by someone else meanwhile; theirs is kept") from None


def require_place(target: Path) -> None:
    """Raises ConfigError unless a pipeline can be saved at `target`: nothing is there, or an empty folder.

    Folders above it are made later; that the nearest one is a folder, which may be written to, is asked before work.
    """
    target = Path(os.path.realpath(target))
    refuse_fixed(target)
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, so {target} cannot be made; choose another folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{above} may not be written to; choose another folder than {target}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another one or remove it")


def assemble(material: Material) -> Pipeline:
    """A pipeline of complete material.

    Raises:
        SourceError: parts are missing or do not fit each other.
        UnsupportedError: a part is of a class that is not known here.
    """
    missing = missing_parts(material)
    if missing:
        raise SourceError(
            f"{material.source.get('id')}: has no {', '.join(missing)}. Name a model that has: export, compress and "
            "inspect take --base SOURCE (a folder, a hub id, emoji or arch:NAME)"
        )
    kind, material = _as_stock(material)
    modules, scheduler = material.modules, dict(material.scheduler or {})
    text, vae = {name: modules[name] for name in TEXT_PARTS if name in modules}, modules["vae"]
    family = family_of(
        modules["unet"].config,
        vae.class_name,
        vae.config,
        scheduler,
        material.index,
        {name: module.config for name, module in text.items()},
    )
    hidden = family.name != "sd"
    smallest = _smallest(family)
    parts = []
    for name, module in text.items():
        with reading(name, module.class_name):
            parts.append(text_encoder(name, module.class_name, module.config, module.weights, hidden))
    with reading("unet", modules["unet"].class_name):
        parts.append(unet(modules["unet"].config, modules["unet"].weights, smallest // family.vae_factor))
    with reading("vae", vae.class_name):
        parts.extend(autoencoder(vae.class_name, vae.config, vae.weights, smallest))
    return Pipeline(
        family=family,
        components={part.name: part for part in parts},
        scheduler=scheduler,
        tokenizers=material.tokenizers,
        model_index=complete_index(material, family),
        source=_told(material, kind),
        licence=dict(material.licence),
        history=_history(material.index),
    )


def _as_stock(material: Material) -> tuple[str, Material]:
    """The stock class, and the material as it makes it: absent keys have their defaults, old configs are repaired."""
    given = material.modules
    modules = {name: replace(one, config=completed(one.class_name, one.config)) for name, one in given.items()}
    unet, vae = modules["unet"], modules["vae"]
    with reading("unet", unet.class_name):
        check_config(unet.config)
        kind = stock.stock_class(material.index, unet.config)
    modules["unet"] = replace(unet, config=stock.repaired_unet(kind, unet.config))
    modules["vae"] = replace(vae, config=stock.repaired_vae(kind, vae.config, given["vae"].config))
    scheduler = stock.repaired_scheduler(kind, _finite(material.scheduler or {}))
    return kind, replace(material, modules=modules, scheduler=scheduler)


def _told(material: Material, kind: str) -> dict[str, Any]:
    told = stock.notes(material.index, kind)
    return {**material.source, "notes": told} if told else dict(material.source)


def _finite(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Without what JSON cannot hold: diffusers writes `"lambda_min_clipped": -Infinity`, its default anyway."""
    return {key: value for key, value in scheduler.items() if not (isinstance(value, float) and math.isinf(value))}


def _history(index: Mapping[str, Any]) -> tuple[Any, ...]:
    entries = own_facts(index).get("history")
    return tuple(entries) if isinstance(entries, list) else ()


def with_unet(pipeline: Pipeline, config: Mapping[str, Any], weights: Weights, entry: Mapping[str, Any]) -> Pipeline:
    """`pipeline` with another U-Net; `entry` says in its history how that was made.

    Raises:
        SourceError: the U-Net does not fit the other parts.
    """
    parts = dict(pipeline.components)
    vae = parts["vae_decoder"]
    texts = {name: parts[name].config for name in TEXT_PARTS if name in parts}
    family = family_of(config, vae.class_name, vae.config, pipeline.scheduler, pipeline.model_index, texts)
    parts["unet"] = unet(config, weights, _smallest(family) // family.vae_factor)
    return recorded(replace(pipeline, family=family, components=parts), entry)


def with_vae(pipeline: Pipeline, vae: Module) -> Pipeline:
    """`pipeline` with another auto-encoder, drawn with by the scale factors of its own config; its history stays.

    Raises:
        ConfigError: its latents are of another shape than those of the U-Net.
        UnsupportedError: another class than AutoencoderKL or AutoencoderTiny, or a config that is not drawn with.
    """
    config = completed(vae.class_name, vae.config)
    family, before = _family_with(pipeline, vae.class_name, config), pipeline.family
    with reading("vae", vae.class_name):
        halves = autoencoder(vae.class_name, config, vae.weights, _smallest(before))
    parts = {**pipeline.components, **{part.name: part for part in halves}}
    index = {**pipeline.model_index, "vae": ["diffusers", vae.class_name]}
    return replace(pipeline, family=family, components=parts, model_index=index)


def _family_with(pipeline: Pipeline, class_name: str, config: Mapping[str, Any]) -> Family:
    before, factor = pipeline.family, vae_factor(class_name, config)
    channels = int(config.get("latent_channels", 4))
    if (channels, factor) != (before.latent_channels, before.vae_factor):
        raise ConfigError(
            f"the VAE has {channels} latent channels, each latent {factor} pixels wide; the U-Net draws "
            f"{before.latent_channels}, each {before.vae_factor} pixels wide: latents of another family"
        )
    unet = pipeline.components["unet"].config
    texts = {name: pipeline.components[name].config for name in TEXT_PARTS if name in pipeline.components}
    return family_of(unet, class_name, config, pipeline.scheduler, pipeline.model_index, texts)


def recorded(pipeline: Pipeline, entry: Mapping[str, Any]) -> Pipeline:
    """`pipeline` with one more entry in its history; the model_index keeps it, where stock diffusers passes over it."""
    history = (*pipeline.history, dict(entry))
    own = {**own_facts(pipeline.model_index), "history": list(history)}
    return replace(pipeline, model_index={**pipeline.model_index, OWN: own}, history=history)


def converted(pipeline: Pipeline, dtype: str | None, parts: Collection[str] = ()) -> Pipeline:
    """`pipeline` with the float tensors of `parts` (default: all) as `dtype`, converted when they are read.

    Raises:
        ConfigError: `dtype` is none that weights can have. None leaves them as they are.
    """
    if dtype is None:
        return pipeline
    changed = {
        name: replace(part, weights=cast(part.weights, dtype))
        for name, part in pipeline.components.items()
        if not parts or name in parts
    }
    return replace(pipeline, components={**pipeline.components, **changed})


def _smallest(family: Family) -> int:
    return -(-SMALLEST_PX // family.size_step) * family.size_step


def missing_parts(material: Material) -> list[str]:
    """Folder names that a pipeline needs and `material` lacks."""
    missing = [name for name in ("unet", "vae") if name not in material.modules]
    texts = [name for name in TEXT_PARTS if name in material.modules]
    if not texts:
        missing.append("text_encoder")
    wanted = [name.replace("text_encoder", "tokenizer") for name in texts] or ["tokenizer"]
    missing += [name for name in wanted if name not in material.tokenizers]
    return missing if material.scheduler else [*missing, "scheduler"]


def complete_index(material: Material, family: Family) -> dict[str, Any]:
    """The model_index of what is there; entries and options of the source are kept."""
    index = {key: value for key, value in material.index.items() if not isinstance(value, list)}
    if "_class_name" not in index or set(material.source.get("left_out", ())) - _OPTIONAL:
        index["_class_name"] = _pipeline_class(family)  # its own class would miss what is left out
    for name in TEXT_PARTS if family.name != "sd" else TEXT_PARTS[:1]:
        index[name] = _entry(material, name, "transformers")
        tokenizer = name.replace("text_encoder", "tokenizer")
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if tokenizer in material.tokenizers else [None, None]
    index["unet"] = _entry(material, "unet", "diffusers")
    index["vae"] = _entry(material, "vae", "diffusers")
    if family.fills_masks:  # diffusers asks such folders which version wrote them, and trips where none is named
        from importlib.metadata import version  # not above: a tenth of what `export --help` takes

        index.setdefault("_diffusers_version", version("diffusers"))
    index["scheduler"] = ["diffusers", (material.scheduler or {}).get("_class_name", "DDIMScheduler")]
    if family.name == "sd":
        index.update(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
    return index


def _entry(material: Material, name: str, library: str) -> list[str | None]:
    module = material.modules.get(name)
    return [library, module.class_name] if module else [None, None]


def _pipeline_class(family: Family) -> str:
    if family.name == "sdxl-refiner":
        return "StableDiffusionXLImg2ImgPipeline"
    kind = "StableDiffusionXL" if family.name == "sdxl" else "StableDiffusion"
    return f"{kind}InpaintPipeline" if family.unet_channels == 9 else f"{kind}Pipeline"
