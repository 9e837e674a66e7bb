"""From the command line to the first picture, in an environment without torch: seconds, memory, installed bytes.

python -m diffship.benchmarks cold-start [--python ENV/bin/python] [--bundle BUNDLE]

By default the environment is made now, and `emoji` exported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.measure.intervals import spread
from diffship.benchmarks.measure.process import measure
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work, bundle, edge_python
from diffship.core.errors import RunnerError
from diffship.core.quiet import timing

PROBE = """
import importlib.metadata, importlib.util, json, pathlib
sizes = {}
for found in importlib.metadata.distributions():
    files = [found.locate_file(f) for f in found.files or ()]
    sizes[found.metadata["Name"]] = sum(pathlib.Path(f).stat().st_size for f in files if pathlib.Path(f).is_file())
torch = importlib.util.find_spec("torch") is not None
own = sum(size for name, size in sizes.items() if name not in ("pip", "setuptools", "wheel"))
print(json.dumps({"torch": torch, "bytes": own}))
"""


def installed(python: str) -> dict[str, Any]:
    """Whether torch is there, and the bytes of all distributions but the installer's own."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True)
    return dict(json.loads(done.stdout))


def run(python: str, bundle: Path, steps: int, runs: int) -> list[Row]:
    """Median over `runs` of whole processes, after one that warms the file cache."""
    facts = installed(python)
    seconds, peak = [], 0
    with timing("cold-start"), tempfile.TemporaryDirectory() as folder:
        for turn in range(runs + 1):
            command = [python, "-m", "diffship", "run", str(bundle), "a red apple", "--steps", str(steps)]
            measured = measure([*command, "-o", f"{folder}/{turn}"], timeout=120)
            if measured.code:
                raise RunnerError(f"run failed: {measured.reason}")
            if turn:
                seconds.append(measured.seconds)
                peak = max(peak, measured.peak_bytes)
    subject = f"emoji, {steps} steps, {'with' if facts['torch'] else 'without'} torch"
    return [
        Row("cold-start", subject, "cold_start_seconds_median", statistics.median(seconds), "s", **spread(seconds)),
        Row("cold-start", subject, "peak_resident_bytes", peak, "bytes", kind="memory"),
        Row("cold-start", subject, "installed_bytes", facts["bytes"], "bytes", kind="size"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment without torch (made)")
    parser.add_argument("--bundle", type=named_bundle, help="of emoji (made)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    add_work(parser)
    arguments = parser.parse_args(argv)
    python = arguments.python or str(edge_python(arguments.work))
    rows = run(python, arguments.bundle or bundle("emoji", arguments.work), arguments.steps, arguments.runs)
    if arguments.out:
        settings = {"steps": arguments.steps, "runs": arguments.runs}
        write_result(arguments.out, "cold-start", "python -m diffship.benchmarks cold-start", rows, settings)
    for row in rows:
        print(f"{row.subject:40} {row.metric:28} {row.value} {row.unit}")


if __name__ == "__main__":
    enter(main)
