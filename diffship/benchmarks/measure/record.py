"""A results file: rows, the command and the machine that made them, and a digest that shows edits by hand.

docs/schema/results/v2.json is its form, docs/benchmarks.md says what the fields mean.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffship.benchmarks.catalogue import of_suite
from diffship.benchmarks.freshness import changed_since, suite_digest
from diffship.benchmarks.measure.machine import environment, hardware
from diffship.benchmarks.measure.row import Row
from diffship.core.atomic import write_file
from diffship.core.brief import brief
from diffship.core.document import read_json
from diffship.core.errors import ConfigError
from diffship.core.strict import load

SCHEMA = 2
NO_CODE = "0" * 64  # the digest of figures that no one state of the code made
_BEGAN = time.time()  # this module is imported before anything is measured
FILE_BYTES = 64 << 20
_SIGNED = ("suite", "command", "code", "environment", "settings", "rows")


@brief
@dataclass(frozen=True)
class Results:
    """One results file. `code` digests what the figures depend on (freshness), `settings` say how to repeat them."""

    suite: str
    command: str
    code: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def hardware(self) -> str:
        return hardware(self.environment)

    def to_json(self) -> dict[str, Any]:
        """The file's content, digest included; the environment stands once, not in every row."""
        rows = [{key: value for key, value in asdict(row).items() if key != "environment"} for row in self.rows]
        head = {"suite": self.suite, "command": self.command, "code": self.code}
        signed = {**head, "environment": self.environment, "settings": self.settings, "rows": rows}
        return {"schema": SCHEMA, **signed, "digest": content_digest(signed)}


def write_result(
    file: Path, suite: str, command: str, rows: Sequence[Row], settings: Mapping[str, object] | None = None
) -> Results:
    """Write one suite measured on this machine as JSON, whole or not at all."""
    made = Results(suite, command, code_of(suite, runners(rows)), environment(), dict(settings or {}), tuple(rows))
    save(file, made)
    return made


def code_of(suite: str, runners: Iterable[str]) -> str:
    """The digest of the code that measured a suite in this process (`freshness.digest`).

    NO_CODE, and a line on stderr, if any of it was changed since the process began: what is on the disk now is not what
    ran, and figures under its digest would pass for fresh.
    """
    names = tuple(runners)
    changed = changed_since(_BEGAN, of_suite(suite), names)
    if not changed:
        return suite_digest(suite, names)
    told = f"{changed[0]} and {len(changed) - 1} others" if len(changed) > 1 else changed[0]
    print(f"{suite}: {told} changed while it was measured, so its figures will be stale", file=sys.stderr)
    return NO_CODE


def runners(rows: Iterable[Row]) -> set[str]:
    """Names of the runners that rows are of."""
    return {str(row.conditions["runner"]) for row in rows if "runner" in row.conditions}


def save(file: Path, results: Results) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(results.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_result(file: Path) -> Results:
    """A results file of this schema whose digest is right; its rows carry the file's environment.

    Raises:
        ConfigError: not readable, another schema, edited by hand, or not of the documented form.
    """
    content = read_json(file, FILE_BYTES)
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        raise ConfigError(_other_schema(file, schema, content.get("command")))
    digest = content.pop("digest", None)
    if not isinstance(content.get("rows"), list) or digest != content_digest(content):
        raise ConfigError(
            f"{file}: its digest does not match its content, so it was edited by hand. "
            f"Measure again: {str(content.get('command'))[:300]}"
        )
    results = load(Results, content, str(file))
    return replace(results, rows=tuple(replace(row, environment=results.environment) for row in results.rows))


def content_digest(content: Mapping[str, object]) -> str:
    """sha256 over everything that a reader relies on, in canonical JSON."""
    signed = {key: content.get(key) for key in _SIGNED}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _other_schema(file: Path, schema: object, command: object) -> str:
    text = f"{file} has schema {str(schema)[:20]}, this version reads {SCHEMA}"
    if isinstance(schema, int) and schema > SCHEMA:
        return f"{text}. A newer diffship wrote it: pip install -U diffship"
    return f"{text}. Measure it again with this version: {str(command or 'diffship bench --help')[:300]}"
