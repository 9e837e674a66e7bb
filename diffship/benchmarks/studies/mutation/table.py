"""The mutation score as a table, a line for each precision; who survived stands below it."""

from __future__ import annotations

from collections.abc import Iterator

from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.report.table import DASH, Table
from diffship.benchmarks.report.tables import origin
from diffship.benchmarks.studies.mutation.report import KEPT, RESOLUTION_OF

HEAD = (
    "precision",
    "mutants",
    "caught",
    "caught by whole outputs alone",
    "lost layers that passed",
    *RESOLUTION_OF.values(),
    "false alarms",
)


def proof_table(results: Results) -> Table:
    """The table of a file that `python -m diffship.benchmarks mutation` wrote."""
    rows = {(row.subject, row.metric): row for row in results.rows}
    precisions = [row.subject for row in results.rows if row.metric == "mutation_score"]
    return Table(
        HEAD, tuple(_line(precision, rows) for precision in precisions), tuple(_notes(results)), origin(results)
    )


def _line(precision: str, rows: dict[tuple[str, str], Row]) -> tuple[str, ...]:
    score = rows[precision, "mutation_score"]
    small = (rows.get((f"{precision}, {kind}", "resolution")) for kind in RESOLUTION_OF)
    alarms = rows.get((f"{precision}, random pipelines", "false_alarms"))
    return (
        precision,
        str(score.n),
        _percent(score),
        _percent(rows.get((precision, "whole_part_score"))),
        _of(rows.get((precision, "lost_layers_survived"))),
        *map(_percent, small),
        _of(alarms),
    )


def _percent(row: Row | None) -> str:
    return DASH if row is None or row.value is None else f"{row.value:.2f} %"


def _of(row: Row | None) -> str:
    return DASH if row is None or row.value is None else f"{row.value:.0f} of {row.n}"


def _notes(results: Results) -> Iterator[str]:
    listed = {metric: [row for row in results.rows if row.metric == metric] for metric in KEPT}
    for metric, what in KEPT.items():
        names = [f"{row.subject} ({DASH if row.value is None else f'{row.value:.1f} dB'})" for row in listed[metric]]
        yield f"{what}: {'; '.join(names) or 'none'}."
