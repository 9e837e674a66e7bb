"""Which mutants are tried: drawn by seed, evenly over sources, parts and kinds, two thirds of them edits of graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

from diffship.benchmarks.studies.mutation.graphs import graph_mutants, works
from diffship.benchmarks.studies.mutation.modules import component_mutants
from diffship.benchmarks.studies.mutation.mutant import GRAPH, MODULE, Mutant
from diffship.benchmarks.studies.mutation.taps import Taps
from diffship.benchmarks.studies.mutation.values import EDITS, EXCHANGED, RESOLUTION, exchangeable, fits
from diffship.core.bundle import Bundle
from diffship.models.pipeline import Pipeline

T = TypeVar("T")
_RESOLUTION_SHARE = 10  # one in so many is tried beside the score, for what the proof can just see


@dataclass(frozen=True)
class Plan:
    """score: mutants that count. resolution: small changes of weights, reported beside."""

    score: tuple[Mutant, ...]
    resolution: tuple[Mutant, ...]


def draw(pipelines: Mapping[str, Pipeline], bundles: Mapping[str, Bundle], count: int, seed: int) -> Plan:
    """`count` mutants. bundles: fp32, proved, of every source; edits of graphs are tried on them before they count."""
    rng = random.Random(seed)
    strata: dict[tuple[str, ...], list[Mutant]] = {}
    most = max(6, count // 40)  # of one kind in one part
    for source, pipeline in pipelines.items():
        for part in pipeline.components:
            for kind, mutants in _modules(source, pipeline, part).items():
                strata[MODULE, source, part, kind] = _some(mutants, most, rng)
            for kind, mutants in _edits(source, bundles[source], part, most, rng).items():
                strata[GRAPH, source, part, kind] = mutants
    scored = {key: mutants for key, mutants in strata.items() if key[-1] not in RESOLUTION}
    graphs = _even({key: found for key, found in scored.items() if key[0] == GRAPH}, 2 * count // 3, rng)
    modules = _even({key: found for key, found in scored.items() if key[0] == MODULE}, count - len(graphs), rng)
    fine = {key: found for key, found in strata.items() if key[-1] in RESOLUTION and key[0] == GRAPH}
    both = [*graphs, *modules]
    rng.shuffle(both)  # so that what is done so far is a fair sample, and the time that is left is known
    return Plan(tuple(both), tuple(_even(fine, count // _RESOLUTION_SHARE, rng)))


def _modules(source: str, pipeline: Pipeline, part: str) -> dict[str, list[Mutant]]:
    texts = list(pipeline.texts.values())
    first = int(texts[0].config["hidden_size"]) if len(texts) == 2 else 0
    return component_mutants(source, pipeline.components[part], first)


def _edits(source: str, bundle: Bundle, part: str, most: int, rng: random.Random) -> dict[str, list[Mutant]]:
    taps = Taps(bundle, bundle.part(part))
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in graph_mutants(source, part, taps):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    found = {kind: list(_working(_some(mutants, len(mutants), rng), most, taps)) for kind, mutants in by_kind.items()}
    weights = {name: np.asarray(array, np.float32) for name, array in taps.weights.items() if array.dtype.kind == "f"}
    for kind in EDITS:
        names = [name for name, array in weights.items() if fits(kind, name, array)]
        found[kind] = _some([Mutant(GRAPH, source, part, kind, name) for name in names], most, rng)
    pairs = [pair for pair in combinations(weights, 2) if weights[pair[0]].shape == weights[pair[1]].shape]
    other = [(a, b) for a, b in _some(pairs, 2 * most, rng) if exchangeable((a, weights[a]), (b, weights[b]))]
    found[EXCHANGED] = [Mutant(GRAPH, source, part, EXCHANGED, a, b) for a, b in other[:most]]
    return {kind: mutants for kind, mutants in found.items() if mutants}


def _working(mutants: list[Mutant], most: int, taps: Taps) -> Iterator[Mutant]:
    for mutant in mutants:
        if most == 0:
            return
        if works(mutant, taps):
            most -= 1
            yield mutant


def _some(items: list[T], most: int, rng: random.Random) -> list[T]:
    return rng.sample(items, min(most, len(items)))


def _even(strata: Mapping[tuple[str, ...], list[Mutant]], count: int, rng: random.Random) -> list[Mutant]:
    """One of each stratum in turn, in a random order of strata, until there are `count`."""
    keys = sorted(strata)
    rng.shuffle(keys)
    rounds = max((len(found) for found in strata.values()), default=0)
    listed = [strata[key][turn] for turn in range(rounds) for key in keys if turn < len(strata[key])]
    return listed[:count]
