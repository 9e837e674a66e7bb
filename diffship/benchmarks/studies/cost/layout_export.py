"""The U-Net of every published layout at full size, exported to ONNX and proved: seconds, memory, worst difference.

    python -m diffship.benchmarks layout-export [--only arch:vega]

Weights are drawn from a seed, which proves the graph and says nothing of pictures. DIR takes up to 11 GB, and is
emptied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.process import measure
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.workbench import add_work
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.quiet import timing
from diffship.core.registry import kind
from diffship.core.strict import unknown

SUITE = "layout-export"
SOURCES = (
    *("arch:sd15", "arch:bk-base", "arch:bk-small", "arch:bk-tiny", "arch:hybrid-224m", "arch:hybrid-224m+lcm"),
    *("arch:sd21-base", "arch:bk-v2-base", "arch:bk-v2-small", "arch:bk-v2-tiny"),
    *("arch:sdxl", "arch:ssd-1b", "arch:vega", "arch:koala-1b", "arch:koala-700m"),
)
_SECONDS = 3600


def rows_of(source: str, work: Path) -> list[Row]:
    """Export and proof in a process of their own; nothing is kept. An export that fails is one row that says why."""
    part = kind("sd").denoiser  # these are all U-Nets
    folder = work / part
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "diffship", "export", source, "--to", "onnx", "--parts", part, "-o", str(folder)]
    conditions = {"model": source, "part": part, "precision": "fp32"}
    try:
        measured = measure(command, timeout=_SECONDS)
        if measured.code:
            status, reason = measured.status, measured.reason
            return [Row(SUITE, source, "export_seconds", None, "s", status, reason=reason, conditions=conditions)]
        made = Bundle.open(folder).part(part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = (
        ("parameters", made.extra["parameters"], "count", "size"),
        ("export_seconds", measured.seconds, "s", "latency"),
        ("export_peak_resident_bytes", measured.peak_bytes, "bytes", "memory"),
        ("max_abs", made.proof["max_abs"], "", "quality"),
        ("psnr_db", made.proof["psnr_db"], "dB", "quality"),
    )
    return [
        Row(SUITE, source, metric, float(value), unit, kind=kind, conditions=conditions)
        for metric, value, unit, kind in figures
    ]


def chosen(names: Sequence[str]) -> list[str]:
    """These sources. Raises ConfigError for one that is not among SOURCES."""
    for name in names:
        if name not in SOURCES:
            raise ConfigError(unknown("source", name, SOURCES))
    return [source for source in SOURCES if not names or source in names]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="SOURCE")
    add_work(parser)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for source in chosen(arguments.only):
        with timing(SUITE):
            found = rows_of(source, arguments.work)
        print(source, *(f"{row.metric} {row.value}" for row in found), flush=True)
        rows += found
    if arguments.out:
        command = "python -m diffship.benchmarks layout-export"
        write_result(arguments.out, SUITE, command, rows, {"title": "Published layouts at full size, to ONNX"})


if __name__ == "__main__":
    enter(main)
