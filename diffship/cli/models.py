"""Which models a `run` opens, and in which engines: one DIR, or several that share the steps."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffship.cli import partition
from diffship.cli.flags import AUTO, engine_options, load_fields
from diffship.cli.progress import note
from diffship.core.errors import ConfigError
from diffship.core.manifest import MANIFEST_NAME
from diffship.core.registry import RUNNERS
from diffship.core.strict import unknown
from diffship.runtimes.handoff.pair import check_pair
from diffship.runtimes.handoff.router import Router, check_split
from diffship.sampling.model import Model

CPU_ENGINES = ("onnxruntime", "openvino")  # unless --device names a GPU
_SHORT = "one number of model calls per model, such as --split 10,15"


def sources_of(options: argparse.Namespace) -> list[str]:
    """Sources in the order of their steps; checks --split, --large, --models and --engines against each other.

    Raises:
        ConfigError: flags that do not go together, or a split that is not legal.
    """
    if options.models and options.large:
        raise ConfigError("--large and --models exclude each other; --large L with DIR means --models L DIR")
    if not options.models and options.bundle is None:
        raise ConfigError("DIR is missing: a bundle, or --models A B with --split (diffship run --help)")
    sources = list(options.models or [*([options.large] if options.large else []), options.bundle])
    if options.split == AUTO:
        raise ConfigError("--split auto is for --cloud URL, with --budget; give numbers such as 10,15")
    if options.split is None and len(sources) > 1:
        raise ConfigError(f"{len(sources)} models share the steps: give {_SHORT}")
    if options.split is not None and not options.models and not options.large:
        raise ConfigError("--split divides the steps among models: add --large SOURCE, or --models A B in place of DIR")
    if options.split is not None:
        check_split(options.split, len(sources), options.steps)
    _check_engines(options, len(sources))
    return sources


@contextmanager
def open_router(options: argparse.Namespace, sources: list[str]) -> Iterator[tuple[Router, list[str]]]:
    """The models of `sources` opened, checked against each other, and routed; and what that check warned of.

    Raises:
        ConfigError: they cannot share a trajectory. UnsupportedError: an engine that is not there, a missing part.
    """
    from diffship.sampling.loop import denoiser_of

    engines, settings = options.engines or [options.engine] * len(sources), source_options(options, sources)
    with ExitStack() as stack:
        make = stack.enter_context(partition.denoisers(options)) if partition.asked(options) else denoiser_of
        models = [
            stack.enter_context(_opened(options, source, engine, settings))
            for source, engine in zip(sources, engines, strict=True)
        ]
        warnings = [text for model in models for text in getattr(model, "notes", ())]
        warnings += check_pair(models, options.sampler, options.shared_latents, encode=True)
        warnings += half_on_cpu(models, options)
        for warning in warnings:
            note(f"warning: {warning}")
        yield Router(models, options.split, keep=options.memory != "low", make=make), warnings


def source_options(options: argparse.Namespace, sources: Sequence[str]) -> dict[str, Any]:
    """Options of the engine, with those of torch that say how a source is read.

    Raises:
        ConfigError: one of the latter is given for a bundle, or for several models.
    """
    given = load_fields(options) | ({} if options.base is None else {"base": options.base})
    if given and (len(sources) > 1 or (Path(sources[0]) / MANIFEST_NAME).is_file()):
        flags = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{flags}: for one model, and a source; give it to export, and run the bundle")
    return engine_options(options) | given


def _opened(
    options: argparse.Namespace, source: str, engine: str | None, settings: Mapping[str, Any]
) -> AbstractContextManager[Model]:
    """A model, with the LoRAs and the textual inversions of the command line."""
    if not options.lora and not options.embedding:
        from diffship.runtimes.engines.model import open_model

        return open_model(source, engine, **settings)
    from diffship.adapted import lora_of, open_adapted

    loras = [lora_of(text) for text in options.lora]
    return open_adapted(source, loras, options.embedding, engine, **settings)


def half_on_cpu(models: Iterable[object], options: argparse.Namespace) -> list[str]:
    """A warning for bundles in half precision that a CPU will compute in float32; each kind of engine is told once."""
    found: dict[str, list[str]] = {}
    for model in models:
        bundle = getattr(model, "bundle", None)
        if bundle is not None and any(part.format.activations == "float16" for part in bundle.manifest.parts):
            found.setdefault(model.engine, []).append(bundle.path.name)  # type: ignore[attr-defined]
    if engine_options(options).get("device", "cpu") != "cpu":
        found = {}
    return [
        f"{' and '.join(names)} is in fp16, which {engine} computes in float32 on a CPU: slower, and with more memory, "
        "than a bundle in fp32. For this machine: diffship export SOURCE --to onnx --precision fp32 -o DIR"
        for engine, names in found.items()
        if engine in CPU_ENGINES
    ]


def report(router: Router, sources: list[str]) -> list[dict[str, object]]:
    """What each model did, JSON-ready: its share in `steps` is null if there is no split."""
    split = router.split or [None] * len(router.models)
    return [
        {
            "name": model.name,
            "source": source,
            "engine": getattr(model, "engine", "torch"),
            "steps": steps,
            "calls": share.calls,
            "seconds": round(share.seconds, 3),
        }
        for model, source, steps, share in zip(router.models, sources, split, router.shares, strict=True)
    ]


def _check_engines(options: argparse.Namespace, models: int) -> None:
    if not options.engines:
        return
    if options.engine is not None:
        raise ConfigError("--engine is for all models, --engines for one after the other: give one of them")
    if len(options.engines) != models:
        raise ConfigError(f"--engines names {len(options.engines)} for {models} models; give one per model, in order")
    for engine in options.engines:
        if engine not in RUNNERS:
            raise ConfigError(unknown("engine", engine, RUNNERS))
