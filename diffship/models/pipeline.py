"""Pipeline: the parts of one model with their tokenizers, scheduler and licence, whatever they were read from.

Data alone: `assemble` makes one of a source, `saving` writes one, `model.PipelineModel` opens one on torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffship.core.brief import brief
from diffship.core.family import Family
from diffship.core.weights import Weights, cast
from diffship.models.parts.component import Component

OWN = "_diffship"


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

    `modules` has the folder names of a diffusers pipeline (those of the slots of its kind), `tokenizers` maps folder
    names to {file name: content}.
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

    @property
    def denoiser(self) -> Component:
        """The part that is called at every step; KeyError if it was left out."""
        return self.components[self.family.kind.denoiser]

    @property
    def encoder(self) -> Component:
        """The part that makes latents of a picture; KeyError if there is none."""
        return self.components[self.family.kind.encoder]

    @property
    def decoder(self) -> Component:
        """The part that makes a picture of latents; KeyError if there is none."""
        return self.components[self.family.kind.decoder]

    @property
    def texts(self) -> dict[str, Component]:
        """The text encoders by part name, in order."""
        return {name: self.components[name] for name in self.family.kind.text_parts if name in self.components}

    def having(self, *parts: Component) -> Pipeline:
        """The same with these parts in place of those of their names."""
        return replace(self, components={**self.components, **{part.name: part for part in parts}})


def own_facts(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model_index says under `_diffship` (recommended settings, history); stock diffusers skips the key."""
    own = index.get(OWN)
    return own if isinstance(own, dict) else {}


def listed(index: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index has a component of this name."""
    entry = index.get(name)
    return isinstance(entry, list) and entry != [None, None]


def recorded(pipeline: Pipeline, entry: Mapping[str, Any]) -> Pipeline:
    """`pipeline` with one more entry in its history; the model_index keeps it, and stock diffusers passes over it."""
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
