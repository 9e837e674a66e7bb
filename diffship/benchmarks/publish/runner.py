"""Measure the project's results files, one command each; without a name, say which are fresh.

    python -m diffship.benchmarks [NAME [arguments of its own]]
    python -m diffship.benchmarks sentinels

NAME measures `benchmarks/results/NAME.json` anew, in the folder that holds `benchmarks/`. What it needs (bundles,
pictures, environments) it makes under `runs/benchmarks`. While something is timed, no training runs, and the reverse.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.catalogue import BENCH, FILES, ResultsFile, results_file
from diffship.benchmarks.publish.pages import RESULTS, states
from diffship.benchmarks.studies.workbench import WORK
from diffship.core import child
from diffship.core.errors import ConfigError

SENTINELS = "sentinels"


def command(entry: ResultsFile, more: Sequence[str] = ()) -> list[str]:
    """The words that measure a file: of the verb `bench`, or of the entry's own module."""
    file = RESULTS / f"{entry.name}.json"
    words = [*entry.words, *more, *(["-o"] if entry.module == BENCH else ["--out"]), str(file)]
    return ["bench", *words, "--work", str(WORK / "bench"), "--resume"] if entry.module == BENCH else words


def measure(entry: ResultsFile, more: Sequence[str]) -> int:
    """Measure one file; the exit code."""
    if not RESULTS.parent.is_dir():
        raise ConfigError(f"there is no {RESULTS.parent} here: run this in a clone of diffship")
    words = command(entry, more)
    if entry.module == BENCH:
        # no timeout: every row of it has one
        return int(subprocess.run(child.command("diffship", *words), env=child.environment()).returncode)
    module = importlib.import_module(f"diffship.benchmarks.{entry.module}")
    sys.argv[0] = entry.name
    return int(module.main(words) or 0)


def main() -> int:
    words = sys.argv[1:]
    if not words:
        width = max(map(len, FILES))
        for name, state in states(Path(".")).items():
            print(f"{name:{width}}  {state}")
        return 0
    if words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if words[0] == SENTINELS:
        from diffship.benchmarks.publish.sentinels import main as sentinels

        return sentinels(words[1:])
    return measure(results_file(words[0]), words[1:])
