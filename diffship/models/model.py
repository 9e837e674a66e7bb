"""PipelineModel: a pipeline opened on torch, behind the protocol that `generate` needs."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from diffship.core.brief import brief_text
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.runner import Runner
from diffship.models.digests import remembered_digest
from diffship.models.pipeline import Pipeline
from diffship.sampling.tokenizer import Tokenizer


class PipelineModel:
    """A Model on torch. Threads may share it; a part is loaded once and kept until `release`."""

    def __init__(self, pipeline: Pipeline, device: str = "cpu", dtype: str | None = None) -> None:
        self.pipeline = pipeline
        self.device = device
        self.dtype = dtype
        self.name: str = str(pipeline.source.get("id", "pipeline"))
        self.notes: tuple[str, ...] = tuple(pipeline.source.get("notes", ()))  # what of the source is left out
        self.family: Family = pipeline.family
        self.scheduler: Mapping[str, Any] = dict(pipeline.scheduler)
        self.parts: frozenset[str] = frozenset(pipeline.components)
        self.tokenizers: Mapping[str, Tokenizer] = {
            name: pipeline.family.kind.tokenizer(name, files) for name, files in pipeline.tokenizers.items()
        }
        self._runners: dict[str, Runner] = {}
        self._locks = {part: threading.Lock() for part in self.parts}
        self.load_seconds = 0.0  # spent so far on opening parts

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """By part: sha256 over its source tensors (core.weights.source_digest); the first time it reads all of them."""
        return {name: remembered_digest(self.pipeline.components[name].weights) for name in sorted(self.parts)}

    @cached_property
    def digest(self) -> str:
        """sha256 over the parts' source digests, equal to that of a bundle of the same weights."""
        lines = (f"{name} {digest}\n" for name, digest in self.digests.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __repr__(self) -> str:
        return brief_text(self, name=self.name, device=self.device, dtype=self.dtype, parts=self.parts)

    def use(self, part: str) -> Runner:
        """The runner of `part`, loaded on first use and kept until `release` or `close`."""
        if part not in self._locks:
            raise ConfigError(f"{self.name} has no part {part!r}; it has {', '.join(sorted(self.parts))}")
        with self._locks[part]:
            if part not in self._runners:
                begin = time.perf_counter()
                component = self.pipeline.components[part]
                narrow = self.dtype == "float16" and component.overflows_half
                self._runners[part] = component.load(self.device, "float32" if narrow else self.dtype)
                self.load_seconds += time.perf_counter() - begin
            return self._runners[part]

    def release(self, part: str) -> None:
        """Free the part's memory; the next `use` loads it again."""
        if part in self._locks:
            with self._locks[part]:
                runner = self._runners.pop(part, None)
            if runner is not None:
                runner.close()

    def close(self) -> None:
        for part in self.parts:
            self.release(part)

    def __enter__(self) -> PipelineModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
