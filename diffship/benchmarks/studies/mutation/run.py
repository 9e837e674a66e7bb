"""A whole run: bundles and plan are made once, trials are shared among processes, the results file comes last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from diffship.benchmarks.catalogue import results_file
from diffship.benchmarks.freshness import digest
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.mutation.graphs import loses_layer as removes_layer
from diffship.benchmarks.studies.mutation.ledger import RESOLUTION, SCORE, SOUND, Ledger, Trial
from diffship.benchmarks.studies.mutation.mutant import GRAPH, Mutant, Outcome
from diffship.benchmarks.studies.mutation.plan import draw
from diffship.benchmarks.studies.mutation.random_source import PREFIX, random_pipeline
from diffship.benchmarks.studies.mutation.report import loses_layer, rows
from diffship.benchmarks.studies.mutation.taps import Taps
from diffship.benchmarks.studies.mutation.trial import try_graph, try_module, try_sound
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.export import export
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source


@dataclass(frozen=True)
class Settings:
    """What a run is: `count` mutants of `sources`, each in every one of `precisions`, and `exports` sound ones."""

    sources: tuple[str, ...]
    precisions: tuple[str, ...]
    count: int
    exports: int
    seed: int

    def to_json(self) -> dict[str, object]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Run:
    """One process of a run; `shard` (1 to `shards`) says which trials are its own."""

    def __init__(
        self, settings: Settings, work: Path, shard: int = 1, shards: int = 1, say: Callable[[str], object] = print
    ) -> None:
        self.settings, self.shard, self.shards, self._say = settings, shard, shards, say
        self.work = work.absolute()
        about = {**settings.to_json(), "code": digest(results_file("mutation"))}
        self.ledger = Ledger(self.work, about, f"{shard}-of-{shards}")
        self._scratch = self.work / f"scratch-{shard}-of-{shards}"
        self.ledger.claim()
        self.pipeline = cache(opened)
        self._job = Job(self.work / "bundles")
        self.bundle = cache(self._bundle)

    def run(self) -> None:
        """Everything of this shard that is not done yet. What a process that was killed left of its trials goes."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        for trials in (self._sound, self._mutants) if self.shard > 1 else (self._mutants, self._sound):
            self._try([trial for index, trial in enumerate(trials()) if index % self.shards == self.shard - 1])

    def rows(self) -> list[Row] | None:
        """The rows of the run; None while trials of other processes are missing."""
        done = self.ledger.done()
        planned = [*(self.ledger.plan() or ()), *self._sound()]
        if self.ledger.plan() is None or any(trial.key not in done for trial in planned):
            return None
        entries = [done[trial.key] for trial in planned]
        removed = self._removed([trial.mutant for trial in planned if trial.mutant is not None])
        return rows(entries, lambda mutant: loses_layer(mutant, removed))

    def _removed(self, mutants: Sequence[Mutant]) -> set[Mutant]:
        taps = cache(lambda source, part: Taps(self.bundle(source, "fp32"), self.bundle(source, "fp32").part(part)))
        edits = {mutant for mutant in mutants if mutant.way == GRAPH}
        return {mutant for mutant in edits if removes_layer(mutant, taps(mutant.source, mutant.part).model)}

    def _sound(self) -> list[Trial]:
        """Random pipelines, with the precisions in turn."""
        first, kinds = 1000 * self.settings.seed, self.settings.precisions
        return [Trial(SOUND, kinds[index % len(kinds)], seed=first + index) for index in range(self.settings.exports)]

    def _mutants(self) -> list[Trial]:
        with self.ledger.alone():
            found = self.ledger.plan()
            if found is None:
                found = self._drawn()
                self.ledger.keep_plan(found)
        return found

    def _drawn(self) -> list[Trial]:
        settings = self.settings
        for source in settings.sources:
            for precision in dict.fromkeys(("fp32", *settings.precisions)):
                self._say(f"bundle of {source}, {precision}")
                self.bundle(source, precision)
        pipelines = {source: self.pipeline(source) for source in settings.sources}
        bundles = {source: self.bundle(source, "fp32") for source in settings.sources}
        self._say("drawing mutants")
        plan = draw(pipelines, bundles, settings.count, settings.seed)
        kinds = dict.fromkeys(("fp32", *settings.precisions))  # fp32 says which of them are other networks
        return [
            Trial(role, precision, mutant)
            for role, mutants in ((SCORE, plan.score), (RESOLUTION, plan.resolution))
            for mutant in mutants
            for precision in kinds
        ]

    def _try(self, trials: Sequence[Trial]) -> None:
        done = self.ledger.done()
        waiting = [trial for trial in trials if trial.key not in done]
        started = time.monotonic()
        for index, trial in enumerate(waiting):
            outcome = self._tried(trial)
            self.ledger.add(trial, outcome)
            left = (time.monotonic() - started) / (index + 1) * (len(waiting) - index - 1)
            name = f"{PREFIX}{trial.seed}" if trial.mutant is None else trial.mutant.name
            head = f"{index + 1}/{len(waiting)}, {left / 60:.0f} min left: {outcome.status:10}"
            self._say(f"{head} {trial.precision} {name}")

    def _tried(self, trial: Trial) -> Outcome:
        mutant = trial.mutant
        if mutant is None:
            return try_sound(random_pipeline(trial.seed), trial.precision, self._scratch)
        if mutant.way == GRAPH:
            return try_graph(self.bundle(mutant.source, trial.precision), mutant, self._scratch)
        return try_module(self.pipeline(mutant.source), mutant, trial.precision, self._scratch, self._job)

    def _bundle(self, source: str, precision: str) -> Bundle:
        name = "".join(letter if letter.isalnum() else "-" for letter in source)

        def make(out: Path) -> None:
            export(self.pipeline(source), "onnx", out, precision=precision)

        return Bundle.open(self._job.once(f"{name}-{precision}".lower(), make))


def opened(source: str) -> Pipeline:
    """A source as any verb takes it, or `random:SEED`."""
    if not source.startswith(PREFIX):
        return open_source(source)
    seed = source.removeprefix(PREFIX)
    if not (seed.isascii() and seed.isdigit() and len(seed) < 10):
        raise ConfigError(f"{source[:60]!r} is no random pipeline; legal: {PREFIX}0, {PREFIX}1, ...")
    return random_pipeline(int(seed))
