"""Rows of the results file: scores, what was caught by part and kind, who survived, and false alarms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.mutation.ledger import RESOLUTION, SCORE, SOUND, Trial
from diffship.benchmarks.studies.mutation.modules import LOSE_LAYER
from diffship.benchmarks.studies.mutation.mutant import GRAPH, Mutant, Outcome
from diffship.benchmarks.studies.mutation.trial import ALARM, CAUGHT, CLEAN, NOT_MADE, NOT_OPENED, SURVIVED

SUITE = "mutation"
SURVIVORS, EXCLUDED = "survivor_margin_db", "excluded_margin_db"
KEPT = {
    SURVIVORS: "Survived, with what was left to the limit",
    EXCLUDED: "Left out, as the fp32 proof passes them",
}
RESOLUTION_OF = {"tensor scaled by 1 %": "one tensor 1 % larger", "tensor rounded to int8": "one tensor in int8"}
_REASONS = 2000  # letters
Entry = tuple[Trial, Outcome]


@dataclass(frozen=True)
class Tally:
    """Mutants that the fp32 proof tells from the sound part, with what a precision made of them."""

    caught: int
    tried: int

    @property
    def percent(self) -> float | None:
        return 100 * self.caught / self.tried if self.tried else None


def rows(entries: Iterable[Entry], layers: Callable[[Mutant], bool]) -> list[Row]:
    """All rows of a run. layers: whether a mutant lost a whole layer."""
    listed = list(entries)
    scored = [entry for entry in listed if entry[0].role == SCORE]
    equivalent = excluded(scored)
    counted = [entry for entry in scored if entry[0].mutant not in equivalent]
    found = [*_scores(scored, counted, layers), *_kinds(counted), *_survivors(counted, layers)]
    found += _exclusions(scored, equivalent)
    found += _resolution([entry for entry in listed if entry[0].role == RESOLUTION])
    return [*found, *_alarms([entry for entry in listed if entry[0].role == SOUND])]


def loses_layer(mutant: Mutant, removed: set[Mutant]) -> bool:
    """Whether a mutant lost a whole layer. removed: edits of graphs that took out an operator with weights."""
    return mutant in removed if mutant.way == GRAPH else mutant.kind in LOSE_LAYER


def excluded(scored: Sequence[Entry]) -> set[Mutant | None]:
    """Mutants that the proof of the fp32 part lets through: they compute the same, or it cannot tell."""
    return {trial.mutant for trial, outcome in scored if trial.precision == "fp32" and outcome.status == SURVIVED}


def tally(entries: Iterable[Entry]) -> Tally:
    """Counts of the mutants that the engine opens."""
    found = [outcome.status for _, outcome in entries if outcome.status in (CAUGHT, SURVIVED)]
    return Tally(found.count(CAUGHT), len(found))


def _scores(scored: Sequence[Entry], counted: Sequence[Entry], layers: Callable[[Mutant], bool]) -> Iterator[Row]:
    for precision in _precisions(scored):
        mine, drawn = ([e for e in side if e[0].precision == precision] for side in (counted, scored))
        found = tally(mine)
        yield _row(precision, "mutation_score", found.percent, "%", found.tried, precision=precision)
        yield _row(precision, "mutants_caught", found.caught, "", found.tried, precision=precision)
        yield _row(precision, "mutants_tried", found.tried, "", found.tried, precision=precision)
        yield _row(precision, "caught_of_drawn", tally(drawn).percent, "%", tally(drawn).tried, precision=precision)
        whole = [outcome.whole for _, outcome in mine if outcome.whole is not None]
        share = 100 * sum(whole) / len(whole) if whole else None
        yield _row(precision, "whole_part_score", share, "%", len(whole), precision=precision)
        lost = [e for e in mine if e[0].mutant is not None and layers(e[0].mutant)]
        missed = tally(lost).tried - tally(lost).caught
        yield _row(precision, "lost_layers_survived", missed, "", tally(lost).tried, precision=precision)
        for status in (NOT_OPENED, NOT_MADE):
            found_so = [f"{t.mutant.name}: {o.why}" for t, o in drawn if o.status == status and t.mutant is not None]
            row = _row(precision, f"mutants_{status.replace(' ', '_')}", len(found_so), "", len(drawn))
            yield replace(row, reason="; ".join(found_so)[:_REASONS], conditions={"precision": precision})


def _kinds(counted: Sequence[Entry]) -> Iterator[Row]:
    groups: dict[tuple[str, str, str, str], list[Entry]] = defaultdict(list)
    for trial, outcome in counted:
        if trial.mutant is not None:
            groups[trial.precision, trial.mutant.part, trial.mutant.way, trial.mutant.kind].append((trial, outcome))
    for (precision, part, way, kind), entries in sorted(groups.items()):
        found = tally(entries)
        where = {"precision": precision, "part": part, "way": way, "kind": kind}
        yield _row(f"{precision}, {part}, {way}, {kind}", "caught", found.caught, "", found.tried, **where)


def _survivors(counted: Sequence[Entry], layers: Callable[[Mutant], bool]) -> Iterator[Row]:
    for trial, outcome in counted:
        if outcome.status == SURVIVED and trial.mutant is not None:
            where = {"precision": trial.precision, "lost_layer": layers(trial.mutant)}
            yield _listed(trial, outcome, SURVIVORS, **where)


def _exclusions(scored: Sequence[Entry], equivalent: set[Mutant | None]) -> Iterator[Row]:
    drawn = {trial.mutant for trial, _ in scored}
    share = 100 * len(equivalent) / len(drawn) if drawn else None
    yield _row("all", "excluded_share", share, "%", len(drawn))
    for trial, outcome in scored:
        if trial.precision == "fp32" and trial.mutant in equivalent:
            yield _listed(trial, outcome, EXCLUDED, precision="fp32")


def _listed(trial: Trial, outcome: Outcome, metric: str, **where: object) -> Row:
    assert trial.mutant is not None
    conditions = {**where, "closest": outcome.closest}
    reason = "" if outcome.margin_db is not None else "no figure is finite"
    name = f"{trial.precision}: {trial.mutant.name}"
    return Row(SUITE, name, metric, outcome.margin_db, "dB", kind="quality", reason=reason, conditions=conditions)


def _resolution(entries: Sequence[Entry]) -> Iterator[Row]:
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for trial, outcome in entries:
        if trial.mutant is not None:
            groups[trial.precision, trial.mutant.kind].append((trial, outcome))
    for (precision, kind), found in sorted(groups.items()):
        count = tally(found)
        yield _row(
            f"{precision}, {kind}", "resolution", count.percent, "%", count.tried, precision=precision, kind=kind
        )


def _alarms(entries: Sequence[Entry]) -> Iterator[Row]:
    for precision in _precisions(entries):
        mine = [(trial, outcome) for trial, outcome in entries if trial.precision == precision]
        alarms = [f"{trial.seed}: {outcome.why}" for trial, outcome in mine if outcome.status == ALARM]
        conditions = {"precision": precision}
        yield Row(
            SUITE,
            f"{precision}, random pipelines",
            "false_alarms",
            len(alarms),
            kind="quality",
            n=sum(outcome.status in (ALARM, CLEAN) for _, outcome in mine),
            reason="; ".join(alarms)[:_REASONS],
            conditions=conditions,
        )
        margins = [
            outcome.margin_db for _, outcome in mine if outcome.status == CLEAN and outcome.margin_db is not None
        ]
        if margins:
            name = f"{precision}, random pipelines"
            yield _row(name, "least_margin_db", min(margins), "dB", len(margins), precision=precision)


def _precisions(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(trial.precision for trial, _ in entries))


def _row(subject: str, metric: str, value: float | None, unit: str, n: int, **conditions: object) -> Row:
    reason = "" if value is not None else "nothing was tried"
    status = "ok" if value is not None else "skipped"
    return Row(SUITE, subject, metric, value, unit, status, kind="quality", n=n, reason=reason, conditions=conditions)
