"""Make a Pipeline of what a source yields, or of a Pipeline with another denoiser or VAE. The kind (`core.kind`) says
which parts a model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffship.core.errors import ConfigError, SourceError
from diffship.core.family import Family
from diffship.core.kind import Kind
from diffship.core.registry import kinds
from diffship.core.weights import Weights
from diffship.models.parts.autoencoder import vae_factor
from diffship.models.parts.component import Component
from diffship.models.pipeline import Material, Module, Pipeline, own_facts, recorded
from diffship.models.sources.defaults import completed


def kind_of(modules: Mapping[str, Module]) -> Kind | None:
    """The first kind that recognises these modules, by folder; None if they have no denoiser that one knows.

    Raises:
        SourceError: a config makes no network.
    """
    return next((kind for kind in kinds().values() if kind.recognises(modules)), None)


def assemble(material: Material) -> Pipeline:
    """A pipeline of complete material.

    Raises:
        SourceError: parts are missing or do not fit each other.
        UnsupportedError: a part is of a class that is not known here.
    """
    kind = kind_of(material.modules) or next(iter(kinds().values()))
    missing = kind.missing(material)
    if missing:
        raise SourceError(
            f"{material.source.get('id')}: has no {', '.join(missing)}. Name a model that has: export, compress, "
            "inspect and run take --base SOURCE (a folder, a file, a hub id, emoji or arch:NAME)"
        )
    material = kind.repaired(material)
    family = kind.family(material)
    return Pipeline(
        family=family,
        components=_components(kind, material, family),
        scheduler=dict(material.scheduler or {}),
        tokenizers=material.tokenizers,
        model_index=kind.index(material, family),
        source=_told(material, kind.notes(material)),
        licence=dict(material.licence),
        history=_history(material.index),
    )


def _components(kind: Kind, material: Material, family: Family) -> dict[str, Component]:
    made: dict[str, Component] = {}
    for slot in kind.slots:
        if slot.folder in material.modules:
            made |= {part.name: part for part in kind.build(slot, material.modules[slot.folder], family)}
    return made


def _told(material: Material, notes: list[str]) -> dict[str, Any]:
    told = [*material.source.get("notes", ()), *notes]
    return {**material.source, "notes": told} if told else dict(material.source)


def _history(index: Mapping[str, Any]) -> tuple[Any, ...]:
    entries = own_facts(index).get("history")
    return tuple(entries) if isinstance(entries, list) else ()


def material_of(pipeline: Pipeline) -> Material:
    """The configs of a pipeline's parts as material, from which its family can be found again.

    A module that several parts are made of has the weights of the first of them alone.
    """
    modules = {}
    for slot in pipeline.family.kind.slots:
        part = next((pipeline.components[name] for name in slot.components if name in pipeline.components), None)
        if part is not None:
            modules[slot.folder] = Module(part.class_name, part.config, part.weights)
    return Material(pipeline.source, modules, pipeline.tokenizers, pipeline.scheduler, pipeline.model_index)


def with_denoiser(
    pipeline: Pipeline, config: Mapping[str, Any], weights: Weights, entry: Mapping[str, Any]
) -> Pipeline:
    """`pipeline` with another denoiser of its class; `entry` says in its history how that was made.

    Raises:
        SourceError: the denoiser does not fit the other parts.
    """
    kind = pipeline.family.kind
    module = Module(pipeline.denoiser.class_name, config, weights)
    family, made = _exchanged(pipeline, kind.slot_of(kind.denoiser).folder, module)
    return recorded(replace(pipeline.having(*made), family=family), entry)


def with_vae(pipeline: Pipeline, vae: Module) -> Pipeline:
    """`pipeline` with another auto-encoder, drawn with by the scale factors of its own config; its history stays.

    Raises:
        ConfigError: its latents are of another shape than those that the pipeline draws.
        UnsupportedError: another class than the kind of model has, or a config that is not drawn with.
    """
    kind, before = pipeline.family.kind, pipeline.family
    slot = kind.slot_of(kind.decoder)
    vae = replace(vae, config=completed(vae.class_name, vae.config))
    channels, factor = int(vae.config.get("latent_channels", 4)), vae_factor(vae.class_name, vae.config)
    if (channels, factor) != (before.latent_channels, before.vae_factor):
        raise ConfigError(
            f"the VAE has {channels} latent channels, each latent {factor} pixels wide; the denoiser draws "
            f"{before.latent_channels}, each {before.vae_factor} pixels wide: latents of another family"
        )
    family, made = _exchanged(pipeline, slot.folder, vae)
    index = {**pipeline.model_index, slot.folder: [slot.library, vae.class_name]}
    return replace(pipeline.having(*made), family=family, model_index=index)


def _exchanged(pipeline: Pipeline, folder: str, module: Module) -> tuple[Family, tuple[Component, ...]]:
    """The family after `module` has replaced what was in `folder`, and the parts that are made of it."""
    material = material_of(pipeline)
    kind = kind_of({**material.modules, folder: module}) or pipeline.family.kind
    family = kind.family(replace(material, modules={**material.modules, folder: module}))
    slot = next(slot for slot in kind.slots if slot.folder == folder)
    return family, kind.build(slot, module, family)
