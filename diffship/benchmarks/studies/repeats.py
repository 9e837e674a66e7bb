"""Do the ratios of a suite repeat? Several runs of one suite, same code and machine, become one results file.

    python -m diffship.benchmarks cpu-edge-repeats
    python -m diffship.benchmarks.studies.repeats RUN.json RUN.json RUN.json --out FILE.json

The first measures the suite three times. A row per ratio: the most that a run lies away from the median of the runs,
as a share of it; low and high are the least and the largest ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.benchmarks.catalogue import of_suite
from diffship.benchmarks.entry import enter
from diffship.benchmarks.freshness import derived
from diffship.benchmarks.measure.record import Results, read_result, runners, save
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work
from diffship.core import child
from diffship.core.errors import ConfigError

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
    code = derived(of_suite(name), first.code, runners(first.rows))
    return replace(first, suite=name, command=f"python -m diffship.benchmarks {name}", code=code, rows=tuple(rows))


def _ratios(run: Results) -> dict[tuple[Any, ...], Row]:
    rows = [row for row in run.rows if "against" in row.conditions and row.value is not None]
    return {(row.subject, row.metric): row for row in rows}


def _row(suite: str, row: Row, values: Sequence[float]) -> Row:
    middle = statistics.median(values)
    deviation = max(abs(value / middle - 1) for value in values)
    spread: dict[str, Any] = {"low": min(values), "high": max(values), "n": len(values)}
    conditions = {**row.conditions, "of": row.metric}
    return Row(suite, row.subject, METRIC, deviation, "", conditions=conditions, **spread)


def measure(suite: str, times: int, work: Path) -> list[Path]:
    """Run the verb `bench` so many times; the files that it wrote.

    Raises:
        ConfigError: one of the runs failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"{suite}-{number}.json" for number in range(1, times + 1)]
    for file in files:
        words = ["bench", "--suite", suite, "-o", str(file), "--overwrite", "--work", str(work / "bench")]
        # no timeout: every row of it has one
        if subprocess.run(child.command("diffship", *words), env=child.environment()).returncode or not file.is_file():
            raise ConfigError(f"a run of {suite} failed: diffship {' '.join(words)}")
    return files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="runs that are there already")
    parser.add_argument("--suite", default="cpu-edge", help="what is measured if no runs are named (cpu-edge)")
    parser.add_argument("--times", type=int, default=3)
    add_work(parser)
    arguments = parser.parse_args(argv)
    files = arguments.runs or measure(arguments.suite, arguments.times, arguments.work)
    made = repeats([read_result(file) for file in files])
    if arguments.out:
        save(arguments.out, made)
    for row in made.rows:
        print(f"{row.subject:70} {row.value or 0:6.1%}   {row.low:.3f} to {row.high:.3f}")


if __name__ == "__main__":
    enter(main)
