"""Faults of modules: the network that is exported computes something else than the one that torch proves it against.

Shapes stay legal, and the outputs of modules keep their places in the graph, so that only figures can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.studies.mutation import faults, places
from diffship.benchmarks.studies.mutation.mutant import MODULE, Mutant
from diffship.benchmarks.studies.mutation.values import EDITS, exchangeable, fits
from diffship.core.dtype import to_float32
from diffship.core.weights import Derived, TensorMeta, Weights
from diffship.models.parts.component import Component
from diffship.models.parts.unet import CLASS as UNET

if TYPE_CHECKING:
    from torch import nn

QK = "Q and K exchanged"
SECOND = "second text encoder ignored"


@dataclass(frozen=True)
class Kind:
    """places(part) lists (module path, variant); change(module at that path, variant) spoils it."""

    places: Callable[[nn.Module], Iterator[tuple[str, str]]]
    change: Callable[[nn.Module, str], object]
    loses_layer: bool = False


def component_mutants(source: str, component: Component, first_text: int = 0) -> dict[str, list[Mutant]]:
    """Every mutant of a part, by kind; those of weights that would change nothing are left out.

    first_text: width of what the first of two text encoders gives to a U-Net, 0 if there is one.
    """
    part = component.meta
    make = partial(Mutant, MODULE, source, component.name)
    found = {name: [make(name, *place) for place in kind.places(part)] for name, kind in KINDS.items()}
    names = [name for name in component.weights.names() if component.weights.meta(name).dtype.startswith("float")]
    arrays = {name: _read(component.weights, name) for name in names}
    for kind in EDITS:
        found[kind] = [make(kind, name) for name, array in arrays.items() if fits(kind, name, array)]
    if first_text and component.class_name == UNET:
        found[SECOND] = [make(SECOND, "", f"2,{first_text}")]
    found[QK] = [make(QK, one, other) for one, other in _queries(arrays)]
    return {kind: mutants for kind, mutants in found.items() if mutants}


def spoils_weights(mutant: Mutant) -> bool:
    """Whether a fault of a network lies in its weights alone, so that its graph is the sound one's."""
    return mutant.kind not in KINDS


def spoilt(component: Component, mutant: Mutant) -> Component:
    """`component` with the fault."""
    if spoils_weights(mutant):
        return replace(component, weights=_Spoilt(component.weights, mutant))
    return replace(component, build=partial(_build, component.build, mutant))


def _build(build: Callable[[], nn.Module], mutant: Mutant) -> nn.Module:
    module = build()
    KINDS[mutant.kind].change(module.get_submodule(mutant.place), mutant.variant)
    return module


class _Spoilt(Derived):
    def __init__(self, weights: Weights, mutant: Mutant) -> None:
        super().__init__(weights)
        self._mutant = mutant

    def meta(self, name: str) -> TensorMeta:
        meta = super().meta(name)
        return TensorMeta("float32", meta.shape) if name == self._mutant.place and self._mutant.kind in EDITS else meta

    def read(self, name: str) -> NDArray[np.generic]:
        mutant = self._mutant
        if mutant.kind in EDITS:
            return EDITS[mutant.kind](_read(self._weights, name)) if name == mutant.place else super().read(name)
        pair = {mutant.place: mutant.variant, mutant.variant: mutant.place}
        return super().read(pair.get(name, name))


def _read(weights: Weights, name: str) -> NDArray[np.float32]:
    return np.asarray(to_float32(weights.read(name), weights.meta(name).dtype), np.float32)


def _queries(arrays: Mapping[str, NDArray[np.float32]]) -> Iterator[tuple[str, str]]:
    for name, array in arrays.items():
        for query, key in (("to_q.weight", "to_k.weight"), ("q_proj.weight", "k_proj.weight")):
            other = name.removesuffix(query) + key
            if name.endswith(query) and other in arrays and exchangeable((name, array), (other, arrays[other])):
                yield name, other


KINDS: Mapping[str, Kind] = {
    "cross-attention out": Kind(places.attentions("attn2"), partial(faults.times, 0.0), loses_layer=True),
    "self-attention out": Kind(places.self_attentions, partial(faults.times, 0.0), loses_layer=True),
    "feed-forward out": Kind(places.feed_forwards, partial(faults.times, 0.0), loses_layer=True),
    "layer out": Kind(places.whole_layers, partial(faults.times, 0.0), loses_layer=True),
    "skip dropped": Kind(places.skips, faults.drop_skip, loses_layer=True),
    "two skips exchanged": Kind(places.skip_pairs, faults.exchange_skips),
    "rows read as columns": Kind(places.images, faults.columns),
    "sine and cosine exchanged": Kind(places.each_of("Timesteps"), faults.flip_waves),
    "norm epsilon 1e-2": Kind(places.each_of("GroupNorm", "LayerNorm"), faults.epsilon),
    "number of groups": Kind(places.groups, faults.other_groups),
    "attention scaled twice": Kind(places.queries, faults.scaled),
    "causal mask off": Kind(places.each_of("CLIPEncoderLayer"), faults.not_causal),
    "other form of GELU": Kind(places.gelus, faults.other_gelu),
    "input ignored": Kind(places.conditions, faults.ignore_input, loses_layer=True),
    SECOND: Kind(lambda _: iter(()), faults.ignore_input, loses_layer=True),
}
LOSE_LAYER = frozenset(name for name, kind in KINDS.items() if kind.loses_layer)
