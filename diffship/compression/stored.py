"""Finished results of passes, kept by content: a recipe that is started again goes on behind the last one of them.

A result is kept under a digest of the source (every tensor, config, tokenizer file and licence), of all passes so far
with their options, and of the version of this package. An option that names a file or folder counts by what is there,
not by its name, unless its field has `choices` or the metadata `text`: a prompt is none, whatever lies in the current
folder. One with the metadata `output` is where a pass writes, and does not count. Passes that take seconds say
`kept = False` in their class.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffship import __version__
from diffship.core.distributed import first_process
from diffship.core.job import Job, digest_of, require_disk
from diffship.core.strict import plain
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source

_PATH_CHARS = 1024
_LATER = {"guided": True, "latents_mean": None, "latents_std": None}  # of a family: no part of keys at these values


def is_kept(step: Any) -> bool:
    """Whether the result of a pass is worth its place on the disk."""
    return bool(getattr(step, "kept", True))


def _owes(step: Any) -> bool:
    """Whether a pass was asked for a file beside its result that is not there."""
    asked = [getattr(step, field.name) for field in fields(step) if field.metadata.get("output")]
    return any(path and not _filled(Path(path).expanduser()) for path in asked)


def _filled(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


class Results:
    """The results of one source and one list of passes in the folder of a job; `names` has one for each pass."""

    def __init__(self, source: Pipeline, passes: Sequence[Any], job: Job) -> None:
        self._source, self._passes, self._job = source, passes, job

    @cached_property
    def names(self) -> tuple[str, ...]:
        key, names = source_key(self._source, self._job), []
        for step in self._passes:
            key = digest_of([key, step.kind, options_key(step), __version__])
            names.append(f"result-{step.kind}-{key[:40]}")
        return tuple(names)

    def latest(self) -> tuple[int, Pipeline]:
        """How many passes are done, and what they made: the source if none is."""
        if self._job.started:
            for done in range(len(self._passes), 0, -1):
                if any(map(_owes, self._passes[:done])):
                    continue
                if is_kept(self._passes[done - 1]) and (self._job.folder / self.names[done - 1]).is_dir():
                    return done, self._opened(self._job.folder / self.names[done - 1])
        return 0, self._source

    def keep(self, index: int, made: Pipeline) -> Pipeline:
        """`made` by pass `index`, written and opened again if it is kept; of several processes the first one writes."""
        if not (self._job.lasting and is_kept(self._passes[index]) and first_process()):
            return made
        nbytes = sum(part.weights.nbytes for part in made.components.values())
        require_disk(self._job.folder, nbytes, f"the result of {self._passes[index].kind}")
        return self._opened(self._job.once(self.names[index], partial(save, made, progress=self._job.progress)))

    def _opened(self, place: Path) -> Pipeline:
        # the folder names itself as source; teachers and model cards need the source that the model came from
        return replace(open_source(str(place)), source=self._source.source, licence=self._source.licence)


def source_key(pipeline: Pipeline, job: Job) -> str:
    """sha256 (hex) over everything that a pass can see of a pipeline; reads every tensor."""
    parts = {}
    for done, (name, part) in enumerate(pipeline.components.items(), 1):
        parts[name] = [part.class_name, plain(part.config), part.digest]
        job.progress("hash the source", done, len(pipeline.components))
    facts = (pipeline.scheduler, pipeline.model_index, pipeline.source, pipeline.licence)
    return digest_of([parts, _tokenizer_digests(pipeline), *map(plain, facts)])


def _tokenizer_digests(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    return {
        name: {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        for name, files in pipeline.tokenizers.items()
    }


def settings_key(pipeline: Pipeline) -> str:
    """sha256 (hex) over what a pipeline computes with beside its tensors: configs, scheduler, family, tokenizers."""
    parts = {name: [part.class_name, plain(part.config)] for name, part in pipeline.components.items()}
    family = {key: value for key, value in plain(pipeline.family).items() if key not in _LATER or value != _LATER[key]}
    return digest_of([parts, family, plain(pipeline.scheduler), _tokenizer_digests(pipeline)])


def options_key(step: Any) -> dict[str, Any]:
    """The options of a pass, JSON-ready; files and folders by their content."""
    about = {field.name: field.metadata for field in fields(step)}
    found = {
        name: value if about[name].keys() & {"choices", "text"} else _content(value)
        for name, value in plain(step).items()
        if not about[name].get("output")
    }
    beside = _content(list(getattr(step, "beside", ())))
    return {**found, "beside": beside} if beside else found


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return [_content(entry) for entry in value]
    if not isinstance(value, str) or not 0 < len(value) <= _PATH_CHARS or "\0" in value:
        return value
    path = Path(value).expanduser()
    if path.is_file():
        return {"file": _file_digest(path)}
    return {"folder": _folder_digest(path)} if path.is_dir() else value


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    """A digest of names, sizes and times of a folder's files, behind links too: pictures for training are too many to
    be read at every start."""
    entries: list[list[Any]] = []
    seen = {os.path.realpath(folder)}
    for place, below, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(below)}
        below[:] = [name for name, path in real.items() if path not in seen]
        seen.update(real.values())
        for path in (Path(place, name) for name in names):
            if path.is_file():
                found = path.stat()
                entries.append([path.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns])
    return digest_of(sorted(entries))
