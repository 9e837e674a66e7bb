"""A model with LoRAs and textual inversions that are given when it is opened: a join of sources, passes and torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.manifest import MANIFEST_NAME
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.engines.torch import TorchRunner
from diffship.sampling.model import Model

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

_LORA_WEIGHT = (-10.0, 10.0)  # as the pass has it


@contextmanager
def open_adapted(
    source: str | os.PathLike[str],
    loras: Sequence[tuple[str, float]] = (),
    embeddings: Sequence[str] = (),
    engine: str | None = None,
    **options: Any,
) -> Iterator[Model]:
    """A source in torch, with LoRA files (path, weight) added into its weights and the words of `embeddings` (FILE or
    WORD=FILE) in its tokenizers, for a `with` block. Options are those of the engine.

    Raises:
        UnsupportedError: `source` is a bundle, whose engine holds its weights as they were compiled, or another engine
            than torch is asked for; the message has the commands that make a bundle with them.
        ConfigError, SourceError: a file that does not fit the model.
    """
    if (Path(source) / MANIFEST_NAME).is_file() or engine not in (None, "torch"):
        raise UnsupportedError(_refusal(Path(source), loras, embeddings))
    runner = cast(TorchRunner, make_engine("torch", options))
    with closing(runner.open_model(str(source), lambda pipeline: adapted(pipeline, loras, embeddings))) as model:
        yield model


def adapted(pipeline: Pipeline, loras: Sequence[tuple[str, float]] = (), embeddings: Sequence[str] = ()) -> Pipeline:
    """The pipeline with LoRA files in its weights and the words of `embeddings` in its tokenizers. Its name says so."""
    from diffship.compression.lora import LoraPass
    from diffship.core.job import Job
    from diffship.models.inversions import read_inversion, with_inversions

    inversions = [read_inversion(text) for text in embeddings]
    made = with_inversions(pipeline, inversions)
    if loras:
        files, weights = zip(*loras, strict=True)
        made = LoraPass(files=tuple(map(str, files)), weights=weights).run(made, Job())
    names = [*(f"{Path(file).stem}:{weight:g}" for file, weight in loras), *(one.word for one in inversions)]
    return _named(made, " + ".join([str(pipeline.source.get("id", "pipeline")), *names]))


def lora_of(text: str) -> tuple[str, float]:
    """`FILE` or `FILE:0.8` as (file, weight).

    Raises:
        ConfigError: a weight that is no number from -10 to 10.
    """
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file() or "/" in number or number.endswith(".safetensors"):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    low, high = _LORA_WEIGHT
    if not low <= weight <= high:
        raise ConfigError(f"--lora {text!r}: the weight is {number!r}; legal is a number from {low:g} to {high:g}")
    return file, weight


def _named(pipeline: Pipeline, name: str) -> Pipeline:
    from dataclasses import replace

    return replace(pipeline, source={**pipeline.source, "id": name})


def _refusal(source: Path, loras: Sequence[tuple[str, float]], embeddings: Sequence[str]) -> str:
    flags = ["--lora"] * bool(loras) + ["--embedding"] * bool(embeddings)
    ways = []
    if loras:
        sets = " ".join(f"--set files={file} --set weights={weight:g}" for file, weight in loras[:1])
        ways.append(f"diffship compress SOURCE --pass lora {sets} -o FOLDER, then diffship export FOLDER -o DIR")
    if embeddings:
        ways.append(f"diffship export SOURCE --embedding {embeddings[0]} -o DIR")
    return (
        f"{' and '.join(flags)}: {source} holds weights as they were compiled; they change in torch alone (run the "
        f"SOURCE that it was exported from). For a bundle with them: {'; '.join(ways)}"
    )
