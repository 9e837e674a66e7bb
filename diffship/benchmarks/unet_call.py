"""One U-Net call of the same weights through every engine: our runners, torch, torch.compile and optimum's export.

    python -m diffship.benchmarks.unet_call --source arch:sd15 --bundle BUNDLE --out benchmarks/results/unet-call.json \
        [--optimum-python PYTHON --optimum-bundle FOLDER]

Each subject runs in its own process; the whole list is repeated, so that a drifting machine shows up as a spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffship.benchmarks.process import Measured, measure, resident_bytes
from diffship.benchmarks.record import write_result
from diffship.core.row import Row
from diffship.core.runner import Runner

OURS = ("onnxruntime", "openvino", "torch", "torch-compile")
FEEDS = {"batch_size": 2, "height": 64, "width": 64, "sequence_length": 77}
OPTIMUM_CHILD = """
import json, resource, sys, time
import numpy as np
from optimum.onnxruntime import ORTDiffusionPipeline
started = time.perf_counter()
unet = ORTDiffusionPipeline.from_pretrained(sys.argv[1]).unet
load = time.perf_counter() - started
draw = np.random.default_rng(0)
feeds = {"sample": draw.standard_normal((2, 4, 64, 64)).astype("float32"), "timestep": np.float32(500),
         "encoder_hidden_states": draw.standard_normal((2, 77, 768)).astype("float32")}
session = unet.session
seconds = []
for _ in range(int(sys.argv[2]) + 1):
    started = time.perf_counter()
    session.run(None, feeds)
    seconds.append(time.perf_counter() - started)
print(json.dumps({"load": load, "seconds": seconds[1:]}))
"""


def call(subject: str, source: str, bundle: Path) -> Callable[[], Any]:
    """Load the U-Net and return what makes one call on fixed feeds."""
    from diffship.models.sources import open_source

    component = open_source(source).components["unet"]
    feeds = component.example(0, FEEDS)
    runner: Runner
    if subject == "torch":
        runner = component.load("cpu")
    elif subject == "torch-compile":
        return _compiled(component, feeds)
    else:
        from diffship.core.bundle import Bundle
        from diffship.runtimes.shell import open_runner

        runner = open_runner(Bundle.open(bundle), "unet", subject)
    return lambda: runner.run(feeds)


def _compiled(component: Any, feeds: dict[str, Any]) -> Callable[[], Any]:
    import torch

    module: Callable[..., Any] = torch.compile(component.module("cpu"))
    tensors = [torch.from_numpy(np.asarray(feeds[spec.name])) for spec in component.inputs]

    def once() -> Any:
        with torch.no_grad():
            return module(*tensors)

    return once


def child(subject: str, source: str, bundle: Path, calls: int) -> dict[str, Any]:
    """What one process measures: seconds to load, of each call after the first, and memory at rest."""
    started = time.perf_counter()
    once = call(subject, source, bundle)
    load = time.perf_counter() - started
    seconds = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return {"load": load, "first": seconds[0], "seconds": seconds[1:], "resident": resident_bytes()}


def rows_of(subject: str, runs: list[tuple[Measured, dict[str, Any]]]) -> list[Row]:
    """Median, minimum and maximum over all rounds, beside load time and peak memory."""
    seconds = [value for _, document in runs for value in document["seconds"]]
    figures = {
        "unet_call_seconds_median": statistics.median(seconds),
        "unet_call_seconds_min": min(seconds),
        "unet_call_seconds_max": max(seconds),
        "load_seconds_median": statistics.median(document["load"] for _, document in runs),
        "peak_resident_bytes": max(measured.peak_bytes for measured, _ in runs),
    }
    return [_row(subject, metric, value) for metric, value in figures.items()]


def _row(subject: str, metric: str, value: float | None, status: str = "ok") -> Row:
    unit = "bytes" if metric.endswith("bytes") else "s"
    return Row(suite="unet-call", subject=subject, metric=metric, value=value, unit=unit, status=status, environment={})


def run(arguments: argparse.Namespace) -> list[Row]:
    """All subjects, `rounds` times over; a subject that fails is a row that says so."""
    itself = [sys.executable, "-m", "diffship.benchmarks.unet_call", "--source", arguments.source]
    commands = {
        subject: [*itself, "--child", subject, "--bundle", str(arguments.bundle), "--calls", str(arguments.calls)]
        for subject in arguments.subjects
    }
    if arguments.optimum_python:
        program = [arguments.optimum_python, "-c", OPTIMUM_CHILD]
        commands["optimum"] = [*program, str(arguments.optimum_bundle), str(arguments.calls)]
    kept: dict[str, list[tuple[Measured, dict[str, Any]]]] = {subject: [] for subject in commands}
    failed: dict[str, Measured] = {}
    for turn in range(arguments.rounds):
        for subject, command in commands.items():
            measured = measure(command, timeout=arguments.timeout)
            if measured.code:
                failed[subject] = measured
                print(f"{subject}: exit {measured.code}\n{measured.output[-800:]}", file=sys.stderr)
                continue
            kept[subject].append((measured, measured.document()))
            median = statistics.median(kept[subject][-1][1]["seconds"])
            print(f"round {turn + 1} {subject}: {median:.2f} s a call", file=sys.stderr)
    rows = [row for subject, runs in kept.items() if runs for row in rows_of(subject, runs)]
    return rows + [_row(subject, "unet_call_seconds_median", None, "failed") for subject in failed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="arch:sd15")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--subjects", nargs="*", default=OURS)
    parser.add_argument("--optimum-python")
    parser.add_argument("--optimum-bundle", type=Path)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.source, arguments.bundle, arguments.calls)))
        return
    rows = run(arguments)
    if arguments.out:
        command = f"python -m diffship.benchmarks.unet_call --source {arguments.source} --bundle BUNDLE"
        write_result(arguments.out, "unet-call", command, rows, {"feeds": FEEDS, "calls": arguments.calls})
    for row in rows:
        print(f"{row.subject:16} {row.metric:28} {row.value} {row.unit}")


if __name__ == "__main__":
    main()
