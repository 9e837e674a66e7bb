"""compress: source to a smaller diffusers folder, by passes; every pass is checked before the first one runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.distributed import first_process
from diffship.core.errors import ConfigError
from diffship.core.job import Job, require_disk
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.problem import refuse
from diffship.models.saving import save

if TYPE_CHECKING:
    from diffship.compression.estimate import Estimate
    from diffship.models.pipeline import Pipeline


def compress(
    source: str | Path | Pipeline,
    passes: Sequence[Any],
    out: str | Path | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    loading: LoadOptions = AS_SAID,
    precision: str | None = None,
    job: Job | None = None,
) -> Pipeline:
    """Run `passes` over `source`, one after the other, and write the result as a diffusers folder at `out`. The source
    is opened as by `open_source`, with its `base`, `revision` and `loading`.

    Without `out` the result is only returned; its tensors are made when they are read. `precision` (float32, float16,
    bfloat16) converts the weights; None leaves them as the last pass does. A `job` with a folder keeps what long
    passes made: the same call goes on behind the last finished one. Under `torchrun` all processes run, and the first
    one writes.

    Raises:
        ConfigError: no pass is given, the place is taken, the job's folder lies in it, or an option is not legal here.
        SourceError: the source, or a file that a pass names, cannot be read.
        UnsupportedError: a pass does not fit what the passes before it make, or the disk is too small.
    """
    from diffship.compression.outline import outlines, require_network, settled
    from diffship.compression.stored import Results
    from diffship.models.pipeline import converted
    from diffship.models.saving import require_place

    job, writes = job or Job(), out is not None and first_process()
    if first_process() and not job.started:  # a run that continues writes its own files again
        _keep_what_is_there(passes)
    if writes:
        require_place(Path(str(out)))
        if job.inside(str(out)):
            raise ConfigError(f"the cache lies inside the output {out}, which must be empty; name another folder")
    pipeline = _opened(source, passes, base, revision, loading)
    results = Results(pipeline, passes, job)
    done, pipeline = results.latest()
    found = outlines(pipeline, passes[done:])
    if writes:
        likely = found[-1].pipeline if found else pipeline
        likely = converted(likely, precision)
        require_disk(str(out), sum(part.weights.nbytes for part in likely.components.values()), "the model")
    for index, step in enumerate(passes[done:], done):
        if index >= done + settled(found):
            require_network(step, pipeline)
            refuse(step.check(pipeline))
        pipeline = results.keep(index, step.run(pipeline, job))
    if writes:
        save(pipeline, str(out), dtype=precision, progress=job.progress)
    return converted(pipeline, precision)


def foresee(
    source: str | Path | Pipeline,
    passes: Sequence[Any],
    *,
    base: str | None = None,
    revision: str | None = None,
    loading: LoadOptions = AS_SAID,
    precision: str | None = None,
    timing: bool = True,
) -> Estimate:
    """What `compress` would make, and how long it would take: a dry run, which writes nothing and opens no data. A pass
    whose data is not there has no hours, and says so.

    `precision` is that of the result, as in `compress`. With `timing`, and if a pass calls the U-Net, one call of it
    is timed here; that takes seconds.

    Raises:
        ConfigError, SourceError, UnsupportedError: as `compress`, but for what the checks of passes find in data.
    """
    from diffship.compression.estimate import estimate
    from diffship.compression.outline import outlines
    from diffship.models.pipeline import converted

    pipeline = _opened(source, passes, base, revision, loading)
    found = outlines(pipeline, passes, check=False)
    if len(found) == len(passes):
        found[-1] = replace(found[-1], pipeline=converted(found[-1].pipeline, precision))
    return estimate(pipeline, passes, found, timing)


def _keep_what_is_there(passes: Sequence[Any]) -> None:
    """Raises ConfigError if a file or folder that a pass is to write beside the model would be replaced."""
    for step in passes:
        for entry in fields(step):
            given = getattr(step, entry.name) if entry.metadata.get("output") else None
            place = Path(given).expanduser() if given else None
            if place and os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
                raise ConfigError(f"{entry.name} {place} exists already; choose another name, or remove it first")


def _opened(
    source: str | Path | Pipeline, passes: Sequence[Any], base: str | None, revision: str | None, loading: LoadOptions
) -> Pipeline:
    from diffship.compression.vae_beside import open_tried

    if not passes:
        raise ConfigError("no pass is given; name one with --pass NAME, or several in a recipe with --recipe FILE")
    if not isinstance(source, (str, Path)):
        return source
    return open_tried(str(source), base, revision, loading)
