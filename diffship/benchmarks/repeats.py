"""Do the ratios of a suite repeat? Several runs of one suite, same code and machine, become one results file.

    python -m diffship.benchmarks.repeats RUN.json RUN.json RUN.json --out benchmarks/results/cpu-edge-repeats.json

A row per ratio: the most that a run lies away from the median of the runs, as a share of it; low and high are the
least and the largest ratio.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.benchmarks.entry import enter
from diffship.benchmarks.record import Results, read_result, save
from diffship.core.errors import ConfigError
from diffship.core.row import Row

METRIC = "ratio_deviation"


def repeats(runs: Sequence[Results]) -> Results:
    """The deviation of every ratio that all runs measured, largest first, in the environment of the first run.

    Raises:
        ConfigError: fewer than two runs, or runs of different suites, code or machines.
    """
    first = runs[0] if runs else None
    if first is None or len(runs) < 2:
        raise ConfigError("at least two runs are compared")
    for other in runs[1:]:
        if (other.suite, other.code, other.hardware) != (first.suite, first.code, first.hardware):
            raise ConfigError(f"the runs of {first.suite} differ in suite, code or machine; measure them again")
    name = f"{first.suite}-repeats"
    found = [_ratios(run) for run in runs]
    common = [key for key in found[0] if all(key in other for other in found)]
    rows = [_row(name, found[0][key], [float(other[key].value or 0) for other in found]) for key in common]
    rows.sort(key=lambda row: -(row.value or 0))
    return replace(first, suite=name, command=_command(first.suite, len(runs)), rows=tuple(rows))


def _ratios(run: Results) -> dict[tuple[Any, ...], Row]:
    rows = [row for row in run.rows if "against" in row.conditions and row.value is not None]
    return {(row.subject, row.metric): row for row in rows}


def _row(suite: str, row: Row, values: Sequence[float]) -> Row:
    middle = statistics.median(values)
    deviation = max(abs(value / middle - 1) for value in values)
    spread: dict[str, Any] = {"low": min(values), "high": max(values), "n": len(values)}
    conditions = {**row.conditions, "of": row.metric}
    return Row(suite, row.subject, METRIC, deviation, "", conditions=conditions, **spread)


def _command(suite: str, count: int) -> str:
    runs = [f"{suite}-{number}.json" for number in range(1, count + 1)]
    each = f"diffship bench --suite {suite} -o RUN.json ({count} times); "
    return f"{each}python -m diffship.benchmarks.repeats {' '.join(runs)} --out {suite}-repeats.json"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    made = repeats([read_result(file) for file in arguments.runs])
    save(arguments.out, made)
    for row in made.rows:
        print(f"{row.subject:70} {row.value or 0:6.1%}   {row.low:.3f} to {row.high:.3f}")


if __name__ == "__main__":
    enter(main)
