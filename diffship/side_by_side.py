"""Two models side by side: parts on the same feeds, steps from the same noise, pictures of the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffship.core.compare import Report, Tolerance, compare
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.spec import TensorSpec
from diffship.sampling.generate import Request, generate
from diffship.sampling.model import Model
from diffship.sampling.request import settle
from diffship.sampling.trajectory import Trajectory, as_numpy

FLOORS_DB = {"fp32": 60.0, "fp16": 35.0, "bf16": 30.0}  # other precisions: 25 dB
_PROBE = "a red apple on a table"
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Side:
    """One of the two: an opened model, and per part the digest of its source tensors and its precision."""

    name: str
    model: Model
    digests: Mapping[str, str]
    precisions: Mapping[str, str]


@dataclass(frozen=True)
class PartFigures:
    """One part. `judged` is false if the weights differ and no floor was asked for: figures only."""

    name: str
    same_source: bool
    judged: bool
    report: Report

    @property
    def passed(self) -> bool:
        return self.report.passed or not self.judged


@dataclass(frozen=True)
class StepFigures:
    """Latents after one model call: largest difference, and PSNR over the peak of the first side."""

    prompt: int
    step: int
    max_abs: float
    psnr_db: float


@contextmanager
def open_side(text: str, engine: str | None = None, options: Mapping[str, Any] | None = None) -> Iterator[Side]:
    """A bundle in an engine, or a source in torch (`engine` must then be None or torch)."""
    from diffship.runtimes.engines.model import BundleModel, open_model

    with open_model(text, engine, **dict(options or {})) as model:
        if isinstance(model, BundleModel):
            parts = model.bundle.manifest.parts
            digests = {part.name: part.source_digest for part in parts}
            precisions = {part.name: part.precision for part in parts}
            if (staging := model.bundle.manifest.staging) is not None:
                precisions[staging.part] = precisions[staging.stages[0]]
            yield Side(f"{text} ({model.engine})", model, digests, precisions)
        else:
            digests = _source_digests(text)
            yield Side(f"{text} (torch)", model, digests, dict.fromkeys(digests, "fp32"))


def common_parts(first: Side, second: Side, wanted: Sequence[str] | None = None) -> list[str]:
    """Parts that both have, in the order in which a picture uses them.

    Raises:
        ConfigError: there is none, or one of `wanted` is missing on a side.
    """
    both = first.model.parts & second.model.parts
    for name in wanted or ():
        if name not in both:
            raise ConfigError(f"part {name!r} is not in both; common parts: {', '.join(sorted(both)) or 'none'}")
    found = [name for name in first.model.family.kind.parts if name in (wanted or both)]
    if not found:
        raise ConfigError(f"{first.name} and {second.name} have no part in common")
    return found


def compare_part(first: Side, second: Side, part: str, seed: int = 0, floor_db: float | None = None) -> PartFigures:
    """Both run `part` on the same feeds at the smallest size.

    The floor is `floor_db`, or that of the lower precision if both come from the same weights.

    Raises:
        ConfigError: one takes other inputs than the other, or has another vocabulary.
    """
    _require_same_ids(first, second, part)
    sides = (first, second)
    outputs, taken = [], list[Sequence[TensorSpec]]()
    feeds: dict[str, Array] = {}
    for entry in sides:
        runner = entry.model.use(part)
        taken.append(runner.inputs)
        if _differ(taken[0], taken[-1]):
            raise ConfigError(f"{part}: {first.name} takes {_told(taken[0])}, {second.name} {_told(taken[1])}")
        feeds = feeds or make_feeds(first.model, part, runner.inputs, seed)
        outputs.append({name: as_numpy(value) for name, value in runner.run(feeds).items()})
        entry.model.release(part)
    floors = [FLOORS_DB.get(side.precisions.get(part, "fp32"), 25.0) for side in sides]
    same = first.digests.get(part) == second.digests.get(part) is not None
    tolerance = Tolerance(psnr_db=floor_db if floor_db is not None else min(floors))
    common = outputs[0].keys() & outputs[1].keys()
    reference, candidate = ({name: side[name] for name in side if name in common} for side in outputs)
    report = compare(reference, candidate, tolerance)
    return PartFigures(part, same, same or floor_db is not None, report)


def _require_same_ids(first: Side, second: Side, part: str) -> None:
    kind = first.model.family.kind
    name = kind.tokenizer_of(part) if part in kind.text_parts else part
    ids = [side.model.tokenizers[name]([_PROBE]).ids for side in (first, second) if name in side.model.tokenizers]
    if len(ids) == 2 and not np.array_equal(ids[0], ids[1]):
        raise ConfigError(
            f"{part}: {first.name} and {second.name} have other vocabularies; choose other parts: --parts"
        )


def _differ(first: Sequence[TensorSpec], second: Sequence[TensorSpec]) -> bool:
    """Whether no feeds fit both; an axis that a request chooses in one may be fixed in the other."""
    ours, theirs = ({spec.name: spec.shape for spec in inputs} for inputs in (first, second))
    return ours.keys() != theirs.keys() or any(
        len(ours[name]) != len(shape)
        or any(a != b and isinstance(a, int) and isinstance(b, int) for a, b in zip(ours[name], shape, strict=True))
        for name, shape in theirs.items()
    )


def _told(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.text()}" for spec in inputs)


def make_feeds(model: Model, part: str, inputs: Sequence[TensorSpec], seed: int = 0) -> dict[str, Array]:
    """Plausible feeds at the smallest legal size: token ids of a prompt, unit normal latents, pixels in [-1, 1]."""
    rng = np.random.default_rng(seed)
    sizes = _smallest(model.family)
    return {spec.name: _feed(model, part, spec, sizes, rng) for spec in inputs}


def _smallest(family: Family) -> dict[str, int]:
    pixels = max(64, family.size_step)
    latent = pixels // family.vae_factor
    sizes = {"batch_size": 1, "sequence_length": 77}
    sizes |= {f"{prefix}{side}": latent for prefix in ("", "latent_") for side in ("height", "width")}
    return sizes | {f"sample_{side}": pixels for side in ("height", "width")}


def _feed(model: Model, part: str, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    if spec.name == "input_ids":
        return model.tokenizers[model.family.kind.tokenizer_of(part)]([_PROBE]).ids
    shape = spec.resolve(sizes)
    if spec.name == "timestep":
        return np.full(shape, 501.0, np.float32)
    if spec.name == "time_ids":
        side = float(sizes["sample_height"])
        return np.asarray([[side, side, 0.0, 0.0, side, side][: shape[1]]], np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    return np.tanh(values) if part == model.family.kind.encoder else values


def compare_steps(
    first: Side, second: Side, requests: Sequence[Request], progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[StepFigures], list[tuple[Array, Array]]]:
    """Both draw each request from the same noise; figures after every call, and the pairs of pictures.

    Raises:
        ConfigError: their latents differ in shape.
    """
    figures, pictures = [], []
    for request in requests:
        shapes = [settle(request, side.model.family, side.model.scheduler).latent_shape for side in (first, second)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{first.name} has latents of {shapes[0]}, {second.name} of {shapes[1]}: give one --size, "
                "or compare parts alone with --no-steps"
            )
    for index, request in enumerate(requests):
        one = replace(request, images=1)
        runs = []
        for side in (first, second):
            runs.append(_record(side.model, one))
            if progress is not None:
                progress("pictures", 2 * index + len(runs), 2 * len(requests))
        figures += _step_figures(index, runs[0][0], runs[1][0])
        pictures.append((runs[0][1], runs[1][1]))
    return figures, pictures


def _record(model: Model, request: Request) -> tuple[list[Array], Array]:
    latents: list[Array] = []

    def keep(batch: Sequence[Trajectory]) -> None:
        latents.append(as_numpy(batch[0].latents).copy())

    picture = generate(model, request, on_step=keep)[0]
    return latents, picture.pixels


def _step_figures(prompt: int, first: Sequence[Array], second: Sequence[Array]) -> list[StepFigures]:
    found = []
    for step, (a, b) in enumerate(zip(first, second, strict=False), 1):
        output = compare({"latents": a}, {"latents": b}, Tolerance()).outputs[0]
        found.append(StepFigures(prompt, step, output.max_abs, output.psnr_db))
    return found


def _source_digests(text: str) -> dict[str, str]:
    from diffship.core.weights import source_digest
    from diffship.models.sources.opening import open_source

    components = open_source(text).components
    return {name: source_digest(component.weights) for name, component in components.items()}
