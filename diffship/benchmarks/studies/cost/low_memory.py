"""A whole picture in a fresh process, as it is and with `--memory low`: seconds and peak memory.

python -m diffship.benchmarks low-memory [--source SOURCE | --bundle BUNDLE] [--size 1024]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.measure.process import Measured, measure
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work, bundle
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.quiet import timing

SUITE = "low-memory"
SOURCE = "arch:koala-700m+taesd"
MODES = {"as it is": (), "--memory low": ("--memory", "low")}
_SECONDS = 3600


def rows_of(bundle: Path, name: str, size: int, steps: int) -> Iterator[Row]:
    """Both modes, one after the other, without guidance; of two runs the second counts.

    Raises:
        ConfigError: the command failed; its last words are named.
    """
    for mode, flags in MODES.items():
        subject = f"{name}, {size} px, {steps} steps, {mode}"
        words = ["run", str(bundle), "a red apple", "--size", str(size), "--steps", str(steps), "--guidance", "1"]
        _measured(subject, [*words, *flags])  # so that the files are in memory
        measured = _measured(subject, [*words, *flags])
        conditions = {"model": name, "size": size, "steps": steps, "memory": mode}
        yield Row(SUITE, subject, "process_seconds", measured.seconds, "s", conditions=conditions)
        peak = float(measured.peak_bytes)
        yield Row(SUITE, subject, "peak_resident_bytes", peak, "bytes", kind="memory", conditions=conditions)


def _measured(subject: str, words: Sequence[str]) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "diffship", *words, "-o", f"{folder}/picture.png"]
        measured = measure(command, timeout=_SECONDS)
    if measured.code:
        raise ConfigError(f"{subject}: ended with {measured.code}: {measured.output[-400:]}")
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=SOURCE, help=f"what is exported first ({SOURCE})")
    parser.add_argument("--bundle", type=named_bundle, help="one that is there already")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    add_work(parser)
    arguments = parser.parse_args(argv)
    folder = arguments.bundle or bundle(arguments.source, arguments.work)
    name = Bundle.open(folder).manifest.source["id"]
    with timing(SUITE):
        rows = list(rows_of(folder, name, arguments.size, arguments.steps))
    if arguments.out:
        command = f"python -m diffship.benchmarks low-memory --source {name} --size {arguments.size}"
        command += f" --steps {arguments.steps}"
        write_result(arguments.out, SUITE, command, rows, {"source": name})
    for row in rows:
        print(f"{row.subject:60} {row.metric:20} {row.value} {row.unit}")


if __name__ == "__main__":
    enter(main)
