"""One U-Net call of the same weights through every engine: our runners, torch, torch.compile and optimum's export.

    python -m diffship.benchmarks.unet_call --source arch:sd15 --bundle BUNDLE --out benchmarks/results/unet-call.json \
        [--optimum-python PYTHON --optimum-bundle FOLDER]

The children and the rounds of `diffship bench`, on a bundle and an export that are there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffship.benchmarks.case import Case
from diffship.benchmarks.clock import told
from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.export_cost import save_source
from diffship.benchmarks.materials import RANDOM, TRAINED
from diffship.benchmarks.peers.environments import isolated_path
from diffship.benchmarks.peers.table import PEERS
from diffship.benchmarks.process import Measured, measure
from diffship.benchmarks.record import write_result
from diffship.core.row import Row

OURS = ("onnxruntime", "openvino", "torch", "torch-compile")
RUNNERS = {"torch-compile": "compile"}  # subjects that have another name in `diffship bench`
FEEDS = {"batch_size": 2, "height": 64, "width": 64, "sequence_length": 77}
SUITE = "unet-call"


def commands(arguments: argparse.Namespace, work: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """subject -> (command line, environment); the weights as a folder and the feeds are written to `work` first."""
    from safetensors.numpy import save_file

    from diffship.models.sources import open_source

    save_source(arguments.source, work / "folder")
    component = open_source(str(work / "folder")).components["unet"]
    save_file(dict(component.example(0, FEEDS)), work / "feeds")
    subjects = [*arguments.subjects, *(["optimum"] if arguments.optimum_python else [])]
    return {subject: _command(arguments, work, subject) for subject in subjects}


def _command(arguments: argparse.Namespace, work: Path, subject: str) -> tuple[list[str], dict[str, str]]:
    runner = RUNNERS.get(subject, subject)
    shape = {"part": "unet", "batch": 1, "steps": 0, "size": 0, "guidance": 7.5, "sampler": "euler"}
    case = Case(arguments.source, runner, precision="fp32", device="cpu", calls=arguments.calls, **shape)  # type: ignore[arg-type]
    order = {"case": asdict(case), "folder": str(work / "folder"), "bundle": str(arguments.bundle)}
    order |= {"feeds": str(work / "feeds"), "exported": str(arguments.optimum_bundle)}
    own = subject == "optimum"
    python = str(arguments.optimum_python) if own else sys.executable
    module = PEERS[runner].child if runner in PEERS else "diffship.benchmarks.child"
    env = {"PYTHONPATH": str(isolated_path(work / "peer-path"))} if own else {}
    return [python, "-m", module, json.dumps(order)], env


def rows_of(subject: str, runs: list[tuple[Measured, dict[str, Any]]], conditions: dict[str, Any]) -> list[Row]:
    """Median over all rounds with the fastest and slowest call, beside load time and peak memory."""
    seconds = [value for _, document in runs for value in document["seconds"]]
    loads = [document["load"] for _, document in runs]
    span = {"low": min(seconds), "high": max(seconds), "n": len(seconds)}
    peak = max(measured.peak_bytes for measured, _ in runs)
    shared: dict[str, Any] = {"conditions": {**conditions, "runner": subject}}
    return [
        Row(SUITE, subject, "unet_call_seconds_median", statistics.median(seconds), "s", **span, **shared),
        Row(SUITE, subject, "load_seconds_median", statistics.median(loads), "s", n=len(loads), **shared),
        Row(SUITE, subject, "peak_resident_bytes", peak, "bytes", kind="memory", **shared),
    ]


def run(arguments: argparse.Namespace, work: Path) -> list[Row]:
    """All subjects, `rounds` times over; a subject that fails or runs out of memory is a row that says so."""
    kept: dict[str, list[tuple[Measured, dict[str, Any]]]] = {}
    failed: dict[str, Measured] = {}
    chosen = commands(arguments, work)
    for turn in range(arguments.rounds):
        for subject, (command, env) in chosen.items():
            measured = measure(command, arguments.timeout, {**told(), **env})
            if measured.code:
                failed[subject] = measured
                print(f"{subject}: {measured.status}: {measured.reason}", file=sys.stderr)
                continue
            kept.setdefault(subject, []).append((measured, measured.document()))
            median = statistics.median(kept[subject][-1][1]["seconds"])
            print(f"round {turn + 1} {subject}: {median:.3g} s a call", file=sys.stderr)
    weights = RANDOM if arguments.source.startswith("arch:") else TRAINED
    conditions = {"model": arguments.source, "part": "unet", "weights": weights}
    rows = [row for subject, runs in kept.items() for row in rows_of(subject, runs, conditions)]
    return rows + [
        Row(SUITE, subject, "unet_call_seconds_median", None, "s", entry.status, reason=entry.reason)
        for subject, entry in failed.items()
        if subject not in kept
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="arch:sd15")
    parser.add_argument("--bundle", type=named_bundle, required=True)
    parser.add_argument("--subjects", nargs="*", default=OURS)
    parser.add_argument("--optimum-python")
    parser.add_argument("--optimum-bundle", type=Path)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        rows = run(arguments, Path(work))
    if arguments.out:
        command = f"python -m diffship.benchmarks.unet_call --source {arguments.source} --bundle BUNDLE"
        write_result(arguments.out, SUITE, command, rows, {"feeds": FEEDS, "calls": arguments.calls})
    for row in rows:
        print(f"{row.subject:16} {row.metric:28} {row.value} {row.unit} {row.status}")


if __name__ == "__main__":
    enter(main)
