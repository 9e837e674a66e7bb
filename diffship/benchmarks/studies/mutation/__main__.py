"""How many faults the proof catches, and how often it is wrong: the mutation score of the gate.

    python -m diffship.benchmarks mutation [--work DIR] [--count N] [--exports N] [--shard K/N]

Each mutant is one fault in one part, made in the network (and sent through export) or in the file of a proved bundle
(and sent through verify). It is tried in every precision; one that the fp32 proof lets through does not count, and is
listed. Sound exports of random tiny pipelines count false alarms.

What is tried is kept in the work folder, so that the same command goes on after an interruption. Processes with
--shard 1/2 and --shard 2/2 and one work folder share the work; the last one to end writes the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.studies.mutation.mutant import PRECISIONS
from diffship.benchmarks.studies.mutation.report import SUITE
from diffship.benchmarks.studies.mutation.run import Run, Settings
from diffship.benchmarks.studies.workbench import WORK
from diffship.core.errors import ConfigError
from diffship.core.strict import unknown

SOURCES = ("arch:tiny-sd", "arch:tiny-sdxl", "arch:tiny-lcm", "arch:tiny-inpaint", "arch:tiny-sd+taesd", "emoji")
COMMAND = "python -m diffship.benchmarks mutation"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    shard, shards = _shard(arguments.shard)
    precisions = tuple(arguments.precisions.split(","))
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ConfigError(unknown("precision", precision, PRECISIONS))
    sources = tuple(arguments.sources.split(","))
    settings = Settings(sources, precisions, arguments.count, arguments.exports, arguments.seed)
    run = Run(settings, arguments.work, shard, shards, lambda text: print(text, flush=True))
    run.run()
    found = run.rows()
    if found is None:
        print(f"{arguments.out} is not written yet: trials of other processes are missing in {arguments.work}")
        return
    write_result(arguments.out, SUITE, COMMAND, found, settings.to_json())
    for row in found:
        if row.unit == "%" or row.metric in ("false_alarms", "lost_layers_survived"):
            value = "-" if row.value is None else f"{row.value:.2f}"
            print(f"{row.subject:40} {row.metric:24} {value} {row.unit} of {row.n}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the results file")
    parser.add_argument("--work", type=Path, default=WORK / "mutation", help="keeps bundles and trials")
    parser.add_argument("--count", type=int, default=1000, help="mutants (1000), two thirds of them edits of graphs")
    parser.add_argument("--exports", type=int, default=200, help="sound exports of random pipelines (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", default=",".join(SOURCES), help="comma-separated; random:SEED is one too")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="of N processes this is the Kth")
    return parser


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last) <= 64):
        raise ConfigError(f"--shard {text[:20]!r} is not legal; for example 1/2 and 2/2, in two terminals")
    return int(first), int(last)


if __name__ == "__main__":
    enter(main)
