"""What is tried so far: one line of JSON for each trial, in files of a work folder that several processes share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffship.benchmarks.studies.mutation.mutant import Mutant, Outcome
from diffship.core.atomic import write_file
from diffship.core.document import read_json
from diffship.core.errors import ConfigError
from diffship.core.strict import load

try:
    import fcntl
except ImportError:  # Windows: one process at a time prepares a run, or several make the same bundles
    fcntl = None  # type: ignore[assignment]

_SETTINGS, _PLAN, _LOCK = "settings.json", "plan.json", "lock"
_PLAN_BYTES = 64 << 20
SCORE, RESOLUTION, SOUND = "score", "resolution", "sound"


@dataclass(frozen=True)
class Trial:
    """role: "score", "resolution" or "sound" (an export of a random pipeline, which `seed` names)."""

    role: str
    precision: str
    mutant: Mutant | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps([self.role, self.precision, self.mutant and self.mutant.to_json(), self.seed])


class Ledger:
    """The lines of one run in `folder`; `settings` say which run it is."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], shard: str = "1-of-1") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"trials-{shard}.jsonl"
        self._settings = dict(settings)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other process prepares this run."""
        with open(self.folder / _LOCK, "w", encoding="utf-8") as lock:
            if fcntl is not None:
                # no timeout: preparing is an export, which ends; the lock ends with its process
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def claim(self) -> None:
        """Take the folder for this run.

        Raises:
            ConfigError: it holds another one.
        """
        file = self.folder / _SETTINGS
        if not file.exists():
            write_file(file, json.dumps(self._settings))
        found = read_json(file, _PLAN_BYTES)
        odd = [name for name in (*found, *self._settings) if found.get(name) != self._settings.get(name)]
        if odd:
            raise ConfigError(
                f"{self.folder} holds another run: its {odd[0]} was {str(found.get(odd[0]))[:60]!r}, "
                f"now {str(self._settings.get(odd[0]))[:60]!r}. Choose another --work"
            )

    def plan(self) -> list[Trial] | None:
        """The trials of the run, if they are drawn already."""
        file = self.folder / _PLAN
        return [_trial(entry) for entry in read_json(file, _PLAN_BYTES)["trials"]] if file.exists() else None

    def keep_plan(self, trials: list[Trial]) -> None:
        write_file(self.folder / _PLAN, json.dumps({"trials": [asdict(trial) for trial in trials]}))

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Write one line, whole, to the disk."""
        line = json.dumps({"trial": asdict(trial), "outcome": asdict(outcome)})
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> dict[str, tuple[Trial, Outcome]]:
        """Every finished trial by key, of all shards; a line that a crash cut off is tried again."""
        found = {}
        for file in sorted(self.folder.glob("trials-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                trial = _trial(entry["trial"])
                found[trial.key] = trial, load(Outcome, entry["outcome"], str(file))
        return found


def _trial(entry: Mapping[str, Any]) -> Trial:
    mutant = entry["mutant"]
    return Trial(entry["role"], entry["precision"], mutant and Mutant(**mutant), entry["seed"])
