"""compress: source to a smaller diffusers folder, by passes; every pass is checked before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError
from diffship.core.job import Job, require_disk
from diffship.core.problem import refuse

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline


def compress(
    source: str | Path | Pipeline,
    passes: Sequence[Any],
    out: str | Path | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    precision: str | None = None,
    job: Job | None = None,
) -> Pipeline:
    """Run `passes` over `source`, one after the other, and write the result as a diffusers folder at `out`.

    Without `out` nothing is written and no tensor is read: the result tells parameters and history (a dry run).
    `precision` (float32, float16, bfloat16) converts the weights that are written; None keeps the source's.

    Raises:
        ConfigError: no pass is given, or the place is taken.
        SourceError: the source cannot be read.
        UnsupportedError: a pass does not fit the source.
    """
    from diffship.models.sources import open_source

    if not passes:
        raise ConfigError("no pass is given; name one with --pass NAME, or several in a recipe with --recipe FILE")
    job = job or Job()
    pipeline = open_source(str(source), base=base, revision=revision) if isinstance(source, (str, Path)) else source
    for step in passes:
        refuse(step.check(pipeline))
        pipeline = step.run(pipeline, job)
    if out is not None:
        require_disk(out, sum(part.weights.nbytes for part in pipeline.components.values()), "the model")
        pipeline.save(out, dtype=precision, progress=job.progress)
    return pipeline
