"""What is done, in one JSON file that is rewritten after every step: a step with the same inputs is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.atomic import write_file
from diffship.core.document import read_json
from diffship.core.errors import ConfigError
from diffship.core.strict import choices, load, plain

SCHEMA = 1
MAX_BYTES = 16 << 20
RESULTS = ("ok", "failed", "OOM", "blocked")


@dataclass(frozen=True)
class Outcome:
    """One step of one checkpoint. `facts` are its figures, `reason` is one line where it is not ok."""

    result: str = field(metadata=choices(*RESULTS))
    digest: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    schema: int
    steps: dict[str, dict[str, Outcome]]


class State:
    """Outcomes by checkpoint and step, kept in `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._steps: dict[str, dict[str, Outcome]] = _read(file)

    def get(self, checkpoint: str, step: str) -> Outcome | None:
        return self._steps.get(checkpoint, {}).get(step)

    def kept(self, checkpoint: str, step: str, digest: str) -> Outcome | None:
        """The outcome, where the step went well before with inputs of this digest."""
        found = self.get(checkpoint, step)
        return found if found and found.result == "ok" and found.digest == digest else None

    def put(self, checkpoint: str, step: str, outcome: Outcome) -> None:
        """Record and write; what later steps of the checkpoint made of the old outcome is forgotten by its digest."""
        self._steps.setdefault(checkpoint, {})[step] = outcome
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps(plain(_File(SCHEMA, self._steps)), indent=1) + "\n")

    def of(self, checkpoint: str) -> Mapping[str, Outcome]:
        """Steps of one checkpoint in the order in which they were first done."""
        return dict(self._steps.get(checkpoint, {}))


def digest(inputs: Mapping[str, object]) -> str:
    """sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, Outcome]]:
    if not file.is_file():
        return {}
    data = read_json(file, MAX_BYTES)
    if data.get("schema") != SCHEMA:
        raise ConfigError(f"{file}: is of schema {data.get('schema')!r}, this version writes {SCHEMA}; remove it")
    return load(_File, data, file.name).steps
